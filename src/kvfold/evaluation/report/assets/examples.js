// The table of single results, and the panel that shows one.

const PAGE = 60;
const list = { limit: PAGE, chosen: null };
const HEAD = ["Example", "Method", "Budget", "Score", "Kept", "Prediction"];
const reference = new Map();
data.rows.forEach((row, number) => {
  row.number = number;
  if (row.method === "full") reference.set(`${row.setup}/${row.example}`, row);
});

const shareOf = (row) => (row.error || !row.prompt_tokens ? "–" : `${Math.round((100 * row.kept_tokens) / row.prompt_tokens)} %`);
const firstMeasure = (task) => data.measures.find((measure) => measure.task === task);
const valueOf = (row) => format(row.value, firstMeasure(data.examples[row.example].task).higher ? 1 : 3);
const predictions = (row) => (row.answers ?? []).map((answer) => answer.prediction ?? "").join(" ⏎ ");
const labelOf = (row) => (row.method === "full" ? "–" : budgets.get(row.budget).label);

function worse(row) {
  const full = reference.get(`${row.setup}/${row.example}`);
  if (!full || full === row || full.value === null) return false;
  if (row.value === null) return true;
  return firstMeasure(data.examples[row.example].task).higher ? row.value < full.value : row.value > full.value;
}

function listed() {
  const setup = setupNumber();
  const words = byId("search").value.toLowerCase().trim();
  const outcome = byId("outcome").value;
  return data.rows.filter((row) => {
    const example = data.examples[row.example];
    if (row.setup !== setup || !shown(row) || !inTasks(example.task) || !inLengths(example.length)) return false;
    if (outcome === "failed" ? !row.error : outcome === "worse" ? !worse(row) : false) return false;
    if (!words) return true;
    return [example.example, example.task, row.method, row.error ?? "", predictions(row)].join("\n").toLowerCase()
      .includes(words);
  });
}

function drawRows() {
  const found = listed();
  const head = make("tr", {}, ...HEAD.map((text) =>
    make("th", { class: ["Budget", "Score", "Kept"].includes(text) ? "amount" : null }, text)));
  document.querySelector("#rows thead").replaceChildren(head);
  const body = found.slice(0, list.limit).map((row) => {
    const example = data.examples[row.example];
    const open = () => openRow(row);
    const said = row.error ? make("span", { class: "error" }, row.error) : predictions(row);
    return make("tr", {
      "data-row": row.number, tabindex: 0, class: row.number === list.chosen ? "chosen" : null, onclick: open,
      onkeydown: (event) => { if (event.key === "Enter") open(); },
    },
    make("td", { class: "id" }, example.example, make("small", {}, `${example.task} · ${example.length}`)),
    make("td", {}, nameOf(row.method)), make("td", { class: "amount" }, labelOf(row)),
    make("td", { class: "amount" }, row.error ? "failed" : valueOf(row)),
    make("td", { class: "amount" }, shareOf(row)), make("td", { class: "excerpt" }, said));
  });
  document.querySelector("#rows tbody").replaceChildren(...body);
  byId("count").textContent = `${found.length} result${found.length === 1 ? "" : "s"}, protocol ${state.protocol}`;
  byId("more").hidden = found.length <= list.limit;
}

// Places where a text may be cut: ends of the bins, and ends of the answers that stand in it.
function segments(text, shares, answers) {
  const cuts = new Set([0, text.length]);
  const ends = shares.map((_, i) => Math.round(((i + 1) * text.length) / shares.length));
  const marks = [];
  for (const answer of answers.filter((each) => each.length > 1)) {
    for (let at = text.indexOf(answer); at >= 0 && marks.length < 200; at = text.indexOf(answer, at + answer.length)) {
      marks.push([at, at + answer.length]);
    }
  }
  for (const at of [...ends, ...marks.flat()]) {
    const low = text.charCodeAt(at);
    cuts.add(low >= 0xdc00 && low <= 0xdfff ? at + 1 : at); // never within a character of two code units
  }
  const places = [...cuts].sort((a, b) => a - b);
  return places.slice(1).map((end, i) => ({
    text: text.slice(places[i], end),
    bin: Math.min(shares.length - 1, ends.filter((each) => each <= places[i]).length),
    answer: marks.some(([from, to]) => from <= places[i] && end <= to),
  }));
}

function contextOf(row, example) {
  if (example.context === null) {
    return [make("p", { class: "quiet" }, "The texts of this example are left out of the page (--text-limit).")];
  }
  const shares = [...(row.kept ?? "")].map((digit) => parseInt(digit, 36) / 35);
  const box = make("pre", { class: "context" });
  const answers = example.queries.flatMap((query) => query.answers);
  const text = data.contexts[example.context];
  if (!shares.length) {
    box.append(text);
    return [make("h3", {}, "Context"), box];
  }
  const starts = [];
  for (const { text: part, bin, answer } of segments(text, shares, answers)) {
    const title = `${Math.round(100 * shares[bin])} % kept`;
    const span = make("span", { style: `--share:${shares[bin]}`, title, class: answer ? "answer" : null }, part);
    starts[bin] ??= span;
    box.append(span);
  }
  const strip = make("div", { class: "strip" }, ...shares.map((share, bin) => make("button", {
    type: "button", style: `--share:${share}`, title: `${Math.round(100 * share)} % kept`,
    "aria-label": `part ${bin + 1} of ${shares.length}: ${Math.round(100 * share)} % kept`,
    onclick: () => { if (starts[bin]) box.scrollTop = starts[bin].offsetTop - 20; },
  })));
  const legend = make("p", { class: "quiet" }, "Share of positions kept, mean over heads: 0 ",
    make("span", { class: "scale" }), ` 100 %, in ${shares.length} equal parts of the prompt; answers are underlined.`);
  return [make("h3", {}, "Context"), legend, strip, box];
}

function pairsOf(row, example) {
  return example.queries.map((query, i) => {
    const answer = row.answers?.[i];
    const scores = Object.entries(answer?.scores ?? {}).map(([name, value]) => `${name} ${Number(value.toPrecision(4))}`);
    const pre = (text) => make("pre", {}, text);
    return make("div", { class: "pair" },
      make("span", {}, "Question"), pre(query.text.trim() || "–"),
      ...(query.prefix ? [make("span", {}, "Begun with"), pre(query.prefix)] : []),
      make("span", {}, "Prediction"),
      answer ? make("pre", { class: "prediction" }, answer.prediction) : make("span", {}, "–"),
      make("span", {}, "Gold"), make("pre", { class: "gold" }, query.answers.join("\n") || "–"),
      make("span", {}, "Scores"), make("span", {}, `${scores.join(", ") || "–"} (${query.metric})`));
  });
}

function openRow(row) {
  list.chosen = row.number;
  const example = data.examples[row.example];
  const setup = data.setups[row.setup];
  const fact = (name, value) => make("span", {}, `${name} `, make("b", {}, value));
  const facts = make("div", { class: "facts" }, fact("model", modelOf(setup)), fact("protocol", setup.protocol),
    fact("task", example.task), fact("length", example.length),
    ...Object.entries(example.info).map(([name, value]) => fact(name, typeof value === "string" ? value : JSON.stringify(value))),
    ...(row.error ? [] : [fact("prompt", `${row.prompt_tokens} tokens`),
      fact("kept", `${Math.round(row.kept_tokens)} per head`), fact("bytes", `${(100 * row.ratio).toFixed(1)} % of full`)]));
  const siblings = data.rows.filter((each) => each.setup === row.setup && each.example === row.example && shown(each));
  const others = make("div", { class: "others", role: "group", "aria-label": "the same example under" });
  for (const method of new Set(siblings.map((each) => each.method))) {
    const buttons = siblings.filter((each) => each.method === method).map((each) =>
      make("button", { type: "button", "aria-current": String(each === row), onclick: () => openRow(each) },
        `${method === "full" ? "" : `${labelOf(each)}: `}${each.error ? "failed" : valueOf(each)}`));
    others.append(nameOf(method), make("div", {}, ...buttons));
  }
  const heading = make("h3", {}, `${example.example} · ${row.method}${row.method === "full" ? "" : `, ${labelOf(row)}`}`);
  byId("panel").replaceChildren(heading, facts, others,
    ...(row.error ? [make("p", { class: "error" }, row.error)] : []),
    ...contextOf(row, example), ...pairsOf(row, example));
  const box = document.querySelector("#panel .context");
  const answer = box?.querySelector(".answer");
  if (answer) box.scrollTop = answer.offsetTop - 90;
  for (const line of document.querySelectorAll("#rows tbody tr")) {
    line.classList.toggle("chosen", Number(line.dataset.row) === row.number);
  }
  if (matchMedia("(max-width: 1119px)").matches) byId("panel").scrollIntoView({ block: "start" });
}

function startExamples() {
  const again = () => { list.limit = PAGE; drawRows(); };
  byId("search").addEventListener("input", again);
  byId("outcome").addEventListener("change", again);
  byId("more").addEventListener("click", () => { list.limit += 5 * PAGE; drawRows(); });
}
