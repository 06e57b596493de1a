// Layer × expert maps on canvas: three linked maps that share a cursor, by pointer or by arrow keys.
const CIVIDIS = [[0, 32, 76], [0, 42, 102], [39, 60, 108], [75, 77, 109], [105, 95, 111], [124, 113, 119], [148, 133, 117], [177, 155, 106], [207, 180, 88], [238, 206, 60], [255, 234, 70]];
const DIVERGING_LIGHT = [[5, 72, 138], [46, 122, 186], [122, 178, 220], [196, 222, 241], [247, 247, 245], [252, 220, 186], [248, 172, 103], [221, 114, 28], [153, 64, 0]];
const DIVERGING_DARK = [[140, 205, 255], [86, 160, 220], [48, 104, 158], [32, 60, 90], [28, 32, 38], [92, 56, 22], [166, 88, 20], [230, 135, 45], [255, 190, 120]];

function ramp(stops, t) {
  const place = Math.min(0.999999, Math.max(0, t)) * (stops.length - 1);
  const i = Math.floor(place), f = place - i;
  return stops[i].map((c, k) => Math.round(c + (stops[i + 1][k] - c) * f));
}
function rgb(parts) { return `rgb(${parts[0]},${parts[1]},${parts[2]})`; }
function inkOn(parts) { return 0.299 * parts[0] + 0.587 * parts[1] + 0.114 * parts[2] > 140 ? "#111" : "#fff"; }

function heatmaps(host) {
  const L = DATA.layers, E = DATA.experts, T = table("routing");
  if (!T || !L || !E) return;
  host.classList.add(E > 32 ? "wide" : "narrow");
  const finite = (values) => values.filter((v) => v !== null);
  const wide = E > 32;
  // A few very busy experts must not darken all others: colours saturate at the 99.5th percentile.
  const frequencies = finite(T.forget_frequency).concat(finite(T.retain_frequency)).sort((a, b) => a - b);
  const busiest = frequencies[frequencies.length - 1], usual = frequencies[Math.floor(0.995 * (frequencies.length - 1))];
  const largest = Math.max(1e-9, busiest > 1.5 * usual ? usual : busiest);
  const highest = (largest < busiest ? "≥ " : "") + percent(largest);
  const ratios = finite(T.log_ratio).map(Math.abs).sort((a, b) => a - b);
  const span = Math.max(Math.log(2), ratios.length ? ratios[Math.floor(0.99 * (ratios.length - 1))] : 0);
  const even = DATA.top_k / E;
  const orders = { index: [], ratio: [] };
  for (let l = 0; l < L; l++) {
    const plain = Array.from({ length: E }, (_, e) => e);
    orders.index.push(plain);
    const value = (e) => T.log_ratio[l * E + e] === null ? -Infinity : T.log_ratio[l * E + e];
    orders.ratio.push(plain.slice().sort((a, b) => value(b) - value(a) || a - b));
  }
  let order = orders.index;
  let cursor = null; // {layer, column}
  const share = (t) => ramp(CIVIDIS, t);
  const maps = [
    { key: "forget_frequency", title: "Forget text", scale: (v) => share(v / largest), text: percent, brief: (v) => (100 * v).toFixed(v < 0.0995 ? 1 : 0) + "%", low: "0", high: highest, ramp: share },
    { key: "retain_frequency", title: "Retain text", scale: (v) => share(v / largest), text: percent, brief: (v) => (100 * v).toFixed(v < 0.0995 ? 1 : 0) + "%", low: "0", high: highest, ramp: share },
    { key: "log_ratio", title: "Ratio forget / retain", scale: (v) => diverge((v / span + 1) / 2), text: times, brief: (v) => Number(Math.exp(v).toPrecision(2)) + "×", low: times(-span), middle: "1×", high: times(span), ramp: (t) => diverge(t) },
  ].filter((map) => finite(T[map.key]).length);
  if (wide && maps.length === 3) maps.unshift(maps.pop()); // the ratio first, over the whole width
  function diverge(t) { return ramp(isDark() ? DIVERGING_DARK : DIVERGING_LIGHT, t); }

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
    lines.push(`even load: ${percent(even)}`);
    return lines.join("\n");
  }

  for (const map of maps) {
    const node = figure(host, map.title, map.key === "log_ratio" ? "blue: retain uses it more; orange: forget uses it more" : `share of the tokens; even load ${percent(even)}`);
    const top = finite(T[map.key]).length ? T[map.key].indexOf(Math.max(...finite(T[map.key]))) : 0;
    map.canvas = el("canvas", {
      tabindex: 0, role: "application", "aria-roledescription": "heat map",
      "aria-label": `${map.title}: ${L} layers by ${E} experts. Largest: layer ${Math.floor(top / E)}, expert ${top % E}, ${map.text(T[map.key][top])}. Arrow keys read the cells.`,
    });
    if (wide && map.key === "log_ratio") node.classList.add("span");
    map.scaleCanvas = el("canvas", { "aria-hidden": "true" });
    node.append(map.canvas, map.scaleCanvas);
    map.node = node;
    onPoint(map.canvas, (event) => {
      const box = map.canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left - map.left) / map.cell[0]);
      const layer = Math.floor((event.clientY - box.top - map.top) / map.cell[1]);
      if (column < 0 || layer < 0 || column >= E || layer >= L) return leave();
      move(layer, column, [event.clientX, event.clientY]);
    }, leave);
    map.canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -E], End: [0, E] }[event.key];
      if (!step) return;
      event.preventDefault();
      const at = cursor || { layer: 0, column: 0 };
      const layer = Math.min(L - 1, Math.max(0, at.layer + (cursor ? step[0] : 0)));
      const column = Math.min(E - 1, Math.max(0, at.column + (cursor ? step[1] : 0)));
      move(layer, column, () => {
        const box = map.canvas.getBoundingClientRect();
        return [box.left + map.left + (column + 0.5) * map.cell[0], box.top + map.top + (layer + 0.5) * map.cell[1]];
      });
    });
  }
  function move(layer, column, place) {
    const changed = !cursor || cursor.layer !== layer || cursor.column !== column;
    cursor = { layer, column };
    if (changed) maps.forEach(overlay);
    const text = describe(layer, order[layer][column]);
    if (typeof place === "function") keepTip(text, place);
    else showTip(text, ...place);
  }
  function leave() {
    hideTip();
    if (cursor) { cursor = null; maps.forEach(overlay); }
  }

  // The cells are drawn once into a buffer; moving the cursor copies it and draws one frame.
  function paint(map) {
    const width = map.node.clientWidth;
    if (width < 80) return; // hidden, or the window is just changing
    map.left = 28;
    map.top = 2;
    const inner = width - map.left - 2;
    const cellHeight = Math.max(5, Math.min(34, Math.max(inner / E * 0.8, 400 / L > 34 ? 34 : 340 / L)));
    map.cell = [inner / E, cellHeight];
    const height = Math.ceil(map.top + L * cellHeight + 20);
    const scale = Math.min(3, devicePixelRatio || 1);
    map.buffer = document.createElement("canvas");
    for (const canvas of [map.canvas, map.buffer]) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    map.canvas.style.height = height + "px";
    const ctx = map.buffer.getContext("2d");
    ctx.scale(scale, scale);
    ctx.font = "11px system-ui, sans-serif";
    const soft = colour("soft"), empty = colour("empty"), values = T[map.key];
    const gap = map.cell[0] > 8 && cellHeight > 8 ? 1 : 0;
    const labels = map.cell[0] > 40 && cellHeight > 18;
    for (let l = 0; l < L; l++) {
      for (let c = 0; c < E; c++) {
        const i = l * E + order[l][c], value = values[i];
        const x = map.left + c * map.cell[0], y = map.top + l * cellHeight;
        const paintOf = value === null ? null : map.scale(value);
        ctx.fillStyle = paintOf ? rgb(paintOf) : empty;
        ctx.fillRect(x, y, map.cell[0] - gap + (gap ? 0 : 0.5), cellHeight - gap + (gap ? 0 : 0.5));
        if (labels && paintOf) {
          ctx.fillStyle = inkOn(paintOf);
          ctx.textAlign = "center";
          ctx.textBaseline = "middle";
          ctx.fillText(map.brief(value), x + map.cell[0] / 2, y + cellHeight / 2);
        }
        if (T.selected[i] && (!wide || map.key === "log_ratio")) mark(ctx, x, y, map.cell[0] - gap, cellHeight - gap, paintOf || [128, 128, 128], labels);
      }
    }
    ctx.fillStyle = soft;
    ctx.textBaseline = "middle";
    ctx.textAlign = "right";
    const everyLayer = Math.max(1, Math.ceil(14 / cellHeight)), niceLayer = [1, 2, 4, 5, 8, 10, 16, 20].find((n) => n >= everyLayer) || everyLayer;
    for (let l = 0; l < L; l += niceLayer) ctx.fillText(String(l), map.left - 6, map.top + (l + 0.5) * cellHeight);
    ctx.textAlign = "center";
    const everyExpert = Math.max(1, Math.ceil(26 / map.cell[0])), niceExpert = [1, 2, 4, 8, 16, 32, 64].find((n) => n >= everyExpert) || everyExpert;
    if (order === orders.index) {
      for (let e = 0; e < E; e += niceExpert) ctx.fillText(String(e), map.left + (e + 0.5) * map.cell[0], height - 9);
    } else {
      ctx.fillText("← higher ratio · experts · lower ratio →", map.left + inner / 2, height - 9);
    }
    overlay(map);
    legendBar(map, width, scale, soft);
  }
  // A forget-critical cell: a frame where there is room, a dot in small cells.
  function mark(ctx, x, y, w, h, under, framed) {
    ctx.strokeStyle = ctx.fillStyle = inkOn(under);
    if (framed || (w > 14 && h > 14)) {
      ctx.lineWidth = 2;
      ctx.strokeRect(x + 2, y + 2, w - 4, h - 4);
    } else {
      const r = Math.max(0.9, Math.min(w, h) * 0.22);
      ctx.beginPath();
      ctx.arc(x + w / 2, y + h / 2, r, 0, 7);
      ctx.fill();
    }
  }
  function overlay(map) {
    if (!map.buffer) return;
    const ctx = map.canvas.getContext("2d"), scale = Math.min(3, devicePixelRatio || 1);
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, map.canvas.width, map.canvas.height);
    ctx.drawImage(map.buffer, 0, 0);
    if (!cursor) return;
    ctx.scale(scale, scale);
    const column = cursor.column;
    ctx.strokeStyle = colour("focus");
    ctx.lineWidth = 2.5;
    ctx.strokeRect(map.left + column * map.cell[0] - 1, map.top + cursor.layer * map.cell[1] - 1, map.cell[0] + 2, map.cell[1] + 2);
  }
  function legendBar(map, width, scale, soft) {
    const canvas = map.scaleCanvas, height = 30, length = Math.min(220, width - map.left);
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = height + "px";
    const ctx = canvas.getContext("2d");
    ctx.scale(scale, scale);
    for (let x = 0; x < length; x++) {
      ctx.fillStyle = rgb(map.ramp(x / (length - 1)));
      ctx.fillRect(map.left + x, 4, 1.5, 9);
    }
    ctx.font = "11px system-ui, sans-serif";
    ctx.fillStyle = soft;
    ctx.textBaseline = "top";
    ctx.fillText(map.low, map.left, 16);
    ctx.textAlign = "center";
    if (map.middle) ctx.fillText(map.middle, map.left + length / 2, 16);
    ctx.textAlign = "right";
    ctx.fillText(map.high, map.left + length, 16);
  }
  const draw = () => maps.forEach(paint);
  const select = byId("order");
  if (select) {
    select.addEventListener("change", () => {
      order = orders[select.value] || orders.index;
      cursor = null;
      draw();
    });
  }
  draw.host = host;
  redraws.push(draw);
}
