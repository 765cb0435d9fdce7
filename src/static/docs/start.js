// Swagger UI renders descriptions as HTML that it makes from text, which the Content-Security-Policy refuses. Here they
// are plain text with `code`, as they are written in the gateway.
const plainText = ({ React }) => ({
  components: {
    Markdown: ({ source = "" }) =>
      React.createElement(
        "p",
        null,
        ...source.split("`").map((text, index) => (index % 2 ? React.createElement("code", null, text) : text)),
      ),
  },
});

globalThis.SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  displayRequestDuration: true,
  validatorUrl: null, // the default is a foreign address
  plugins: [plainText],
});
