// The figures and the ranking, drawn anew for every choice.

const format = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const digitsOf = (cell) => (cell.higher ? 1 : 3);
const views = new Map();

function interval(cell) {
  return cell.score === null ? "" : `${format(cell.low, digitsOf(cell))}, ${format(cell.high, digitsOf(cell))}`;
}

// A cell as the specifications expect it.
function rowOf(cell) {
  return {
    ...cell, protocol: state.protocol, label: budgets.get(cell.budget).label, order: budgets.get(cell.budget).order,
    method_order: looks.get(cell.method).order, interval: interval(cell),
  };
}

function cellsOf(task, length = state.length) {
  const setup = setupNumber();
  return data.cells.filter((cell) => cell.setup === setup && cell.task === task && cell.length === length);
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const font = getComputedStyle(document.body).fontFamily;
  return {
    background: "transparent", font, view: { stroke: null, continuousWidth: 300 },
    axis: {
      labelColor: color("--quiet"), titleColor: color("--quiet"), gridColor: color("--grid"), labelFontSize: 11.5,
      domainColor: color("--line"), tickColor: color("--line"), titleFontSize: 12, titleFontWeight: "normal",
    },
    legend: { labelColor: color("--quiet"), titleColor: color("--quiet"), titleFontWeight: "normal" },
    header: { labelColor: color("--ink"), labelFontSize: 12 },
  };
}

function lengthText(key) {
  if (state.length !== data.all_lengths) return `length ${state.length}`;
  return key === "depth" ? "each length by itself" : "mean over lengths";
}

// A panel: what is measured, under which protocol, and the chart. A newer drawing of the same place wins.
async function panel(box, key, title, about, spec, rows, under = null) {
  const chart = make("div", { class: "chart", "data-key": key, "data-rows": rows.length });
  const scope = `protocol ${state.protocol}, ${lengthText(key)}`;
  box.append(make("figure", {}, make("figcaption", {}, make("b", {}, title), make("span", { class: "quiet" },
    [about, scope].filter(Boolean).join(" · "))), chart, under ?? ""));
  if (!rows.length) {
    chart.append(make("p", { class: "nothing" }, "Nothing was measured for this choice."));
    return;
  }
  const full = { ...structuredClone(spec), datasets: { rows }, config: theme() };
  const { finalize } = await vegaEmbed(chart, full, { actions: false, renderer: "svg" });
  if (chart.isConnected) views.set(chart, finalize);
  else finalize();
}

function clear(section) {
  const box = document.querySelector(`#${section} .panels`);
  for (const [chart, finalize] of views) {
    if (box.contains(chart)) { finalize(); views.delete(chart); }
  }
  box.replaceChildren();
  return box;
}

function unitOf(task) {
  if (task === data.all_tasks) return ["Score", "0 to 100, higher is better"];
  const measure = measures.get(task);
  if (measure.unit === "KL") return ["KL from the full cache", "nats a token, lower is better"];
  if (measure.unit === "top-1") return ["Same next token as the full cache", "% of tokens, higher is better"];
  if (measure.unit === "score") return ["Score", "0 to 100, higher is better"];
  return [measure.unit, measure.higher ? "higher is better" : "lower is better"];
}

const titleOf = (task) => `${unitOf(task)[0]}: ${task}`;

function drawBudget() {
  const box = clear("figure-budget");
  const agreement = data.measures.filter((m) => m.unit === "KL" || m.unit === "top-1").map((m) => m.label);
  for (const task of [...new Set([state.task, ...agreement])]) {
    const rows = cellsOf(task).filter((cell) => shown(cell) && cell.score !== null).map(rowOf);
    if (rows.length || task === state.task) {
      panel(box, `budget:${task}`, titleOf(task), unitOf(task)[1], data.specs.budget, rows);
    }
  }
}

function drawCost() {
  const box = clear("figure-cost");
  const higher = state.task === data.all_tasks || measures.get(state.task).higher;
  byId("better").textContent = higher ? "Up and left" : "Down and left";
  for (const [name, field, flag, what] of [
    ["memory", "ratio", "front_memory", "memory"], ["time", "step", "front_time", "decode time"],
  ]) {
    const rows = cellsOf(state.task).filter((cell) => shown(cell) && cell.score !== null && cell[field] !== null)
      .map((cell) => ({ ...rowOf(cell), front: cell[flag] }));
    const front = rows.filter((row) => row.front).sort((a, b) => a[field] - b[field]);
    const names = front.map((row) => make("span", { class: "name" }, swatch(row.method),
      row.method === "full" ? "full" : `${row.method}, ${row.label}`));
    const under = front.length ? make("div", { class: "front" }, "On the front:", ...names) : null;
    panel(box, `cost:${name}`, `${titleOf(state.task)} against ${what}`, unitOf(state.task)[1], data.specs[name], rows, under);
  }
}

function drawDepth() {
  const box = clear("figure-depth");
  const setup = setupNumber();
  const spots = data.heat.filter((spot) => spot.setup === setup && spot.task === state.task && inLengths(spot.length)
    && shown(spot));
  byId("figure-depth").hidden = !data.heat.length;
  const rows = [];
  const sizes = [...new Set(spots.filter((spot) => spot.method !== "full").map((spot) => spot.budget))];
  for (const spot of spots) {
    const repeated = spot.method === "full" && sizes.length ? sizes : [spot.budget];
    for (const budget of repeated) {
      rows.push({ ...rowOf({ ...spot, budget }), length_order: data.lengths.indexOf(spot.length) });
    }
  }
  const methods = new Set(rows.map((row) => row.method)).size;
  const lengths = new Set(rows.map((row) => row.length)).size;
  const spec = structuredClone(data.specs.depth);
  const room = (box.clientWidth - 120) / Math.max(methods, 1) - 14;
  spec.spec.width = Math.max(34 * lengths, Math.min(room, 110 * lengths, 340));
  for (const channel of ["row", "column"]) spec.facet[channel].header.labelLimit = Math.max(spec.spec.width, 90);
  panel(box, "depth", titleOf(state.task), "0 to 100", spec, rows);
}

function track(cell, low, high) {
  const place = (value) => `${(100 * (value - low)) / (high - low || 1)}%`;
  const line = make("i", { style: `left:${place(cell.low)};right:calc(100% - ${place(cell.high)})` });
  const dot = make("b", { style: `left:${place(cell.score)}` });
  return make("div", { class: "track", style: `color:${looks.get(cell.method).color}` }, line, dot);
}

function verdict(standing) {
  if (standing.cell.score === null) return "all failed";
  if (standing.rank === 1) return "best";
  if (standing.p === null) return "no shared example";
  return standing.p < 0.05 ? "worse" : "not told apart";
}

function chance({ p }) {
  if (p === null) return "";
  return p < 0.001 ? " p < 0.001" : ` p = ${format(p, p < 0.1 ? 3 : 2)}`;
}

function drawRanking() {
  const setup = setupNumber();
  byId("ranking-note").textContent = `${data.test[0].toUpperCase()}${data.test.slice(1)}: whether a method can be told from the best of its budget at 5 %. `
    + `Ranks are among all methods of the sweep, also those not shown. Protocol ${state.protocol}; `
    + `${state.task}; ${state.length}. † over fewer examples than others had.`;
  const groups = new Map();
  for (const standing of data.standings) {
    const cell = data.cells[standing.cell];
    if (cell.setup !== setup || cell.task !== state.task || cell.length !== state.length || !shown(cell)) continue;
    groups.set(cell.budget, [...(groups.get(cell.budget) ?? []), { ...standing, cell }]);
  }
  const spans = [...groups.values()].flat().map(({ cell }) => cell).filter((cell) => cell.score !== null);
  const low = Math.min(...spans.map((cell) => cell.low)), high = Math.max(...spans.map((cell) => cell.high));
  const tables = [...groups].map(([budget, list]) => {
    const head = ["#", "Method", "Score [95 % interval]", "", "Lost to full", "Against the best"];
    const body = list.map((standing) => {
      const { cell, rank, loss } = standing;
      const score = make("td", { class: "amount" }, format(cell.score, digitsOf(cell)),
        make("small", {}, cell.score === null ? "" : ` [${interval(cell)}]`), cell.partial ? " †" : "");
      return make("tr", { class: rank === 1 ? "best" : null },
        make("td", { class: "amount" }, String(rank)), make("td", {}, nameOf(cell.method)), score,
        make("td", {}, cell.score === null ? "" : track(cell, low, high)),
        make("td", { class: "amount" }, format(loss, digitsOf(cell))),
        make("td", { class: verdict(standing) === "worse" ? "worse" : null }, verdict(standing),
          make("small", {}, chance(standing))));
    });
    const numbers = new Set(["#", "Score [95 % interval]", "Lost to full"]);
    const row = make("tr", {}, ...head.map((text) => make("th", { class: numbers.has(text) ? "amount" : null }, text)));
    return make("div", { "data-budget": budget },
      make("h3", {}, `Budget ${budgets.get(budget).label} · protocol ${state.protocol}`),
      make("table", {}, make("thead", {}, row), make("tbody", {}, ...body)));
  });
  const nothing = make("p", { class: "nothing" }, "Nothing was measured for this choice.");
  document.querySelector("#ranking .tables").replaceChildren(...(tables.length ? tables : [nothing]));
}

function drawFigures() {
  drawBudget();
  drawCost();
  drawDepth();
  drawRanking();
}
