// One run: every chart with the sentence that says what it means, and what happened to the run as marks.

import { html, useMemo } from "../vendor/htm-preact-standalone.js";
import { ask } from "../api.js";
import { Chart } from "../chart.js";
import { link, useLoaded } from "../state.js";
import { AXES, axisOf, smooth } from "../series.js";
import { About, AxisControls, Fault, useMetrics, useSentences } from "../parts.js";

export function One({ run, query, turn }) {
  const metrics = useMetrics(run, turn);
  const sentences = useSentences();
  const [found, fault] = useLoaded(() => ask("marks", { run }), [run, turn]);
  const axis = AXES[query.x] ? query.x : "step";
  const window = Number(query.smooth || 5);
  const x = useMemo(() => metrics && axisOf(metrics, axis), [metrics, axis]);
  if (!metrics) return html`<p role="status">Reading the figures …</p>`;
  if (!metrics.steps.length) return html`<p>No step of this run has ended yet. The first one appears here by itself.</p>`;
  const marks = (found?.marks || []).map((mark) => ({ ...mark, at: place(metrics, x, mark.step) }));
  return html`
    <h1>${run}</h1>
    <${Marks} run=${run} marks=${marks} />
    <${Fault} fault=${fault} />
    <div class="controls"><${AxisControls} query=${query} axes=${AXES} /></div>
    <div class="charts">
      ${metrics.charts.map(
        (chart) =>
          html`<${Figure} key=${chart.id} ...${{ chart, metrics, x, axis, window, marks }} sentence=${sentences[chart.about]} />`,
      )}
    </div>
  `;
}

// The place of a step on the axis; 0 before the first.
function place(metrics, x, step) {
  const at = metrics.steps.findLastIndex((each) => each <= step);
  return at < 0 ? 0 : x[at];
}

function Figure({ chart, metrics, x, axis, window, marks, sentence }) {
  const series = useMemo(() => {
    const lines = chart.figures.map((name, n) => {
      const values = metrics.columns[name];
      const smoothed = window > 1 && !chart.dots;
      return {
        label: chart.labels[n],
        values: smoothed ? smooth(values, window) : values,
        raw: smoothed ? values : undefined,
        dots: chart.dots,
      };
    });
    if (chart.plan && metrics.planned_memory_gb) {
      lines.push({ label: "planned", values: x.map(() => metrics.planned_memory_gb), dash: [6, 4] });
    }
    return lines;
  }, [metrics, chart, window, x]);
  const band = useMemo(() => {
    const spread = chart.band && metrics.columns[chart.band];
    if (!spread) return undefined;
    const around = smooth(spread, window);
    const edge = (sign) =>
      series[0].values.map((value, n) => (value === null || around[n] === null ? null : value + sign * around[n]));
    return { low: edge(-1), high: edge(1) };
  }, [series]);
  return html`<${Chart} id=${chart.id} level="h2" title=${chart.title} ...${{ x, axis, series, band, marks }} share=${chart.share}>
    <${About} sentence=${sentence} />
    ${band && html`<p class="about"><span>The band is one standard deviation among siblings to each side.</span></p>`}
  <//>`;
}

function Marks({ run, marks }) {
  const told = marks.filter((mark) => mark.kind !== "began");
  if (!told.length) return null;
  const alarms = told.filter((mark) => mark.kind === "alarm").length;
  const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  return html`<details class="marks" open=${told.length <= 4}>
    <summary>${count(alarms, "alarm")}, ${count(told.length - alarms, "other mark")} on the axes</summary>
    <ol>
      ${told.map(
        (mark, n) => html`<li key=${n} class=${mark.kind}>
          <a href=${link("groups", run, { step: mark.step })}>step ${mark.step}</a>
          ${mark.time && html`, <time datetime=${mark.time}>${mark.time.slice(0, 16).replace("T", " ")}</time>`}: ${mark.text}
        </li>`,
      )}
    </ol>
  </details>`;
}
