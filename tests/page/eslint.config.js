// Rules for the page: no errors, no dead code, no markup from text, small functions.
import js from "@eslint/js";
import globals from "globals";

const NO_MARKUP = "creates markup or code from text: use textContent and elements";

export default [
	{ linterOptions: { reportUnusedDisableDirectives: "error" } },
	js.configs.recommended,
	{
		rules: {
			"array-callback-return": "error",
			complexity: ["error", 12],
			"consistent-return": "error",
			curly: ["error", "multi-line"],
			"default-case-last": "error",
			eqeqeq: ["error", "always", { null: "ignore" }],
			"max-depth": ["error", 3],
			"max-lines-per-function": [
				"error",
				{ max: 60, skipBlankLines: true, skipComments: true },
			],
			"max-params": ["error", 6],
			"no-alert": "error",
			"no-console": ["error", { allow: ["warn", "error"] }],
			"no-else-return": "error",
			"no-eval": "error",
			"no-implicit-coercion": "error",
			"no-implied-eval": "error",
			"no-new-func": "error",
			"no-new-wrappers": "error",
			"no-param-reassign": "error",
			"no-promise-executor-return": "error",
			"no-return-assign": "error",
			"no-script-url": "error",
			"no-self-compare": "error",
			"no-sequences": "error",
			"no-shadow": "error",
			"no-throw-literal": "error",
			"no-undef-init": "error",
			"no-unneeded-ternary": "error",
			"no-unused-expressions": "error",
			"no-unused-vars": [
				"error",
				{ args: "all", argsIgnorePattern: "^_", caughtErrors: "all" },
			],
			"no-use-before-define": ["error", { functions: false }],
			"no-useless-rename": "error",
			"no-useless-return": "error",
			"no-var": "error",
			"object-shorthand": "error",
			"prefer-const": "error",
			"prefer-promise-reject-errors": "error",
			"prefer-rest-params": "error",
			"prefer-template": "error",
			radix: "error",
			strict: ["error", "never"],
			yoda: "error",
		},
	},
	{
		files: ["src/static/**/*.js", "src/static/docs/**/*.js"],
		languageOptions: { globals: globals.browser },
		rules: {
			// The Content-Security-Policy forbids most of these, too, but only at run time.
			"no-restricted-properties": [
				"error",
				...[
					"innerHTML",
					"outerHTML",
					"insertAdjacentHTML",
					"setHTMLUnsafe",
					"parseHTMLUnsafe",
					"srcdoc",
				].map((property) => ({ property, message: NO_MARKUP })),
				{ property: "createContextualFragment", message: NO_MARKUP },
				{ property: "parseFromString", message: NO_MARKUP },
				{ object: "document", property: "write", message: NO_MARKUP },
				{ object: "document", property: "writeln", message: NO_MARKUP },
				{
					object: "document",
					property: "cookie",
					message: "the page sets no cookies",
				},
				{ property: "__proto__", message: "do not change prototypes" },
			],
			"no-restricted-globals": [
				"error",
				{ name: "event", message: "use the handler's own argument" },
				{ name: "name", message: "a property of window, most likely a mistake" },
				{ name: "status", message: "a property of window, most likely a mistake" },
				{ name: "length", message: "a property of window, most likely a mistake" },
			],
			"no-restricted-syntax": [
				"error",
				{
					selector:
						"CallExpression[callee.property.name='setAttribute']" +
						"[arguments.0.value=/^(style$|on)/i]",
					message:
						"blocked by the policy: use a class, .style.<property> or addEventListener",
				},
				{
					selector: "Literal[value=/^https?:/][value!='http://www.w3.org/2000/svg']",
					message: "the page sends requests to its gateway only",
				},
			],
		},
	},
	{
		files: ["tests/page/**/*.js"],
		languageOptions: { globals: globals.node },
		rules: { "max-lines-per-function": "off" },
	},
];
