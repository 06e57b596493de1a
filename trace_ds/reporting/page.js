// What is drawn where.
const groups = (rows, key) => {
  const found = new Map();
  for (const row of rows) {
    if (!found.has(row[key])) found.set(row[key], []);
    found.get(row[key]).push(row);
  }
  return found;
};
const points = (rows, x, y) => rows.filter((row) => row[x] !== null && row[y] !== null).map((row) => [row[x], row[y]]);
for (const name of unique([].concat(
  ...["curves", "weights", "weight_summary", "training"].map((key) => (table(key) || { arm: [] }).arm),
))) styleOf(name);

function drawCurves() {
  const host = byId("chart-curves");
  if (!host) return;
  const rows = rowsOf("curves"), arms = groups(rows, "arm"), select = byId("utility-metric");
  const metrics = Object.keys(table("curves")).filter((key) => key === "utility" || key.startsWith("utility_"));
  for (const key of metrics) select.append(el("option", { value: key }, key === "utility" ? "each task's first metric" : key.slice(8).replaceAll("_", " ")));
  const tell = (row, key) => `${row.arm} (${row.rule || "?"}), step ${row.step}\nforget score ${short(row.forget)}\nutility ${short(row[key])}`;
  const target = DATA.target === null ? null : { at: DATA.target, text: `target: ${DATA.target_origin}` };
  function draw() {
    const key = select.value;
    clearCharts(host);
    const along = (x, y) => Array.from(arms, ([name, own]) => ({ name, points: own.filter((r) => r[x] !== null && r[y] !== null).map((r) => [r[x], r[y], tell(r, key)]) }));
    const frontier = along("forget", key), gold = DATA.gold;
    if (gold && gold.forget !== null && gold[key] !== null && gold[key] !== undefined) {
      frontier.push({ name: "gold", dots: true, points: [[gold.forget, gold[key], `gold model (never saw the forget set)\nforget score ${short(gold.forget)}\nutility ${short(gold[key])}`]] });
    }
    lineChart(host, { title: "Utility against forgetting", note: "further right: more forgotten; higher: more kept", series: frontier, x: "forget score (lower → more forgotten)", y: "utility", reverseX: true, vline: target, alwaysLegend: true, padX: 0.04 });
    lineChart(host, { title: "Utility by step", series: along("step", key), x: "step", y: "utility" });
    lineChart(host, { title: "Forget score by step", series: along("step", "forget"), x: "step", y: "forget score", hline: target });
    drawCharts(host);
  }
  select.addEventListener("change", draw);
  draw();
}

function drawLayers() {
  const host = byId("chart-layers");
  const rows = rowsOf("layers");
  if (!host || rows.length < 2) return;
  const left = [{ name: "before weighting", points: points(rows, "layer", "js_bits") }, { name: "after weighting", points: points(rows, "layer", "js_weighted_bits") }];
  lineChart(host, { title: "Forget against retain by layer", note: "Jensen-Shannon divergence of the expert load, bits", series: left, x: "layer", y: "divergence", zeroY: true, wholeX: true });
  const entropy = [{ name: "forget text", points: points(rows, "layer", "forget_entropy_bits") }, { name: "retain text", points: points(rows, "layer", "retain_entropy_bits") }];
  lineChart(host, { title: "Entropy of the expert load by layer", note: `bits; even load ${short(Math.log2(DATA.experts))}`, series: entropy, x: "layer", y: "entropy", wholeX: true });
}

function drawWeights() {
  const host = byId("chart-weights");
  if (!host) return;
  const flat = new Set(rowsOf("weight_summary").filter((row) => row.max_weight < 1.001).map((row) => row.arm));
  const shown = rowsOf("weights").filter((row) => !flat.has(row.arm)); // all weights 1: the line at 1 says it
  const series = Array.from(groups(shown, "arm"), ([name, rows]) => ({
    name,
    points: rows.map((r) => [Math.sqrt(r.low * r.high), r.share, `${name}\nweights ${short(r.low)} to ${short(r.high)}\n${percent(r.share)} of the tokens (${r.tokens.toLocaleString("en")})`]),
  }));
  if (series.length) lineChart(host, { title: "Distribution of the weights", note: "share of the retain tokens per quarter octave", series, x: "weight (log scale)", y: "share of tokens", logX: true, zeroY: true, vline: { at: 1, text: "uniform" }, alwaysLegend: true });
  for (const [arm, rows] of groups(rowsOf("sources"), "arm")) {
    const sorted = rows.slice().sort((a, b) => b.weight_share - a.weight_share).slice(0, 16);
    pairChart(host, { title: `Where the weight went: ${arm}`, note: rows.length > 16 ? `the first 16 of ${rows.length} sources` : "by source of the retain text", labels: ["share of weight", "share of tokens"], rows: sorted.map((r) => ({ name: String(r.source), values: [r.weight_share, r.token_share] })) });
  }
}

function drawTraining() {
  const host = byId("chart-training");
  const columns = table("training");
  if (!host || !columns) return;
  const arms = groups(rowsOf("training"), "arm");
  for (const key of Object.keys(columns).filter((name) => name !== "arm" && name !== "step").slice(0, 8)) {
    const series = Array.from(arms, ([name, rows]) => ({ name, points: points(rows, "step", key) }));
    const varies = new Set(series.flatMap((entry) => entry.points.map((p) => p[1]))).size > 1;
    if (varies) lineChart(host, { title: key, series, x: "step", y: key });
  }
}

function drawDrift() {
  const host = byId("chart-drift");
  if (!host) return;
  const kinds = [["overlap", "share of the original's experts still selected; 1 = unchanged"], ["kl", "KL divergence of the experts' shares from the original's, nats"]];
  for (const [key, note] of kinds) {
    for (const corpus of ["forget", "retain"]) {
      const rows = rowsOf("drift").filter((row) => row.corpus === corpus && row[key] !== null);
      const series = Array.from(groups(rows, "model"), ([name, own]) => ({ name, points: points(own, "layer", key) }));
      if (series.length) lineChart(host, { title: `${key === "kl" ? "Load shift (KL)" : "Expert overlap"} on ${corpus} text`, note, series, x: "layer", y: key, wholeX: true, zeroY: key === "kl", oneY: key === "overlap", alwaysLegend: true });
    }
  }
}

// Forget questions: one row per question, one column per model.
function drawItems() {
  const host = byId("item-table");
  if (!host) return;
  const rows = rowsOf("items"), models = unique(rows.map((row) => row.model)), tasks = unique(rows.map((row) => row.task));
  const found = new Map();
  for (const row of rows) {
    const key = row.task + "\u0000" + row.id;
    if (!found.has(key)) found.set(key, { task: row.task, id: row.id, text: row.text, by: new Map() });
    found.get(key).by.set(row.model, row);
  }
  const questions = Array.from(found.values());
  const task = byId("item-task"), search = byId("item-search"), more = byId("item-more");
  for (const name of tasks) task.append(el("option", { value: name }, name));
  let shown = 12;
  function draw() {
    const words = search.value.toLowerCase();
    const matching = questions.filter((q) => q.task === task.value && (!words || [q.text, q.id, ...Array.from(q.by.values(), (r) => r.outcome || "")].join(" ").toLowerCase().includes(words)));
    const head = el("tr", {}, el("th", { scope: "col" }, "question"), ...models.map((name) => el("th", { scope: "col" }, name)));
    const body = matching.slice(0, shown).map((q) => el("tr", {}, el("td", { class: "text" }, q.text || q.id), ...models.map((name) => {
      const row = q.by.get(name);
      const cell = el("td");
      if (!row) { cell.append("–"); return cell; }
      if (row.score === 1 || row.score === 0) cell.append(el("span", { title: row.score ? "still knows" : "does not know" }, row.score ? "✓ knows " : "✗ no "));
      else if (row.score !== null) cell.append(short(row.score) + " ");
      if (row.outcome) cell.append(el("small", {}, row.outcome));
      return cell;
    })));
    host.replaceChildren(el("thead", {}, head), el("tbody", {}, ...body));
    const thinned = DATA.tables.items.thinned;
    byId("item-count").textContent = `${matching.length} question${matching.length === 1 ? "" : "s"}` + (thinned ? ` (${thinned})` : "");
    more.hidden = matching.length <= shown;
  }
  task.addEventListener("change", () => { shown = 12; draw(); });
  search.addEventListener("input", () => { shown = 12; draw(); });
  more.addEventListener("click", () => { shown += 50; draw(); });
  draw();
}

drawCurves();
heatmaps(byId("chart-routing") || document.createElement("div"));
drawLayers();
drawWeights();
drawTraining();
drawDrift();
drawItems();
drawCharts(document.body);
document.documentElement.dataset.ready = "true";
