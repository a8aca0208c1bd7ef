// One chart: uPlot's picture, and beside it what a picture lacks: a table, CSV, SVG and PNG, the keyboard.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { figure, tick } from "./format.js";
import { download, csvOf, svgOf, pngOf } from "./export.js";
import { known, summary } from "./series.js";
import { MARK_COLOURS, axisName, axisValue, colour, lineColour } from "./theme.js";

const HEIGHT = 200;
const MOST_ROWS = 1000;
// Steps are whole, and time is told in minutes and hours.
const INCREMENTS = {
  step: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 2500, 5000, 10000, 20000, 50000, 100000],
  time: [1, 2, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000],
};

// `series`: [{label, values, raw?, dash?, dots?, colour?}]; raw is drawn faintly behind, colour is a number. `band`: {low, high} around the first one.
// `marks`: [{at, kind, text}] in units of x. `windows`: [{from, to, name}] shaded. `onSelect(from, to)`: of a dragged
// range. `id` names the files; `level` is the heading that fits below the one above.
export function Chart({ id, title, x, axis = "step", series, band, marks = [], windows = [], share, level = "h3", onSelect, children }) {
  const [hover, setHover] = useState(null);
  const box = useRef(null);
  const plot = useRef(null);
  const data = [x, ...series.flatMap((each) => (each.raw ? [each.raw, each.values] : [each.values]))];
  const bands = band ? [band.low, band.high] : [];
  const selecting = useRef(onSelect);
  selecting.current = onSelect;
  const drawing = useRef({ marks, windows });
  drawing.current = { marks, windows };
  const shape = JSON.stringify([series.map((each) => [each.label, !!each.raw, each.dots, each.colour]), !!band, axis, share, !!onSelect]);

  useEffect(() => {
    const build = () => {
      plot.current?.destroy();
      const width = Math.max(240, box.current.clientWidth);
      const options = optionsOf({ series, band, axis, share, width, drawing, setHover, selecting });
      plot.current = new uPlot(options, [...data, ...bands], box.current);
    };
    build();
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const resize = new ResizeObserver(() => {
      const width = Math.max(240, box.current.clientWidth);
      if (width !== plot.current.width) plot.current.setSize({ width, height: HEIGHT });
    });
    resize.observe(box.current);
    scheme.addEventListener("change", build);
    return () => {
      resize.disconnect();
      scheme.removeEventListener("change", build);
      plot.current.destroy();
      plot.current = null;
    };
  }, [shape]);

  useEffect(() => {
    plot.current?.setData([...data, ...bands]);
  }, [x.length, x.at(-1), ...series.map((each) => each.values), JSON.stringify(windows), marks.length]);

  const move = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    const at = Math.max(0, Math.min(x.length - 1, (hover ?? x.length - 1) + by));
    setHover(at);
    plot.current?.setCursor({ left: plot.current.valToPos(x[at], "x"), top: 10 }, false);
  };

  const at = hover === null || hover >= x.length ? x.length - 1 : hover;
  const spoken = `${title}. ${series.map((each) => summary(each.label, each.values)).join(". ")}. Arrow keys read values.`;
  const table = { x, axis, series, band };
  const picture = () => svgOf({ title, ...table, marks, share });
  return html`
    <figure class="chart" id=${`chart-${id}`}>
      <figcaption>
        <${level}>${title}<//>
        ${children}
      </figcaption>
      <div class="legend" aria-live=${hover === null ? "off" : "polite"}>
        <span class="at">${axisName(axis)} ${axisValue(axis, x[at])}</span>
        ${series.map(
          (each, n) => html`<span class="key" key=${each.label}>
            <i style=${{ background: each.dash ? "transparent" : lineColour(each.colour ?? n), borderColor: lineColour(each.colour ?? n) }}></i>
            ${each.label} <b>${figure(hover === null ? known(each.values).at(-1) : each.values[at])}</b>
          </span>`,
        )}
      </div>
      <div class="plot" ref=${box} tabindex="0" role="img" aria-label=${spoken} onKeyDown=${move}></div>
      <div class="tools">
        <details class="data">
          <summary>Table</summary>
          <${Table} ...${table} title=${title} />
        </details>
        <button type="button" onClick=${() => download(`${id}.csv`, csvOf(table), "text/csv")}>CSV</button>
        <button type="button" onClick=${() => download(`${id}.svg`, picture(), "image/svg+xml")}>SVG</button>
        <button type="button" onClick=${() => pngOf(picture(), `${id}.png`)}>PNG</button>
      </div>
    </figure>
  `;
}

function Table({ x, axis, series, title }) {
  const [open, setOpen] = useState(false);
  const here = useRef(null);
  useEffect(() => {
    const details = here.current.closest("details");
    const read = () => setOpen(details.open);
    details.addEventListener("toggle", read);
    return () => details.removeEventListener("toggle", read);
  }, []);
  const from = Math.max(0, x.length - MOST_ROWS);
  return html`<div ref=${here} class="scroll" tabindex="0" role="region" aria-label=${`Table: ${title}`}>
    ${open &&
    html`<table>
      <caption>
        ${title}${from ? `, the last ${MOST_ROWS} of ${x.length} steps; the CSV has all` : ""}
      </caption>
      <thead>
        <tr>
          <th scope="col">${axisName(axis)}</th>
          ${series.map((each) => html`<th scope="col">${each.label}</th>`)}
        </tr>
      </thead>
      <tbody>
        ${x.slice(from).map(
          (value, n) => html`<tr key=${n}>
            <th scope="row">${axisValue(axis, value)}</th>
            ${series.map((each) => html`<td>${figure((each.raw || each.values)[from + n])}</td>`)}
          </tr>`,
        )}
      </tbody>
    </table>`}
  </div>`;
}

function optionsOf({ series, band, axis, share, width, drawing, setHover, selecting }) {
  const lines = series.flatMap((each, n) => {
    const stroke = lineColour(each.colour ?? n);
    const line = {
      label: each.label,
      stroke,
      width: 2,
      dash: each.dash,
      points: { show: !!each.dots, size: 6, fill: stroke },
      spanGaps: true,
    };
    const faint = { ...line, width: 1, stroke: stroke + "55", points: { show: false } };
    return each.raw ? [faint, line] : [line];
  });
  const edge = { stroke: "transparent", width: 0, points: { show: false } };
  const first = lines.length + 1;
  const grid = { stroke: colour("--rule"), width: 1 };
  const text = { stroke: colour("--soft"), font: `12px ${colour("--font")}`, grid, ticks: { show: false } };
  return {
    width,
    height: HEIGHT,
    padding: [8, 22, 0, 0],
    legend: { show: false },
    cursor: {
      sync: { key: "minigrpo" },
      points: { size: 7 },
      drag: { x: true, y: false, setScale: !selecting.current },
    },
    scales: {
      x: { time: false },
      y: share
        ? { range: [-0.02, 1.02] }
        : { range: (_, low, high) => rangeOf(low, high) },
    },
    axes: [
      { ...text, size: 28, values: (_, ticks) => ticks.map((each) => axisValue(axis, each)), space: 70, incrs: INCREMENTS[axis] },
      { ...text, size: 52, values: (_, ticks) => ticks.map(tick), space: 32 },
    ],
    series: [{}, ...lines, ...(band ? [edge, edge] : [])],
    bands: band ? [{ series: [first + 1, first], fill: lineColour(0) + "22" }] : [],
    hooks: {
      setCursor: [(u) => setHover(u.cursor.idx ?? null)],
      setSelect: [
        (u) => {
          if (!selecting.current || u.select.width < 4) return;
          selecting.current(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"));
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        },
      ],
      drawClear: [(u) => shade(u, drawing.current.windows)],
      draw: [(u) => drawMarks(u, drawing.current.marks)],
    },
  };
}

// Room around the values; a line that never moves stands in the middle.
function rangeOf(low, high) {
  if (low === null) return [0, 1];
  const room = low === high ? (Math.abs(low) || 1) * 0.2 : 0;
  return uPlot.rangeNum(low - room, high + room, 0.08, true);
}

function shade(u, windows) {
  windows.forEach((each, n) => {
    const inside = (place) => Math.max(u.bbox.left, Math.min(u.bbox.left + u.bbox.width, place));
    const left = inside(u.valToPos(each.from, "x", true));
    const right = inside(u.valToPos(each.to, "x", true));
    u.ctx.fillStyle = colour(n ? "--window-b" : "--window-a");
    u.ctx.fillRect(left, u.bbox.top, Math.max(2, right - left), u.bbox.height);
    u.ctx.fillStyle = colour("--soft");
    u.ctx.font = `${12 * devicePixelRatio}px ${colour("--font")}`;
    u.ctx.textBaseline = "top";
    u.ctx.fillText(each.name, left + 4 * devicePixelRatio, u.bbox.top + 3 * devicePixelRatio);
  });
}

function drawMarks(u, marks) {
  // A kill and the resume after it stand at the same step: the kill on top.
  for (const mark of [...marks].sort((a, b) => (a.kind === "killed") - (b.kind === "killed"))) {
    const name = MARK_COLOURS[mark.kind];
    const at = u.valToPos(mark.at, "x", true);
    if (!name || at < u.bbox.left || at > u.bbox.left + u.bbox.width) continue;
    const size = 5 * devicePixelRatio;
    const base = u.bbox.top + u.bbox.height;
    u.ctx.save();
    u.ctx.strokeStyle = u.ctx.fillStyle = colour(name);
    u.ctx.lineWidth = devicePixelRatio;
    if (mark.kind !== "alarm") {
      u.ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
      u.ctx.beginPath();
      u.ctx.moveTo(at, u.bbox.top);
      u.ctx.lineTo(at, base);
      u.ctx.stroke();
    }
    u.ctx.beginPath();
    u.ctx.moveTo(at, base - 2 * size);
    u.ctx.lineTo(at - size, base);
    u.ctx.lineTo(at + size, base);
    u.ctx.fill();
    u.ctx.restore();
  }
}
