// Puts the page together.

function drawAll() {
  byId("protocol-note").replaceChildren(make("b", {}, `Protocol ${state.protocol}: `), data.meaning[state.protocol], ".");
  list.limit = PAGE;
  drawFigures();
  drawRows();
}

function drawAbout() {
  const failed = data.rows.filter((row) => row.error).length;
  const protocols = new Set(data.setups.map((setup) => setup.protocol));
  byId("summary").textContent = `${data.rows.length} results on ${data.examples.length} examples, ${failed} failed; `
    + `protocol${protocols.size > 1 ? "s" : ""} ${[...protocols].join(", ")}`;
  byId("sweeps").replaceChildren(...Object.entries(data.sweeps).map(([folder, about]) =>
    make("details", {}, make("summary", {}, folder), make("pre", {}, JSON.stringify(about, null, 2)))));
}

drawAbout();
startFilters(drawAll);
startExamples();
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawFigures);
