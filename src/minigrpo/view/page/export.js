// Take a chart away: its data as CSV, its picture as SVG or PNG, made here and sent nowhere.

import { tick } from "./format.js";
import { known } from "./series.js";
import { MARK_COLOURS, axisName, axisValue, colour, lineColour } from "./theme.js";

export function download(name, content, type) {
  const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const anchor = document.createElement("a");
  anchor.href = address;
  anchor.download = name.replace(/[^\w.-]+/g, "-");
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

const cell = (value) => {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};

// One row a step: the axis, each series as it was logged, and its smoothed values where they were drawn.
export function csvOf({ x, axis, series, band }) {
  const columns = [{ label: axis, values: x }];
  for (const each of series) {
    columns.push({ label: each.label, values: each.raw || each.values });
    if (each.raw) columns.push({ label: `${each.label} (smoothed)`, values: each.values });
  }
  if (band) columns.push({ label: "band low", values: band.low }, { label: "band high", values: band.high });
  const rows = x.map((_, n) => columns.map((column) => cell(column.values[n])).join(","));
  return [columns.map((column) => cell(column.label)).join(","), ...rows].join("\n") + "\n";
}

const WIDE = 720;
const HIGH = 320;
const EDGE = { left: 64, right: 20, top: 56, bottom: 36 };

const escaped = (text) =>
  String(text).replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);

// The same lines as an SVG of its own ground, so that it can be read on any page.
export function svgOf({ title, x, axis, series, band, marks = [], share }) {
  const values = known([...series.flatMap((each) => each.values), ...(band ? [...band.low, ...band.high] : [])]);
  const ticks = share ? [0, 0.25, 0.5, 0.75, 1] : ticksOf(...span(values));
  const [low, high] = [ticks[0], ticks.at(-1)];
  const [first, last] = span(known(x));
  const toX = (value) => EDGE.left + ((value - first) / (last - first || 1)) * (WIDE - EDGE.left - EDGE.right);
  const toY = (value) => HIGH - EDGE.bottom - ((value - low) / (high - low || 1)) * (HIGH - EDGE.top - EDGE.bottom);
  const point = (value, n) => `${toX(x[n]).toFixed(1)},${toY(value).toFixed(1)}`;
  const path = (line) =>
    line
      .map((value, n) => (value === null || value === undefined ? null : point(value, n)))
      .filter(Boolean)
      .join(" ");
  const [ink, soft, rule, paper] = ["--ink", "--soft", "--rule", "--paper"].map(colour);
  const parts = [`<rect width="${WIDE}" height="${HIGH}" fill="${paper}"/>`];
  parts.push(`<text x="${EDGE.left}" y="24" font-size="16" font-weight="600" fill="${ink}">${escaped(title)}</text>`);
  for (const value of ticks) {
    const y = toY(value).toFixed(1);
    parts.push(`<line x1="${EDGE.left}" x2="${WIDE - EDGE.right}" y1="${y}" y2="${y}" stroke="${rule}"/>`);
    parts.push(`<text x="${EDGE.left - 8}" y="${y}" dy="4" text-anchor="end" font-size="12" fill="${soft}">${tick(value)}</text>`);
  }
  for (const value of [first, (first + last) / 2, last]) {
    const anchor = value === first ? "start" : value === last ? "end" : "middle";
    const text = `${axisName(axis)} ${axisValue(axis, axis === "step" ? Math.round(value) : value)}`;
    parts.push(`<text x="${toX(value)}" y="${HIGH - 12}" text-anchor="${anchor}" font-size="12" fill="${soft}">${text}</text>`);
  }
  if (band) {
    const upper = band.high.map((value, n) => (value === null ? null : point(value, n))).filter(Boolean);
    const lower = band.low.map((value, n) => (value === null ? null : point(value, n))).filter(Boolean);
    parts.push(`<polygon points="${[...upper, ...lower.reverse()].join(" ")}" fill="${lineColour(0)}" opacity="0.13"/>`);
  }
  for (const mark of marks.filter(({ kind, at }) => MARK_COLOURS[kind] && at >= first && at <= last)) {
    const at = toX(mark.at).toFixed(1);
    parts.push(
      `<line x1="${at}" x2="${at}" y1="${EDGE.top}" y2="${HIGH - EDGE.bottom}" stroke="${colour(MARK_COLOURS[mark.kind])}" stroke-dasharray="4 3">` +
        `<title>${escaped(mark.text)}</title></line>`,
    );
  }
  let right = EDGE.left;
  series.forEach((each, n) => {
    const stroke = lineColour(each.colour ?? n);
    if (each.raw)
      parts.push(`<polyline points="${path(each.raw)}" fill="none" stroke="${stroke}" opacity="0.35"/>`);
    const dash = each.dash ? ` stroke-dasharray="${each.dash.join(" ")}"` : "";
    parts.push(`<polyline points="${path(each.values)}" fill="none" stroke="${stroke}" stroke-width="2"${dash}/>`);
    parts.push(`<rect x="${right}" y="36" width="12" height="3" fill="${stroke}"/>`);
    parts.push(`<text x="${right + 17}" y="42" font-size="12" fill="${ink}">${escaped(each.label)}</text>`);
    right += 34 + 7 * each.label.length;
  });
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDE} ${HIGH}" width="${WIDE}" height="${HIGH}" ` +
    `font-family="system-ui, sans-serif">${parts.join("")}</svg>\n`
  );
}

// Round numbers around the values, some four steps apart.
function ticksOf(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((each) => each >= rough);
  const [from, to] = [Math.floor(low / step + 1e-9), Math.ceil(high / step - 1e-9)];
  return Array.from({ length: to - from + 1 }, (_, n) => Number(((from + n) * step).toPrecision(12)));
}

function span(values) {
  const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  if (!values.length) return [0, 1];
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}

// The SVG drawn at twice its size.
export function pngOf(svg, name) {
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [2 * WIDE, 2 * HIGH];
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => download(name, blob), "image/png");
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
}

export function csvOfRows(head, rows) {
  return [head, ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
}
