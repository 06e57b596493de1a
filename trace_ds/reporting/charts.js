// Line charts as inline SVG, drawn at the size of their box so that text stays readable on phones. Not a library: inlined, those
// that we compared make the page larger (plotly basic 1,192 kB, vega 521, Plot with d3 490, Chart.js 210, uPlot 51; all of our
// script is 35), none reads points out by arrow keys, and colours of canvases and dragging on phones would have to be taught.
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "5 2", "1 4", "12 4", "4 4 1 4"];
const styles = new Map();

const FIXED = {
  "gold": { colour: "var(--s5)", dash: "2 3", marker: 3 },
  "forget text": { colour: "var(--s1)", dash: "", marker: 1 },
  "retain text": { colour: "var(--s0)", dash: "7 4", marker: 0 },
  "before weighting": { colour: "var(--s7)", dash: "7 4", marker: 0 },
  "after weighting": { colour: "var(--s2)", dash: "", marker: 2 },
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

function legend(names) {
  const list = el("ul", { class: "legend" });
  for (const name of names) {
    const style = styleOf(name);
    const key = svg("svg", { viewBox: "0 0 30 12", height: 12, "aria-hidden": "true" });
    key.append(svg("line", { x1: 0, x2: 30, y1: 6, y2: 6, stroke: style.colour, "stroke-width": 2.5, "stroke-dasharray": style.dash }));
    key.append(marker(15, 6, style, 4));
    const item = el("li");
    item.append(key, titleOf(name));
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

// options: title, note, series [{name, points: [[x, y, text]]}], x, y (labels), reverseX, logX, vline/hline {at, text}, zeroY, oneY,
// domain [[x0, x1], [y0, y1]] (what lies outside is cut), height, endLabels (each line's name at its last point instead of a legend)
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
  if (!options.endLabels && (series.length > 1 || options.alwaysLegend)) node.append(legend(series.map((entry) => entry.name)));
  const all = series.flatMap((entry) => entry.points);
  if (!all.length) return;
  const fx = options.logX ? Math.log10 : (v) => v;
  const range = (values, pad) => {
    let low = Math.min(...values), high = Math.max(...values);
    if (high - low < 1e-12) { const extra = Math.abs(low) * 0.05 || 0.5; low -= extra; high += extra; }
    return [low - pad * (high - low), high + pad * (high - low)];
  };
  const extraX = options.vline ? [fx(options.vline.at)] : [];
  const extraY = (options.hline ? [options.hline.at] : []).concat(options.zeroY ? [0] : [], options.oneY ? [1] : []);
  const domain = options.domain || [all.map((p) => fx(p[0])).concat(extraX), all.map((p) => p[1]).concat(extraY)];
  const [x0, x1] = range(domain[0], options.padX || 0.02);
  const [y0, y1] = range(domain[1], 0.05);
  const inside = (p) => fx(p[0]) >= x0 && fx(p[0]) <= x1 && p[1] >= y0 && p[1] <= y1;
  const clip = `clip-${clips++}`;
  let placed = [];
  let cursor = null;
  let chosen = { line: 0, point: -1 };

  function draw() {
    const width = Math.max(260, node.clientWidth), height = Math.round(Math.min(options.height || 270, Math.max(210, width * 0.7)));
    const yTicks = ticks(y0, y1, 5);
    const left = Math.max(44, 14 + 7 * Math.max(...yTicks.map((v) => short(v).length))), top = 10, bottom = 42;
    let right = 12;
    drawing.replaceChildren();
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.setAttribute("height", height);
    const px = (v) => { const t = (fx(v) - x0) / (x1 - x0); return left + (options.reverseX ? 1 - t : t) * (width - left - right); };
    const py = (v) => height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom);
    if (options.endLabels && width > 700) right = Math.max(12, ...series.filter((e) => inside(e.points.at(-1))).map((e) => px(e.points.at(-1)[0]) + 24 + 6.8 * (e.label || e.name).length - width)); // room for the names
    const unlog = (v) => options.logX ? Math.pow(10, v) : v;
    const xTicks = (options.logX ? decades(x0, x1) : ticks(x0, x1, width / 90)).filter((v) => !options.wholeX || Number.isInteger(v));
    for (const v of yTicks) {
      const y = py(v);
      drawing.append(svg("line", { x1: left, x2: width - right, y1: y, y2: y, class: "axis" }));
      drawing.append(svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, short(v)));
    }
    for (const v of xTicks) {
      const x = px(unlog(v));
      drawing.append(svg("text", { x, y: height - bottom + 17, "text-anchor": "middle" }, short(unlog(v))));
    }
    drawing.append(svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, options.x));
    const guide = (attributes, text, x, y, anchor) => {
      drawing.append(svg("line", Object.assign({ stroke: "var(--soft)", "stroke-width": 1.5, "stroke-dasharray": "3 3" }, attributes)));
      drawing.append(svg("text", { x, y, "text-anchor": anchor }, text));
    };
    const room = svg("clipPath", { id: clip });
    room.append(svg("rect", { x: left, y: 0, width: width - left - right, height }));
    drawing.append(room);
    if (options.vline) {
      const x = px(options.vline.at), end = x > width / 2;
      if (options.reverseX) drawing.append(svg("rect", { x, y: top, width: Math.max(0, width - right - x), height: height - bottom - top, class: "reached" }));
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
    if (options.endLabels) labelEnds(width - 8, height - bottom - 22);
    cursor = svg("circle", { r: 8, fill: "none", stroke: "var(--ink)", "stroke-width": 2, visibility: "hidden" });
    drawing.append(cursor);
  }
  // Names beside the last points, pushed apart where they would cover each other.
  function labelEnds(edge, floor) {
    const labels = series.map((entry, line) => {
      const [x, y] = placed[line][placed[line].length - 1], text = edge > 500 && entry.label || titleOf(entry.name), last = entry.points[entry.points.length - 1];
      return { x, y: y + 4, text, name: entry.name, start: x + 12 + 6.8 * text.length < edge, shown: inside(last) };
    }).filter((label) => label.shown).sort((a, b) => a.y - b.y);
    labels.forEach((label, i) => { for (const other of labels.slice(0, i)) if (label.y - other.y < 15) label.y = other.y + 15; });
    for (const label of labels) label.y = Math.min(label.y, floor);
    for (const label of labels) drawing.append(svg("text", { x: label.x + (label.start ? 9 : -9), y: label.y, "text-anchor": label.start ? "start" : "end", class: "name" }, label.text));
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

function decades(low, high) {
  const found = [];
  for (let v = Math.ceil(low - 1e-9); v <= high + 1e-9; v++) found.push(v);
  return found.length > 1 ? found : ticks(low, high, 3);
}
