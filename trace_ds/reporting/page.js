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
  const tell = (row, key) => `${titleOf(row.arm)}, step ${row.step}\nforget score ${short(row.forget)}\nutility ${short(row[key])}`;
  const target = DATA.target === null ? null : { at: DATA.target, text: "forgotten →", origin: DATA.target_origin };
  const wide = byId("chart-frontier");
  function draw() {
    const key = select.value;
    clearCharts(host);
    clearCharts(wide);
    const along = (x, y) => Array.from(arms, ([name, own]) => ({ name, points: own.filter((r) => r[x] !== null && r[y] !== null).map((r) => [r[x], r[y], tell(r, key)]) }));
    const frontier = along("forget", key).map((entry) => ({ ...entry, label: `${titleOf(entry.name)}, step ${arms.get(entry.name).at(-1).step}` })), gold = DATA.gold;
    const known = (p) => p && p.forget !== null && p[key] !== null && p[key] !== undefined;
    if (known(gold)) frontier.push({ name: "gold", label: "gold: never saw it", dots: true, points: [[gold.forget, gold[key], `gold model (never saw the forget set)\nforget score ${short(gold.forget)}\nutility ${short(gold[key])}`]] });
    const start = rows.find((row) => row.step === 0);
    if (known(start)) frontier.push({ name: "original", dots: true, points: [[start.forget, start[key], `original model\nforget score ${short(start.forget)}\nutility ${short(start[key])}`]] });
    const near = rows.filter((row) => row.step > 0 && row.forget !== null && row[key] !== null);
    const zoom = near.length > arms.size && [near.map((r) => r.forget).concat(known(gold) ? gold.forget : [], target ? target.at : []), near.map((r) => r[key]).concat(known(gold) ? gold[key] : [])];
    const chart = { series: frontier, x: "forget score (lower → more forgotten)", y: "utility", reverseX: true, vline: target, padX: 0.06, endLabels: arms.size < 5, alwaysLegend: true };
    lineChart(wide, { ...chart, title: zoom ? "Where it happens" : "Utility against forgetting", note: `further right: more forgotten; higher: more kept${target ? `; dashed: ${target.origin}` : ""}`, domain: zoom || null, height: 440 });
    if (zoom) lineChart(host, { ...chart, title: "The whole way", note: "from the original model on", endLabels: false });
    lineChart(host, { title: "Utility by step", series: along("step", key), x: "step", y: "utility" });
    lineChart(host, { title: "Forget score by step", series: along("step", "forget"), x: "step", y: "forget score", hline: target && { at: target.at, text: "target" } });
    drawCharts(wide);
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

// One row per question, one column per model.
function drawItems() {
  const host = byId("item-table");
  if (!host) return;
  const questions = rowsOf("items"), tasks = new Map(questions.map((row) => [row.task, row.role]));
  const models = Object.keys(questions[0]).filter((key) => `${key} score` in questions[0]);
  const task = byId("item-task"), search = byId("item-search"), differ = byId("item-differ"), more = byId("item-more");
  for (const [name, role] of tasks) task.append(el("option", { value: name }, `${name} (${role})`));
  const differs = (row) => models.some((name) => row[name] !== row[models[0]] || row[`${name} score`] !== row[`${models[0]} score`]);
  let shown = 12;
  function draw() {
    const words = search.value.toLowerCase();
    const matching = questions.filter((row) => row.task === task.value && (!differ.checked || differs(row)) && [row.text, row.id, ...models.map((name) => row[name] || "")].join(" ").toLowerCase().includes(words));
    const head = el("tr", {}, ...["question", ...models.map(titleOf)].map((name) => el("th", { scope: "col" }, name)));
    const body = matching.slice(0, shown).map((row) => el("tr", {}, el("td", { class: "text" }, row.text || row.id), ...models.map((name) => {
      const score = row[`${name} score`], said = row[name];
      const mark = score === null ? "" : said === null || !(score === 1 || score === 0) ? short(score) + " " : score ? "✓ right " : "✗ wrong ";
      return said === null && score === null ? el("td", {}, "–") : el("td", {}, mark, el("small", {}, said || ""));
    })));
    host.replaceChildren(el("thead", {}, head), el("tbody", {}, ...body));
    const thinned = DATA.tables.items.thinned;
    byId("item-count").textContent = `${matching.length} question${matching.length === 1 ? "" : "s"}` + (thinned ? ` (${thinned}; all are in the CSV file)` : "");
    more.hidden = matching.length <= shown;
  }
  for (const control of [task, differ, search]) control.addEventListener("input", () => { shown = 12; draw(); });
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
