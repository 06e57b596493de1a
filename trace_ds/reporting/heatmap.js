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
  const even = `even load ${percent(DATA.top_k / E)}`, diverging = () => isDark() ? DIVERGING_DARK : DIVERGING_LIGHT;
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
