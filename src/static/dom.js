// Elements made and changed. Text only ever becomes text: there is no way from here into markup.

/** Make an element. Attributes that are null or false are left out, true ones are empty, `on` has listeners. */
export function el(tag, attributes = {}, ...children) {
	const made = document.createElement(tag);
	for (const [name, value] of Object.entries(attributes)) {
		if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
		else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
	}
	made.append(...children);
	return made;
}

const written = new WeakMap(); // what a place shows: to compare with it is cheaper than to ask the document

/** Show a text; nothing happens when it is there already. Returns whether it is new. */
export function write(place, text) {
	if (written.get(place) === text) return false;
	written.set(place, text);
	place.textContent = text;
	return true;
}

/** Set an attribute, or take it away for null; nothing happens when it is so already. */
export function mark(place, name, value) {
	if (value === null) place.removeAttribute(name);
	else if (place.getAttribute(name) !== String(value)) place.setAttribute(name, value);
}

/** A shape of SVG. */
export function shape(tag, attributes = {}, ...children) {
	const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
	for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
	made.append(...children);
	return made;
}

/** A part of a view, with a heading. */
export function panel(name, heading, ...children) {
	return el("div", { class: `panel ${name}` }, el("h2", {}, ...heading), ...children);
}

/** Rows of a table that are written over, not made anew. */
class Rows {
	#rows = [];
	#body;
	#columns;
	#longest; // characters in the longest text of each column so far

	constructor(body, columns) {
		this.#body = body;
		this.#columns = columns;
		this.#longest = columns.map(() => 0);
	}

	/** Show lists of texts; `attributes` has a function that gives each row its attributes. */
	show(lists, attributes = () => ({})) {
		while (this.#rows.length < lists.length) {
			const cells = this.#columns.map(() => el("td"));
			this.#rows.push({ row: el("tr", {}, ...cells), cells });
			this.#body.append(this.#rows.at(-1).row);
		}
		for (const [at, { row, cells }] of this.#rows.entries()) {
			row.hidden = at >= lists.length;
			if (row.hidden) continue;
			for (const [column, cell] of cells.entries()) {
				if (write(cell, lists[at][column])) this.#reserve(column, lists[at][column].length);
			}
			for (const [name, value] of Object.entries(attributes(at))) {
				if (name.startsWith("--")) row.style.setProperty(name, value);
				else mark(row, name, value);
			}
		}
	}

	/** Keep a column as wide as its longest text, in all tables of the panel: a width that follows each text would jump. */
	#reserve(column, length) {
		const place = this.#body.closest(".panel");
		if (length <= this.#longest[column] || !place) return;
		this.#longest[column] = length;
		const name = `--digits-${column}`;
		place.style.setProperty(name, Math.max(length, place.style.getPropertyValue(name)));
	}
}

/** A table of figures: {table, rows}. */
export function listing(label, columns) {
	const body = el("tbody");
	const heads = columns.map((text) => el("th", { scope: "col" }, text));
	const table = el("table", { class: "figures", "aria-label": label }, el("thead", {}, el("tr", {}, ...heads)), body);
	return { table, rows: new Rows(body, columns) };
}
