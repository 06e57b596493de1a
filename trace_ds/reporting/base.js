// Basics: data, elements, formats, theme, tooltip, downloads. Text only ever enters the page as textContent.
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const redraws = [];

function table(name) {
  const found = DATA.tables[name];
  return found ? found.columns : null;
}

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

// Downloads from the embedded tables, so that they work when the page is moved without its folder.
function csvText(columns) {
  const quote = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value !== "string") return value === true ? "True" : value === false ? "False" : String(value);
    const safe = /^[=+\-@\t\r]/.test(value) ? "'" + value : value;
    return /[",\n\r]/.test(safe) ? '"' + safe.replace(/"/g, '""') + '"' : safe;
  };
  const keys = Object.keys(columns);
  const lines = [keys.map(quote).join(",")];
  for (let i = 0; i < columns[keys[0]].length; i++) lines.push(keys.map((key) => quote(columns[key][i])).join(","));
  return lines.join("\n") + "\n";
}
for (const link of document.querySelectorAll("a[data-csv]")) {
  const found = DATA.tables[link.dataset.csv];
  if (!found) continue;
  if (found.thinned) {
    link.title = "The file beside the page; the page itself holds " + found.thinned;
    continue;
  }
  link.addEventListener("click", () => {
    link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(csvText(found.columns));
  });
}

// Redraw when the width or the theme changes.
let pending = 0;
// Draws the charts of a box: only when all are there, since their number decides their width.
function drawCharts(host) { for (const draw of redraws) if (host.contains(draw.host)) draw(); }
// Empties a box of charts, and forgets how to redraw them.
function clearCharts(host) {
  for (let i = redraws.length - 1; i >= 0; i--) if (host.contains(redraws[i].host)) redraws.splice(i, 1);
  host.replaceChildren();
}
function redraw() {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => { for (const draw of redraws) draw(); });
}
let lastWidth = innerWidth;
addEventListener("resize", () => { if (innerWidth !== lastWidth) { lastWidth = innerWidth; redraw(); } });

const systemDark = matchMedia("(prefers-color-scheme: dark)");
const themeButton = byId("theme");
function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : systemDark.matches;
}
function labelTheme() {
  themeButton.textContent = isDark() ? "Light" : "Dark";
  themeButton.setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
  themeButton.setAttribute("aria-pressed", String(isDark()));
}
function store(value) { try { localStorage.setItem("trace-ds-theme", value); } catch (error) { /* file:// may refuse */ } }
function stored() { try { return localStorage.getItem("trace-ds-theme"); } catch (error) { return null; } }
if (stored() === "dark" || stored() === "light") document.documentElement.dataset.theme = stored();
themeButton.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  store(document.documentElement.dataset.theme);
  labelTheme();
  redraw();
});
systemDark.addEventListener("change", () => { labelTheme(); redraw(); });
labelTheme();
