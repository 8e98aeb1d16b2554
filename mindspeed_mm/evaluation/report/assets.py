"""The style sheet and the script of every page."""

# Colours of series are variables, so that one drawing serves light and dark mode.
STYLE = """
:root {
  --bg: #f6f7f9; --card: #fff; --ink: #16191f; --soft: #5b6472; --line: #e1e5ea; --grid: #eceff3; --hover: #f0f3f7;
  --accent: #2457c5; --good: #116b3c; --good-bg: #dcf5e6; --bad: #a8201a; --bad-bg: #fde6e4; --warn: #8a5200;
  --warn-bg: #fdf0d5; --active-bg: #e0eaff; --del-bg: #fbdcd9; --ins-bg: #fdeac4;
  --s0: #2f6bdc; --s1: #e07a14; --s2: #15935f; --s3: #c63a6c; --s4: #7a54d6; --s5: #0b8fa6; --s6: #8a6a22;
  --s7: #5f6b7a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #0f1217; --card: #181c23; --ink: #e8ebf0; --soft: #98a2b1; --line: #2a303a; --grid: #252b34; --hover: #222832;
    --accent: #8ab0ff; --good: #7fdba6; --good-bg: #15392a; --bad: #ff9c94; --bad-bg: #46201f; --warn: #f3c26b;
    --warn-bg: #40310f; --active-bg: #1c2f57; --del-bg: #5a2926; --ins-bg: #544010;
    --s0: #6f9dff; --s1: #ffa857; --s2: #4cc993; --s3: #f2789f; --s4: #ab8ffa; --s5: #4fc4d8; --s6: #d3b264;
    --s7: #9aa6b5;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--bg); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "PingFang SC", "Hiragino Sans GB",
    "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; line-height: 1.3; margin: 0 0 14px; letter-spacing: -0.005em; }
h3 { font-size: 15px; margin: 22px 0 10px; }
p { margin: 0 0 12px; max-width: 76ch; overflow-wrap: anywhere; }
section { margin-top: 36px; scroll-margin-top: 56px; }
.title { display: flex; align-items: center; gap: 12px; flex-wrap: wrap; }
.subtitle { color: var(--soft); margin: 6px 0 0; }
.muted { color: var(--soft); }
nav {
  position: sticky; top: 0; z-index: 5; display: flex; gap: 18px; overflow-x: auto; white-space: nowrap;
  font-size: 13.5px;
  margin: 20px -24px 0; padding: 9px 24px; background: var(--bg); border-bottom: 1px solid var(--line);
}
nav a { color: var(--soft); text-decoration: none; }
nav a:hover { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
.grid {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); gap: 16px;
}
.grid > .chart:last-child:nth-child(odd) { grid-column: 1 / -1; } /* alone in its row of two */
.grid.narrow { grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.grid + .grid, section > * + .grid, section > * + .chart, .scroll + *, .grid + *, .figures + * { margin-top: 16px; }
.badge {
  display: inline-block; font-size: 12.5px; font-weight: 600; line-height: 1; padding: 5px 9px; border-radius: 999px;
  background: var(--line); color: var(--soft); white-space: nowrap;
}
.badge.good { background: var(--good-bg); color: var(--good); }
.badge.bad { background: var(--bad-bg); color: var(--bad); }
.badge.warning { background: var(--warn-bg); color: var(--warn); }
.badge.active { background: var(--active-bg); color: var(--accent); }
.figures {
  display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 1px; margin: 0;
  overflow: hidden;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.figures > div { background: var(--card); padding: 13px 16px; box-shadow: 0 0 0 1px var(--line); }
.figures dt { color: var(--soft); font-size: 12.5px; }
.figures dd {
  margin: 2px 0 0; font-size: 21px; font-weight: 600; letter-spacing: -0.01em; font-variant-numeric: tabular-nums;
}
.figures .remark { font-size: 12px; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.progress { height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; margin: 0 0 16px; }
.progress i { display: block; height: 100%; background: var(--accent); border-radius: 3px; }
.scroll {
  overflow-x: auto; max-height: 640px; border: 1px solid var(--line); border-radius: 10px; background: var(--card);
}
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td {
  padding: 7px 14px; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: break-word;
}
td small, .title small { color: var(--soft); font-size: 12px; }
.path { overflow-wrap: break-word; }
tbody tr:first-child > *, thead tr:first-child > * { border-top: 0; }
thead + tbody tr:first-child > * { border-top: 1px solid var(--line); }
thead th {
  color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; position: sticky; top: 0;
  background: var(--card);
}
tbody tr:hover > * { background: var(--hover); }
.right { text-align: right; }
td.right { white-space: nowrap; }
.wrapped th, .wrapped td { padding: 7px 9px; white-space: normal; overflow-wrap: break-word; }
.wrapped thead th { vertical-align: bottom; }
.facts th { color: var(--soft); font-weight: 400; width: 34%; min-width: 130px; }
.facts td { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); margin-bottom: 10px; width: max-content; max-width: 100%; }
pre {
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Noto Sans Mono CJK SC", monospace; margin: 0;
  padding: 14px 16px; overflow: auto; max-height: 460px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px;
}
.chart, .sample {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0; min-width: 0;
}
.chart { padding: 14px 16px 12px; display: flex; flex-direction: column; }
.lines .frame { flex: 1 0 auto; }
.chart figcaption { display: flex; align-items: center; gap: 8px; font-weight: 600; font-size: 14px; min-height: 26px; }
.chart figcaption > span:first-child { flex: 1; overflow-wrap: anywhere; }
.chart figcaption small { font-weight: 400; color: var(--soft); font-size: 12.5px; }
.chart button {
  font: inherit; font-size: 12px; font-weight: 400; color: var(--soft); background: none; border: 1px solid var(--line);
  border-radius: 6px; padding: 2px 9px; cursor: pointer;
}
.chart button:hover { color: var(--ink); border-color: var(--soft); }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0 0; padding: 0; list-style: none; font-size: 12.5px;
  color: var(--soft);
}
.legend li { overflow-wrap: break-word; min-width: 0; }
.legend i {
  display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px; vertical-align: 3px;
}
.legend i.event {
  width: 0; height: 12px; border-left: 1px dashed var(--soft); border-radius: 0; margin: 0 7px 0 6px;
  vertical-align: -1px;
}
.legend i.event.bad { border-color: var(--bad); }
.frame { position: relative; margin: 10px 4px 22px 54px; height: 210px; }
.lines.wide .frame { height: 300px; }
.frame svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; display: block; }
.frame path, .frame line {
  vector-effect: non-scaling-stroke; fill: none; stroke-linejoin: round; stroke-linecap: round;
}
.frame .ticks { stroke: var(--grid); stroke-width: 1; }
.frame .axis { stroke: var(--line); stroke-width: 1; }
.frame .raw { stroke-width: 1; opacity: 0.33; }
.frame .main { stroke-width: 1.75; }
.frame .point { stroke-width: 5; }
.frame .event { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; opacity: 0.75; }
.frame .event.bad { stroke: var(--bad); }
.frame .label {
  position: absolute; font-size: 11.5px; line-height: 1; color: var(--soft); white-space: nowrap;
  font-variant-numeric: tabular-nums;
}
.frame .y { right: 100%; margin-right: 8px; transform: translateY(-50%); }
.frame .x { top: 100%; margin-top: 8px; transform: translateX(-50%); }
.frame .x.last { transform: translateX(-100%); margin-left: 4px; }
.frame .plot { position: absolute; inset: 0; cursor: crosshair; touch-action: pan-y; }
.frame .cursor {
  position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px solid var(--soft); pointer-events: none;
}
.frame .cell { position: absolute; outline: 2px solid var(--ink); outline-offset: -1px; pointer-events: none; }
.tip {
  position: absolute; z-index: 6; top: 4px; pointer-events: none; background: var(--card);
  border: 1px solid var(--line);
  border-radius: 8px; box-shadow: 0 4px 14px rgb(0 0 0 / 0.16); padding: 7px 10px; font-size: 12px; white-space: nowrap;
  font-variant-numeric: tabular-nums; max-width: 340px; overflow: hidden; text-overflow: ellipsis;
}
.tip b { display: block; font-weight: 600; }
.tip i { display: inline-block; width: 8px; height: 8px; border-radius: 50%; margin-right: 6px; }
.heat .frame { height: auto; margin-left: 44px; overflow: visible; }
.heat .frame svg { position: static; }
.heat path { stroke-linecap: butt; vector-effect: none; shape-rendering: crispEdges; }
.key { display: flex; align-items: center; gap: 8px; font-size: 12px; color: var(--soft); flex-wrap: wrap; }
.key span.swatches { display: inline-flex; border-radius: 3px; overflow: hidden; }
.key span.swatches i { width: 17px; height: 11px; display: block; }
.grid > .sample { align-self: start; }
.sample { overflow: hidden; font-size: 14px; display: flex; flex-direction: column; }
.sample header {
  display: flex; justify-content: space-between; align-items: center; gap: 10px; padding: 10px 14px;
  font-size: 12.5px;
}
.sample .images { display: flex; gap: 6px; overflow-x: auto; padding: 0 14px 10px; }
.sample img {
  max-height: 170px; max-width: 100%; border-radius: 6px; border: 1px solid var(--line); object-fit: contain;
  background: var(--bg);
}
.sample .question {
  padding: 0 14px 12px; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 19em; overflow-y: auto;
}
.sample dl { margin: 0; border-top: 1px solid var(--line); }
.sample dl > div { display: grid; grid-template-columns: 76px 1fr; padding: 8px 14px; }
.sample dl > div + div { border-top: 1px solid var(--line); }
.sample.compared dl > div { grid-template-columns: 1fr; }
.sample dt { color: var(--soft); font-size: 12.5px; padding: 1px 6px 0 0; overflow-wrap: anywhere; }
.sample dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 19em; overflow-y: auto; }
.sample del, .sample ins { text-decoration: none; border-radius: 3px; padding: 0 1px; }
.sample del { background: var(--del-bg); }
.sample ins { background: var(--ins-bg); }
.sample footer { padding: 7px 14px; font-size: 12.5px; border-top: 1px solid var(--line); }
@media (max-width: 860px) {
  .figures { grid-template-columns: repeat(2, 1fr); }
}
@media (max-width: 560px) {
  main { padding: 20px 14px 48px; }
  nav { scrollbar-width: none; }
  nav { margin: 16px -14px 0; padding: 9px 14px; }
  h1 { font-size: 21px; }
  section { margin-top: 28px; }
  .chart { padding: 12px 12px 10px; }
  .lines.wide .frame { height: 230px; }
  .frame .x.second { display: none; }
  .figures dd { font-size: 18px; }
  .figures .remark { font-size: 11.5px; }
  .heat .frame { margin-left: 30px; }
  .heat .frame .y { margin-right: 5px; }
}
@media print {
  :root { --bg: #fff; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  nav, .chart button { display: none; }
  section { margin-top: 22px; }
  .chart, .sample, .figures > div, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll, pre, .sample .question, .sample dd { max-height: none; overflow: visible; }
  pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

# Values under the pointer, the switch between linear and logarithmic scales, and loading again while a run trains.
SCRIPT = """
"use strict";
const root = document.documentElement;
window.addEventListener("error", event => { root.dataset.error = event.message; });
const format = value => {
  if (value === null || value === undefined) return "\\u2013";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e9)) return value.toExponential(3).replace(/\\.?0+e\\+?/, "e");
  if (size >= 1e4) return Math.round(value).toString().replace(/\\B(?=(\\d{3})+$)/g, "\\u202f");
  return String(Number(value.toPrecision(5)));
};
const make = (parent, tag, name, content) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (content !== undefined) element.textContent = content;
  parent.append(element);
  return element;
};
const place = (frame, tip, left) => {
  const fits = left + tip.offsetWidth + 14 <= frame.clientWidth;
  tip.style.left = Math.max(-50, fits ? left + 10 : left - tip.offsetWidth - 10) + "px";
};
function lineChart(figure) {
  const frame = figure.querySelector(".frame"), plot = frame.querySelector(".plot");
  const data = JSON.parse(plot.dataset.values), points = data.x.length;
  let cursor = null, tip = null, at = points - 1;
  const hide = () => { cursor?.remove(); tip?.remove(); cursor = tip = null; };
  const show = () => {
    hide();
    const [low, high] = data.range, left = (data.x[at] - low) / (high - low || 1) * frame.clientWidth;
    cursor = make(frame, "div", "cursor");
    cursor.style.left = left + "px";
    tip = make(frame, "div", "tip");
    tip.setAttribute("aria-live", "polite");
    make(tip, "b", "", data.label + " " + format(data.x[at]));
    data.series.forEach(series => {
      if (series.y[at] === null) return;
      const row = make(tip, "div");
      make(row, "i").style.background = "var(--s" + series.color + ")";
      row.append((data.series.length > 1 ? series.name + "  " : "") + format(series.y[at]) + data.unit);
    });
    place(frame, tip, left);
  };
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), [low, high] = data.range;
    const x = low + (event.clientX - box.left) / box.width * (high - low);
    let first = 0, last = points - 1;
    while (last - first > 1) {
      const middle = first + last >> 1;
      if (data.x[middle] < x) first = middle; else last = middle;
    }
    at = x - data.x[first] < data.x[last] - x ? first : last;
    show();
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(); });
  plot.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -points, End: points }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    at = Math.min(points - 1, Math.max(0, at + step));
    show();
  });
  const button = figure.querySelector("button");
  button?.addEventListener("click", () => {
    const logarithmic = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", logarithmic);
    button.textContent = logarithmic ? "linear scale" : "log scale";
    figure.querySelectorAll("[data-scale]").forEach(part => {
      part.hidden = (part.dataset.scale === "log") !== logarithmic;
    });
  });
}
function heatMap(figure) {
  const frame = figure.querySelector(".frame"), plot = frame.querySelector(".plot");
  const data = JSON.parse(plot.dataset.values);
  const rows = data.values.length, columns = data.values[0].length;
  let cell = null, tip = null, row = 0, column = 0;
  const hide = () => { cell?.remove(); tip?.remove(); cell = tip = null; };
  const show = () => {
    hide();
    const width = frame.clientWidth / columns, height = frame.clientHeight / rows;
    cell = make(frame, "div", "cell");
    const box = { left: column * width, top: row * height, width, height };
    for (const [name, pixels] of Object.entries(box)) cell.style[name] = pixels + "px";
    tip = make(frame, "div", "tip");
    tip.setAttribute("aria-live", "polite");
    make(tip, "b", "", data.row + " " + data.rows[row] + ", " + data.column + " " + data.columns[column]);
    make(tip, "div", "", format(data.values[row][column]) + data.unit);
    tip.style.top = Math.min(row * height + 10, frame.clientHeight) + "px";
    place(frame, tip, (column + 1) * width);
  };
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const clip = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    row = clip((event.clientY - box.top) / box.height, rows);
    column = clip((event.clientX - box.left) / box.width, columns);
    show();
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    row = Math.min(rows - 1, Math.max(0, row + step[0]));
    column = Math.min(columns - 1, Math.max(0, column + step[1]));
    show();
  });
}
document.querySelectorAll(".chart.lines").forEach(lineChart);
document.querySelectorAll(".chart.heat").forEach(heatMap);
document.querySelectorAll("[data-since]").forEach(badge => {
  const minutes = Math.round((Date.now() - Date.parse(badge.dataset.since)) / 6e4);
  if (minutes >= 5) {
    const hours = Math.round(minutes / 60), days = Math.round(minutes / 1440);
    const age = minutes < 120 ? minutes + " min" : hours < 48 ? hours + " h" : days + " d";
    badge.textContent = "no update for " + age;
    badge.className = "badge warning";
    badge.after(" ", make(badge.parentElement, "small", "", "the run may have ended"));
  }
});
if (root.dataset.refresh) setInterval(() => {
  if (!document.hidden && getSelection().isCollapsed && !document.querySelector(".tip")) location.reload();
}, 1000 * root.dataset.refresh);
root.dataset.report = "ready";
"""
