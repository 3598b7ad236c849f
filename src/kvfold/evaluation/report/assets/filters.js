"use strict";
// What is chosen, and what of the data that lets through.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const looks = new Map(data.methods.map((method, order) => [method.name, { ...method, order }]));
const budgets = new Map(data.budgets.map((budget, order) => [budget.key, { ...budget, order }]));
const measures = new Map(data.measures.map((measure) => [measure.label, measure]));
const modelOf = (setup) => `${setup.model}, ${setup.dtype}`;
const state = {};

// Text always enters the page as text: no result can bring markup with it.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const OUTLINES = {
  circle: "M5.5 1a4.5 4.5 0 1 0 .01 0z", square: "M1.5 1.5h8v8h-8z", diamond: "M5.5 .5l4 5l-4 5l-4-5z",
  "triangle-up": "M5.5 1l4.8 9h-9.6z", "triangle-down": "M5.5 10l4.8-9h-9.6z",
  cross: "M4 1h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
};

function swatch(method) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("viewBox", "0 0 11 11");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", OUTLINES[looks.get(method).shape]);
  path.setAttribute("fill", looks.get(method).color);
  svg.append(path);
  return svg;
}

const nameOf = (method) => make("span", { class: "name" }, swatch(method), method);
const setupNumber = () =>
  data.setups.findIndex((setup) => modelOf(setup) === state.model && setup.protocol === state.protocol);

// Whether a method at a budget is let through. The full cache has no budget to filter by.
const shown = (row) => state.methods.has(row.method) && (row.method === "full" || state.budgets.has(row.budget));
const inLengths = (length) => state.length === data.all_lengths || state.length === length;

function inTasks(task) {
  if (state.task === data.all_tasks) return true;
  return measures.get(state.task).task === task;
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map((value) => make("option", { value }, value)));
  select.value = options.includes(chosen) ? chosen : options[0];
  return select.value;
}

function fillChoices() {
  const unique = (values) => [...new Set(values)];
  state.model = fill(byId("model"), unique(data.setups.map(modelOf)), state.model);
  const here = data.setups.filter((setup) => modelOf(setup) === state.model);
  state.protocol = fill(byId("protocol"), here.map((setup) => setup.protocol), state.protocol);
  const setup = setupNumber();
  const cells = data.cells.filter((cell) => cell.setup === setup);
  state.task = fill(byId("task"), unique(cells.map((cell) => cell.task)), state.task);
  const lengths = unique(cells.map((cell) => cell.length)).filter((name) => name !== data.all_lengths);
  lengths.sort((a, b) => data.lengths.indexOf(a) - data.lengths.indexOf(b));
  state.length = fill(byId("length"), lengths.length > 1 ? [data.all_lengths, ...lengths] : lengths, state.length);
}

function chips(box, items, chosen, changed) {
  box.replaceChildren(...items.map(({ key, content }) => {
    const input = make("input", { type: "checkbox", value: key });
    input.checked = chosen.has(key);
    input.addEventListener("change", () => {
      if (input.checked) chosen.add(key); else chosen.delete(key);
      changed();
    });
    return make("label", { class: "chip" }, input, ...content);
  }));
}

function startFilters(changed) {
  const used = new Set(data.cells.filter((cell) => cell.method !== "full").map((cell) => cell.budget));
  state.methods = new Set(looks.keys());
  state.budgets = new Set(used);
  fillChoices();
  for (const name of ["model", "protocol", "task", "length"]) {
    byId(name).addEventListener("change", () => {
      state[name] = byId(name).value;
      fillChoices();
      changed();
    });
  }
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  const methods = [...looks.keys()].map((name) => ({ key: name, content: [swatch(name), name] }));
  chips(byId("methods"), methods, state.methods, changed);
  const sizes = [...budgets.values()].filter((budget) => used.has(budget.key));
  chips(byId("budgets"), sizes.map(({ key, label }) => ({ key, content: [label] })), state.budgets, changed);
}
