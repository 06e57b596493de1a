// What is drawn where.
const groups = (rows, key) => {
  const found = new Map();
  for (const row of rows) {
    if (!found.has(row[key])) found.set(row[key], []);
    found.get(row[key]).push(row);
  }
  return found;
};
for (const name of unique((table("curves") || { arm: [] }).arm)) styleOf(name);

function drawCurves() {
  const host = byId("chart-curves"), wide = byId("chart-frontier");
  if (!host) return;
  const rows = rowsOf("curves"), arms = groups(rows, "arm"), gold = DATA.gold, start = rows.find((row) => row.step === 0);
  const tell = (name, row) => `${name}\nforget score ${short(row.forget)}\nutility ${short(row.utility)}`;
  const target = DATA.target === null ? null : { at: DATA.target, text: "← forgotten", origin: DATA.target_origin };
  const known = (p) => p && p.forget !== null && p.utility !== null;
  const along = (x, y) => Array.from(arms, ([name, own]) => ({ name, points: own.filter((r) => r[x] !== null && r[y] !== null).map((r) => [r[x], r[y], tell(`${titleOf(name)}, step ${r.step}`, r)]) }));
  const frontier = Array.from(arms, ([name, own]) => ({ name, points: own.filter(known).map((r) => [r.forget, r.utility, tell(`${titleOf(name)}, step ${r.step}`, r), r.step]) }));
  if (known(gold)) frontier.push({ name: gold.name, label: `${gold.name} (never saw it)`, dots: true, points: [[gold.forget, gold.utility, tell(`${gold.name} (never saw the text to forget)`, gold)]] });
  if (known(start)) frontier.push({ name: "original", dots: true, points: [[start.forget, start.utility, tell("original model", start)]] });
  // The last third of the way to the target, and what lies beyond.
  const most = target && known(start) ? target.at + (start.forget - target.at) / 3 : Infinity;
  const near = rows.filter((row) => row.step > 0 && known(row) && row.forget <= most);
  const zoom = near.length > arms.size && [near.map((r) => r.forget).concat(known(gold) ? gold.forget : [], target ? target.at : []), near.map((r) => r.utility).concat(known(gold) ? gold.utility : [])];
  const chart = { series: frontier, x: "forget score, 0 … 1 (← more forgotten)", y: "utility, 0 … 1 (more kept →)", vline: target, padX: 0.06, alwaysLegend: true };
  lineChart(wide, { ...chart, title: zoom ? "Where it happens" : "Utility against forgetting", note: `numbers: steps; further left: more forgotten; higher: more kept${target ? `; dashed: ${target.origin}` : ""}`, domain: zoom || null, height: 440 });
  if (zoom) lineChart(host, { ...chart, title: "The whole way", note: "from the original model on" });
  lineChart(host, { title: "Utility by step", series: along("step", "utility"), x: "step", y: "utility, 0 … 1" });
  lineChart(host, { title: "Forget score by step", series: along("step", "forget"), x: "step", y: "forget score, 0 … 1", hline: target && { at: target.at, text: "target" } });
}

function drawDrift() {
  const host = byId("chart-drift");
  if (!host) return;
  const note = "share of the original's experts still selected; 1 = unchanged";
  for (const corpus of ["forget", "retain"]) {
    const rows = rowsOf("drift").filter((row) => row.corpus === corpus);
    const series = Array.from(groups(rows, "model"), ([name, own]) => ({ name, points: own.filter((row) => row.overlap !== null).map((row) => [row.layer, row.overlap]) }));
    if (series.length) lineChart(host, { title: `Expert overlap on ${corpus} text`, note, series, x: "layer", y: "overlap, 0 … 1", wholeX: true, oneY: true, alwaysLegend: true });
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
    byId("item-count").textContent = `${matching.length} question${matching.length === 1 ? "" : "s"}` + (DATA.thinned ? ` (${DATA.thinned})` : "");
    more.hidden = matching.length <= shown;
  }
  for (const control of [task, differ, search]) control.addEventListener("input", () => { shown = 12; draw(); });
  more.addEventListener("click", () => { shown += 50; draw(); });
  draw();
}

// A word of the glossary leads there, and shows its meaning on hover, at its first place in each section.
function explainWords() {
  const words = new Map(Array.from(document.querySelectorAll("#words dt"), (node) => [node.textContent.toLowerCase(), node]));
  const pattern = new RegExp(`(?<![\\w-])(?:${Array.from(words.keys()).join("|")})(?=s?(?![\\w-]))`, "i");
  for (const section of document.querySelectorAll("main > section:not(#words)")) {
    const left = new Set(words.keys());
    for (const host of section.querySelectorAll(".verdict, dt, dd > b, dd > span, .facts dd, section > p, figcaption, .legend li, thead th, h3 small, .hint")) {
      const walker = document.createTreeWalker(host, NodeFilter.SHOW_TEXT);
      for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const match = pattern.exec(node.data), word = match && match[0].toLowerCase();
        if (!match || node.parentNode.closest("a, code, label, select")) continue;
        const place = node.splitText(match.index), rest = place.splitText(word.length);
        if (left.delete(word)) {
          const link = el("a", { class: "word", href: `#${words.get(word).id}`, title: words.get(word).nextElementSibling.textContent });
          place.replaceWith(link);
          link.append(place);
        }
        walker.currentNode = rest.previousSibling;
      }
    }
  }
}

drawCurves();
heatmaps(byId("chart-routing") || document.createElement("div"));
drawDrift();
drawItems();
drawCharts(document.body);
explainWords();
document.documentElement.dataset.ready = "true";
