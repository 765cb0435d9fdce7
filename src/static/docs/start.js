// Swagger UI converts descriptions to HTML, which the Content-Security-Policy blocks.
// This plugin shows a description as text, with `code`.
const plainText = ({ React }) => ({
	components: {
		Markdown: ({ source = "" }) => {
			const parts = source.split("`");
			const nodes = parts.map((text, index) =>
				index % 2 ? React.createElement("code", null, text) : text,
			);
			return React.createElement("p", null, ...nodes);
		},
	},
});

globalThis.SwaggerUIBundle({
	url: "/openapi.json",
	dom_id: "#docs",
	deepLinking: true,
	displayRequestDuration: true,
	validatorUrl: null, // the default is an external service
	plugins: [plainText],
});
