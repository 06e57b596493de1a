// The charts of a study: curves and seeds of the methods, for one loss, one kind of strength and one metric at a time.
function drawStudy() {
  const host = byId("chart-study");
  if (!host) return;
  const curves = rowsOf("frontier_mean"), seeds = rowsOf("by_seed").filter((row) => row.at === "post");
  const selects = ["loss", "strength", "metric"].map(byId);
  for (const select of selects) for (const name of unique(curves.map((row) => row[select.id]))) select.append(el("option", { value: name }, name));
  byId("strength").selectedIndex = byId("strength").options.length - 1; // everything tuned
  styleOf(DATA.baseline);
  const methods = unique(curves.map((row) => row.method));
  const chosen = (rows) => rows.filter((row) => selects.every((select) => row[select.id] === select.value));
  const along = (rows, points) => methods.map((name) => ({ name, points: points(rows.filter((row) => row.method === name), name) }));
  function draw() {
    clearCharts(host);
    const tell = (name, row) => `${name}, step ${row.step} (${row.seeds} seeds)\n${DATA.forget}: ${short(row.forget)}\n${byId("metric").value}: ${short(row.utility)}`;
    const frontier = along(chosen(curves), (rows, name) => rows.map((row) => [row.forget, row.utility, tell(name, row)]));
    lineChart(host, { title: "Utility against forgetting", note: "mean over seeds; further right: more forgotten", series: frontier, x: DATA.forget, y: byId("metric").value, reverseX: true, vline: { at: DATA.target, text: "mean target" }, alwaysLegend: true, padX: 0.04 });
    const told = (name, row) => `${name}, seed ${row.seed}\n${short(row.value)} from step ${row.step}\n${DATA.baseline}: ${short(row.baseline)} from step ${row.baseline_step}`;
    const pairs = along(chosen(seeds), (rows, name) => rows.map((row) => [row.seed, row.value, told(name, row)])).map((entry) => ({ ...entry, dots: true }));
    lineChart(host, { title: "Utility at matched forgetting by seed", note: "mean from the first step at the target to the last", series: pairs, x: "seed", y: byId("metric").value, wholeX: true, alwaysLegend: true, padX: 0.06 });
    drawCharts(host);
  }
  for (const select of selects) select.addEventListener("change", draw);
  draw();
}

drawStudy();
document.documentElement.dataset.ready = "true";
