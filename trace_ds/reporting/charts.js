// Basics: data, elements, formats, tooltip, downloads. Text only ever enters the page as textContent.
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const redraws = [];

const table = (name) => DATA.tables[name];

function rowsOf(name) {
  const columns = table(name);
  if (!columns) return [];
  const keys = Object.keys(columns);
  const count = keys.length ? columns[keys[0]].length : 0;
  const rows = [];
  for (let i = 0; i < count; i++) {
    const row = {};
    for (const key of keys) row[key] = columns[key][i];
    rows.push(row);
  }
  return rows;
}

function unique(values) { return Array.from(new Set(values)); }

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  for (const child of children) node.append(child);
  return node;
}

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Numbers for people, three significant digits.
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("+", "");
  if (size >= 100) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}
function percent(value) {
  if (value === null || value === undefined) return "–";
  return (100 * value).toFixed(Math.abs(value) < 0.0995 ? 2 : 1) + "%";
}
function times(log) { return log === null ? "–" : short(Math.exp(log)) + "×"; }

// Round steps for an axis.
function ticks(low, high, count) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / Math.max(1, count);
  const power = Math.pow(10, Math.floor(Math.log10(rough)));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) {
    found.push(Number(v.toPrecision(12)));
  }
  return found;
}

// Tooltip: near the pointer, or near the focused chart when the keyboard moves.
const tip = byId("tip");
let tipAnchor = null;
function keepTip(text, anchor) { // anchor: where on the screen the point is now, also after scrolling
  showTip(text, ...anchor());
  tipAnchor = anchor;
}
function showTip(text, x, y) {
  tipAnchor = null;
  tip.hidden = false;
  if (tip.textContent !== text) tip.textContent = text;
  placeTip(x, y);
}
function placeTip(x, y) {
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - box.width - 12 : x + 14;
  const top = y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 16;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, top) + "px";
}
// A finger has no hover: a tap shows the tip, and it stays when the finger goes.
function onPoint(node, show, leave) {
  node.addEventListener("pointermove", show);
  node.addEventListener("pointerdown", show);
  node.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); });
  node.addEventListener("blur", leave);
}
function hideTip() { tip.hidden = true; }
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
document.addEventListener("scroll", () => { if (tipAnchor) placeTip(...tipAnchor()); else hideTip(); }, { passive: true });

// Redraw when the width or the system's theme changes.
let pending = 0;
// Draws the charts of a box: only when all are there, since their number decides their width.
function drawCharts(host) { for (const draw of redraws) if (host.contains(draw.host)) draw(); }
function redraw() {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => { for (const draw of redraws) draw(); });
}
let lastWidth = innerWidth;
addEventListener("resize", () => { if (innerWidth !== lastWidth) { lastWidth = innerWidth; redraw(); } });

const systemDark = matchMedia("(prefers-color-scheme: dark)");
systemDark.addEventListener("change", redraw);

// Line charts as inline SVG, drawn at the size of their box so that text stays readable on phones. Not a library: inlined, those
// that we compared make the page larger (plotly basic 1,192 kB, vega 521, Plot with d3 490, Chart.js 210, uPlot 51; all of our
// script is 35), none reads points out by arrow keys, and colours of canvases and dragging on phones would have to be taught.
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "5 2", "1 4", "12 4", "4 4 1 4"];
const styles = new Map();

const FIXED = {
  "gold": { colour: "var(--s5)", dash: "2 3", marker: 3 },
  "retrained": { colour: "var(--s5)", dash: "2 3", marker: 3 },
  "original": { colour: "var(--s7)", dash: "", marker: 0 },
};

// A model keeps its colour, dash and marker in all charts. After the eighth, colours come again with hollow markers of
// another shape, and other dashes.
function styleOf(names) {
  const name = names.split(", ")[0]; // arms that share a calibration: the first one's style
  if (Object.hasOwn(FIXED, name)) return FIXED[name];
  if (!styles.has(name)) {
    const index = styles.size, round = Math.floor(index / 8);
    const dash = DASHES[(index + 3 * round) % DASHES.length];
    styles.set(name, { colour: `var(--s${index % 8})`, dash, marker: (index + round) % 4, hollow: round % 2 === 1 });
  }
  return styles.get(name);
}

function marker(x, y, style, size) {
  const r = size || 4;
  const shapes = [
    () => svg("circle", { cx: x, cy: y, r }),
    () => svg("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r }),
    () => svg("path", { d: `M${x} ${y - r * 1.3}L${x + r * 1.2} ${y + r}L${x - r * 1.2} ${y + r}Z` }),
    () => svg("path", { d: `M${x} ${y - r * 1.4}L${x + r * 1.4} ${y}L${x} ${y + r * 1.4}L${x - r * 1.4} ${y}Z` }),
  ];
  const node = shapes[style.marker]();
  node.setAttribute("fill", style.hollow ? "var(--card)" : style.colour);
  if (style.hollow) {
    node.setAttribute("stroke", style.colour);
    node.setAttribute("stroke-width", 2);
  }
  return node;
}

// What people read instead of a model's label.
function titleOf(names) { return names.split(", ").map((name) => (DATA.names || {})[name] || name).join(", "); }

function legend(series) {
  const list = el("ul", { class: "legend" });
  for (const { name, label } of series) {
    const style = styleOf(name);
    const key = svg("svg", { viewBox: "0 0 30 12", height: 12, "aria-hidden": "true" });
    key.append(svg("line", { x1: 0, x2: 30, y1: 6, y2: 6, stroke: style.colour, "stroke-width": 2.5, "stroke-dasharray": style.dash }));
    key.append(marker(15, 6, style, 4));
    const item = el("li");
    item.append(key, label || titleOf(name));
    list.append(item);
  }
  return list;
}

function figure(host, title, note) {
  const node = el("figure");
  const caption = el("figcaption", {}, title);
  if (note) caption.append(el("small", {}, note));
  node.append(caption);
  host.append(node);
  return node;
}

let clips = 0;

// options: title, note, series [{name, label, points: [[x, y, text, step]]}], x, y (labels), vline/hline {at, text}, oneY, height,
// domain [[x0, x1], [y0, y1]] (what lies outside is cut); points with a step have it beside them, and arrows between them
function lineChart(host, options) {
  const node = figure(host, options.title, options.note);
  const series = options.series.filter((entry) => entry.points.length);
  const summary = `${options.title}. ` + series.map((entry) => {
    const first = entry.points[0];
    const last = entry.points[entry.points.length - 1];
    return `${titleOf(entry.name)}: ${short(first[1])} at ${short(first[0])}, ${short(last[1])} at ${short(last[0])}`;
  }).join("; ") + ". Use the left and right arrow keys to read points, up and down to change the line.";
  const drawing = svg("svg", { role: "application", "aria-label": summary, tabindex: 0, "aria-roledescription": "chart" });
  node.append(drawing);
  const all = series.flatMap((entry) => entry.points);
  if (!all.length) return;
  const range = (values, pad) => {
    let low = Math.min(...values), high = Math.max(...values);
    if (high - low < 1e-12) { const extra = Math.abs(low) * 0.05 || 0.5; low -= extra; high += extra; }
    return [low - pad * (high - low), high + pad * (high - low)];
  };
  const extraX = options.vline ? [options.vline.at] : [];
  const extraY = (options.hline ? [options.hline.at] : []).concat(options.oneY ? [1] : []);
  const domain = options.domain || [all.map((p) => p[0]).concat(extraX), all.map((p) => p[1]).concat(extraY)];
  const [x0, x1] = range(domain[0], options.padX || 0.02);
  const [y0, y1] = range(domain[1], 0.05);
  const inside = (p) => p[0] >= x0 && p[0] <= x1 && p[1] >= y0 && p[1] <= y1;
  if (series.length > 1 || options.alwaysLegend) node.append(legend(series.filter((entry) => entry.points.some(inside))));
  const clip = `clip-${clips++}`;
  let placed = [];
  let cursor = null;
  let chosen = { line: 0, point: -1 };

  function draw() {
    const width = Math.max(260, node.clientWidth), height = Math.round(Math.min(options.height || 270, Math.max(210, width * 0.7)));
    const yTicks = ticks(y0, y1, 5);
    const left = Math.max(58, 32 + 7 * Math.max(...yTicks.map((v) => short(v).length))), right = 12, top = 10, bottom = 42;
    drawing.replaceChildren();
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.setAttribute("height", height);
    const px = (v) => left + (v - x0) / (x1 - x0) * (width - left - right);
    const py = (v) => height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom);
    const xTicks = ticks(x0, x1, width / 90).filter((v) => !options.wholeX || Number.isInteger(v));
    for (const v of yTicks) {
      const y = py(v);
      drawing.append(svg("line", { x1: left, x2: width - right, y1: y, y2: y, class: "axis" }));
      drawing.append(svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, short(v)));
    }
    for (const v of xTicks) {
      drawing.append(svg("text", { x: px(v), y: height - bottom + 17, "text-anchor": "middle" }, short(v)));
    }
    const middle = (top + height - bottom) / 2;
    drawing.append(svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle", class: "axis-x" }, options.x));
    drawing.append(svg("text", { x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})`, class: "axis-y" }, options.y));
    const guide = (attributes, text, x, y, anchor) => {
      drawing.append(svg("line", Object.assign({ stroke: "var(--soft)", "stroke-width": 1.5, "stroke-dasharray": "3 3" }, attributes)));
      drawing.append(svg("text", { x, y, "text-anchor": anchor }, text));
    };
    const room = svg("clipPath", { id: clip });
    room.append(svg("rect", { x: left, y: 0, width: width - left - right, height }));
    drawing.append(room);
    if (options.vline) {
      const x = px(options.vline.at), end = x > width / 2;
      drawing.append(svg("rect", { x: left, y: top, width: Math.max(0, x - left), height: height - bottom - top, class: "reached" }));
      guide({ x1: x, x2: x, y1: top, y2: height - bottom }, options.vline.text, x + (end ? -5 : 5), height - bottom - 6, end ? "end" : "start");
    }
    if (options.hline) {
      const y = py(options.hline.at);
      guide({ x1: left, x2: width - right, y1: y, y2: y }, options.hline.text, width - right - 2, y - 5, "end");
    }
    placed = series.map((entry) => entry.points.map((p) => [px(p[0]), py(p[1])]));
    series.forEach((entry, line) => {
      const style = styleOf(entry.name);
      if (!entry.dots) {
        const path = placed[line].map((p, i) => (i ? "L" : "M") + p[0].toFixed(1) + " " + p[1].toFixed(1)).join("");
        drawing.append(svg("path", { d: path, fill: "none", stroke: style.colour, "stroke-width": 2, "stroke-dasharray": style.dash, "stroke-linejoin": "round", "clip-path": `url(#${clip})` }));
      }
      const stride = Math.max(1, Math.ceil(entry.points.length / 24));
      placed[line].forEach((p, i) => { if (inside(entry.points[i]) && (i % stride === 0 || i === placed[line].length - 1)) drawing.append(marker(p[0], p[1], style, entry.points.length > 30 ? 2.6 : 4)); });
    });
    labelSteps();
    cursor = svg("circle", { r: 8, fill: "none", stroke: "var(--ink)", "stroke-width": 2, visibility: "hidden" });
    drawing.append(cursor);
  }
  // Which way a line goes, and the steps of its points where there is room, of the last ones first.
  function labelSteps() {
    const taken = [], points = series.flatMap((entry, line) => entry.points.map((p, i) => [entry, line, p, i]));
    const last = ([entry, , , i]) => i === entry.points.length - 1;
    for (const [entry, line, p, i] of points.filter(last).concat(points.filter((point) => !last(point)))) {
      const [x, y] = placed[line][i], before = placed[line][i - 1];
      if (p[3] === undefined || !inside(p)) continue;
      if (before && inside(entry.points[i - 1]) && Math.hypot(x - before[0], y - before[1]) > 26) {
        const angle = Math.atan2(y - before[1], x - before[0]) * 180 / Math.PI;
        drawing.append(svg("path", { d: "M-4 -4L4 0L-4 4", transform: `translate(${(x + before[0]) / 2} ${(y + before[1]) / 2}) rotate(${angle})`, fill: "none", stroke: styleOf(entry.name).colour, "stroke-width": 2, class: "way" }));
      }
      if (taken.some((other) => Math.abs(other[0] - x) < 26 && Math.abs(other[1] - y) < 13)) continue;
      taken.push([x, y]);
      drawing.append(svg("text", { x: x + 6, y: y - 6, class: "step", color: styleOf(entry.name).colour }, String(p[3])));
    }
  }
  function say(line, point, where) {
    const entry = series[line], p = entry.points[point], place = placed[line][point];
    chosen = { line, point };
    cursor.setAttribute("cx", place[0]);
    cursor.setAttribute("cy", place[1]);
    cursor.setAttribute("visibility", "visible");
    const text = p[2] || `${titleOf(entry.name)}\n${options.x}: ${short(p[0])}\n${options.y}: ${short(p[1])}`;
    if (where) return showTip(text, ...where);
    keepTip(text, () => {
      const box = drawing.getBoundingClientRect();
      return [box.left + place[0], box.top + place[1]];
    });
  }
  function leave() { hideTip(); if (cursor) cursor.setAttribute("visibility", "hidden"); }
  onPoint(drawing, (event) => {
    const box = drawing.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    let best = null;
    placed.forEach((points, line) => points.forEach((p, i) => {
      const d = Math.hypot(p[0] - x, p[1] - y);
      if (!best || d < best[0]) best = [d, line, i];
    }));
    if (best) say(best[1], best[2], [event.clientX, event.clientY]);
  }, leave);
  drawing.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    const line = (chosen.line + move[0] + series.length) % series.length;
    const point = Math.min(series[line].points.length - 1, Math.max(0, chosen.point + move[1]));
    say(line, point);
  });
  draw.host = node;
  redraws.push(draw);
}

// Layer × expert maps: three linked maps that share a cursor, by pointer or by arrow keys. A map is a canvas of one pixel a
// cell, which the style sheet stretches; marks and cursor are an SVG over it, so that moving paints nothing anew.
const CIVIDIS = [[0, 32, 76], [0, 42, 102], [39, 60, 108], [75, 77, 109], [105, 95, 111], [124, 113, 119], [148, 133, 117], [177, 155, 106], [207, 180, 88], [238, 206, 60], [255, 234, 70]];
const DIVERGING_LIGHT = [[5, 72, 138], [46, 122, 186], [122, 178, 220], [196, 222, 241], [247, 247, 245], [252, 220, 186], [248, 172, 103], [221, 114, 28], [153, 64, 0]];
const DIVERGING_DARK = [[140, 205, 255], [86, 160, 220], [48, 104, 158], [32, 60, 90], [28, 32, 38], [92, 56, 22], [166, 88, 20], [230, 135, 45], [255, 190, 120]];

function ramp(stops, t) {
  const place = Math.min(0.999999, Math.max(0, t)) * (stops.length - 1);
  const i = Math.floor(place), f = place - i;
  return stops[i].map((c, k) => Math.round(c + (stops[i + 1][k] - c) * f));
}

function heatmaps(host) {
  const L = DATA.layers, E = DATA.experts, T = table("routing");
  if (!T || !L || !E) return;
  const finite = (values) => values.filter((v) => v !== null), wide = E > 32;
  host.classList.add(wide ? "wide" : "narrow");
  // A few very busy experts must not darken all others: colours saturate at the 99.5th percentile.
  const frequencies = finite(T.forget_frequency).concat(finite(T.retain_frequency)).sort((a, b) => a - b);
  const busiest = frequencies[frequencies.length - 1], usual = frequencies[Math.floor(0.995 * (frequencies.length - 1))];
  const largest = Math.max(1e-9, busiest > 1.5 * usual ? usual : busiest);
  const ratios = finite(T.log_ratio).map(Math.abs).sort((a, b) => a - b);
  const span = Math.max(Math.log(2), ratios.length ? ratios[Math.floor(0.99 * (ratios.length - 1))] : 0);
  const even = `even load ${percent(DATA.top_k / E)}`, diverging = () => systemDark.matches ? DIVERGING_DARK : DIVERGING_LIGHT;
  const share = { stops: () => CIVIDIS, place: (v) => v / largest, text: percent, ends: ["0", (largest < busiest ? "≥ " : "") + percent(largest)], note: `share of the tokens; ${even}` };
  const maps = [
    { key: "forget_frequency", title: "Forget text", ...share },
    { key: "retain_frequency", title: "Retain text", ...share },
    { key: "log_ratio", title: "Ratio forget / retain", stops: diverging, place: (v) => (v / span + 1) / 2, text: times, ends: [times(-span), "1×", times(span)], note: "blue: retain uses it more; orange: forget uses it more" },
  ].filter((map) => finite(T[map.key]).length);
  if (wide && maps.length === 3) maps.unshift(maps.pop()); // the ratio first, over the whole width
  let cursor = null; // {layer, column}: a column is an expert

  function describe(layer, expert) {
    const i = layer * E + expert;
    const decoder = T.decoder_layer[i] !== layer ? ` (decoder layer ${T.decoder_layer[i]})` : "";
    const lines = [`Layer ${layer}${decoder}, expert ${expert}` + (T.selected[i] ? " · forget-critical" : "")];
    for (const side of ["forget", "retain"]) {
      const p = T[side + "_frequency"][i], error = T[side + "_error"][i];
      if (p === null) continue;
      const band = error === null ? "" : ` [${percent(Math.max(0, p - 1.96 * error))}, ${percent(p + 1.96 * error)}]`;
      lines.push(`${side}: ${percent(p)}${band}, ${T[side + "_count"][i].toLocaleString("en")} of ${DATA.tokens[side].toLocaleString("en")} tokens`);
    }
    if (T.log_ratio[i] !== null) {
      const band = T.log_ratio_low[i] === null ? "" : ` [${times(T.log_ratio_low[i])}, ${times(T.log_ratio_high[i])}]`;
      lines.push(`ratio: ${times(T.log_ratio[i])}${band}`);
    }
    if (T.target[i] !== null && T.achieved[i] !== null && T.target[i] > 0) lines.push(`weighted retain: ${percent(T.achieved[i])}, target ${percent(T.target[i])}`);
    return lines.concat(even).join("\n");
  }

  const corner = (map, layer, column) => { // where on the screen the middle of a cell is
    const box = map.canvas.getBoundingClientRect();
    return [box.left + (column + 0.5) / E * box.width, box.top + (layer + 0.5) / L * box.height];
  };
  for (const map of maps) {
    const node = figure(host, map.title, map.note), top = T[map.key].indexOf(Math.max(...finite(T[map.key])));
    if (wide && map.key === "log_ratio") node.classList.add("span");
    map.canvas = el("canvas", {
      tabindex: 0, role: "application", "aria-roledescription": "heat map", width: E, height: L,
      "aria-label": `${map.title}: ${L} layers by ${E} experts. Largest: layer ${Math.floor(top / E)}, expert ${top % E}, ${map.text(T[map.key][top])}. Arrow keys read the cells.`,
    });
    map.canvas.style.height = `${Math.max(6, Math.min(44, 340 / L)) * L}px`;
    map.marks = svg("svg", { viewBox: `0 0 ${E} ${L}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    const plot = el("div", { class: "map" }, map.canvas, map.marks);
    map.bar = el("div", { class: "ramp" }, ...map.ends.map((text) => el("span", {}, text)));
    node.append(el("div", { class: "ends" }, `layer 0 … ${L - 1}, from top to bottom`), plot, el("div", { class: "ends" }, `expert 0 … ${E - 1}, from left to right`), map.bar);
    onPoint(map.canvas, (event) => {
      const box = map.canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left) / box.width * E), layer = Math.floor((event.clientY - box.top) / box.height * L);
      if (column < 0 || layer < 0 || column >= E || layer >= L) return leave();
      move(layer, column, [event.clientX, event.clientY]);
    }, leave);
    map.canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -E], End: [0, E] }[event.key];
      if (!step) return;
      event.preventDefault();
      const at = cursor ? [cursor.layer + step[0], cursor.column + step[1]] : [0, 0];
      const layer = Math.min(L - 1, Math.max(0, at[0])), column = Math.min(E - 1, Math.max(0, at[1]));
      move(layer, column, () => corner(map, layer, column));
    });
  }
  function move(layer, column, place) {
    cursor = { layer, column };
    for (const map of maps) for (const [name, value] of [["x", column], ["y", layer], ["visibility", "visible"]]) map.cursor.setAttribute(name, value);
    const text = describe(layer, column);
    if (typeof place === "function") keepTip(text, place);
    else showTip(text, ...place);
  }
  function leave() {
    hideTip();
    cursor = null;
    for (const map of maps) map.cursor.setAttribute("visibility", "hidden");
  }
  function draw() {
    for (const map of maps) {
      const ctx = map.canvas.getContext("2d"), image = ctx.createImageData(E, L), stops = map.stops();
      map.marks.replaceChildren();
      for (let l = 0; l < L; l++) {
        for (let c = 0; c < E; c++) {
          const i = l * E + c, value = T[map.key][i], paint = value === null ? [128, 128, 128] : ramp(stops, map.place(value));
          image.data.set([...paint, value === null ? 60 : 255], 4 * i);
          if (T.selected[i] && (!wide || map.key === "log_ratio")) {
            const bright = 0.299 * paint[0] + 0.587 * paint[1] + 0.114 * paint[2] > 140;
            map.marks.append(svg("rect", { x: c + 0.14, y: l + 0.14, width: 0.72, height: 0.72, stroke: bright ? "#111" : "#fff" }));
          }
        }
      }
      ctx.putImageData(image, 0, 0);
      map.cursor = svg("rect", { width: 1, height: 1, class: "cursor", visibility: "hidden" });
      map.marks.append(map.cursor);
      map.bar.style.backgroundImage = `linear-gradient(to right, ${stops.map((stop) => `rgb(${stop})`).join(", ")})`;
    }
  }
  draw.host = host;
  redraws.push(draw);
}
