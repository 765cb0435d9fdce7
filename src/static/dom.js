// Helpers for DOM elements. Text is never parsed as markup.

export const byId = (id) => document.getElementById(id);

function build(element, attributes, children) {
	for (const [name, value] of Object.entries(attributes)) {
		if (name === "on") {
			for (const [event, listener] of Object.entries(value)) {
				element.addEventListener(event, listener);
			}
		} else {
			element.setAttribute(name, value);
		}
	}
	element.append(...children);
	return element;
}

/** Create an element. `name` is a tag and classes, as in "p.note". `on` has the event listeners. */
export function el(name, attributes = {}, ...children) {
	const [tag, ...classes] = name.split(".");
	const element = document.createElement(tag);
	if (classes.length) element.className = classes.join(" ");
	return build(element, attributes, children);
}

export function button(text, click, attributes = {}) {
	return el("button", { type: "button", on: { click }, ...attributes }, text);
}

export function svg(tag, attributes = {}, ...children) {
	const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
	return build(element, attributes, children);
}

// Comparing with this map is cheaper than reading the document.
const texts = new WeakMap();

/** Set a text. Return true if it changed. */
export function setText(element, text) {
	if (texts.get(element) === text) return false;
	texts.set(element, text);
	element.textContent = text;
	return true;
}

/** Set an attribute, or remove it for null. */
export function setAttr(element, name, value) {
	if (value === null) element.removeAttribute(name);
	else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

export function panel(name, heading, ...children) {
	return el("div", { class: `panel ${name}` }, el("h2", {}, ...heading), ...children);
}

class Rows {
	#rows = [];
	#body;
	#columns;
	#longest; // characters by column

	constructor(body, columns) {
		this.#body = body;
		this.#columns = columns;
		this.#longest = columns.map(() => 0);
	}

	/** Show a list of texts per row. `attributes(index)` returns a row's attributes. */
	show(lists, attributes = () => ({})) {
		while (this.#rows.length < lists.length) this.#addRow();
		for (const [index, { row, cells }] of this.#rows.entries()) {
			row.hidden = index >= lists.length;
			if (row.hidden) continue;
			for (const [column, cell] of cells.entries()) {
				const text = lists[index][column];
				if (setText(cell, text)) this.#reserveWidth(column, text.length);
			}
			for (const [name, value] of Object.entries(attributes(index))) {
				if (name.startsWith("--")) row.style.setProperty(name, value);
				else setAttr(row, name, value);
			}
		}
	}

	#addRow() {
		const cells = this.#columns.map(() => el("td"));
		const row = el("tr", {}, ...cells);
		this.#rows.push({ row, cells });
		this.#body.append(row);
	}

	/** Keep a column as wide as its longest text so far, so that the layout does not jump. */
	#reserveWidth(column, length) {
		const parent = this.#body.closest(".panel");
		if (length <= this.#longest[column] || !parent) return;
		this.#longest[column] = length;
		const name = `--digits-${column}`;
		parent.style.setProperty(name, Math.max(length, parent.style.getPropertyValue(name)));
	}
}

/** Return {table, rows}. */
export function figuresTable(label, columns) {
	const body = el("tbody");
	const heads = columns.map((text) => el("th", { scope: "col" }, text));
	const head = el("thead", {}, el("tr", {}, ...heads));
	const table = el("table.figures", { "aria-label": label }, head, body);
	return { table, rows: new Rows(body, columns) };
}
