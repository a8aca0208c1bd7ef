// Why the reward moved: two windows of steps, the change between them split exactly, and the examples behind it.

import { html, useMemo, useState } from "../vendor/htm-preact-standalone.js";
import { ask } from "../api.js";
import { Chart } from "../chart.js";
import { csvOfRows, download } from "../export.js";
import { figure, percent, signed } from "../format.js";
import { change, link, useLoaded } from "../state.js";
import { smooth } from "../series.js";
import { Choice, Fault, NumberField, Scroll, useMetrics } from "../parts.js";

export function Why({ run, query, turn }) {
  const metrics = useMetrics(run, turn);
  const steps = metrics?.steps || [];
  const windows = useMemo(() => windowsOf(query, steps), [query.a, query.b, steps.length]);
  const [moving, setMoving] = useState("b");
  const ready = windows !== null;
  const [found, fault] = useLoaded(
    () => (ready ? ask("why", { run, before: windows.a.join("-"), after: windows.b.join("-"), by: query.by }) : Promise.resolve(null)),
    [run, ready && windows.a.join(), ready && windows.b.join(), query.by],
  );
  const smoothed = useMemo(() => metrics && smooth(metrics.columns.reward || [], 5), [metrics]);
  if (!metrics) return html`<p role="status">Reading the figures …</p>`;
  if (steps.length < 2) return html`<p>Two steps at least are needed to compare them.</p>`;
  const shaded = [
    { from: windows.a[0] - 0.5, to: windows.a[1] + 0.5, name: "A" },
    { from: windows.b[0] - 0.5, to: windows.b[1] + 0.5, name: "B" },
  ];
  const select = (from, to) => change({ [moving]: `${Math.ceil(from)}-${Math.max(Math.ceil(from), Math.floor(to))}` });
  const series = [{ label: "reward", values: smoothed, raw: metrics.columns.reward || [] }];
  return html`
    <h1>Why did the reward move?</h1>
    <p class="lead">Choose two windows of steps, here or by dragging over the chart. The change between them is split exactly.</p>
    <div class="controls windows">
      <${Window} name="a" title="A, before" own=${windows.a} steps=${steps} moving=${moving} setMoving=${setMoving} />
      <${Window} name="b" title="B, after" own=${windows.b} steps=${steps} moving=${moving} setMoving=${setMoving} />
      <${Presets} steps=${steps} />
    </div>
    <${Chart} id="windows" level="h2" title="Reward" x=${steps} series=${series} windows=${shaded} onSelect=${select}>
      <p class="about">Dragging moves window ${moving.toUpperCase()}.</p>
    <//>
    <${Fault} fault=${fault} />
    ${found && html`<${Found} run=${run} found=${found} />`}
  `;
}

// The windows that the address names; else the first and the last fifth of the run.
function windowsOf(query, steps) {
  if (steps.length < 2) return null;
  const read = (text) => /^(\d+)-(\d+)$/.exec(text || "")?.slice(1).map(Number);
  const fifth = Math.max(1, Math.floor(steps.length / 5));
  const whole = { a: [steps[0], steps[fifth - 1]], b: [steps.at(-fifth), steps.at(-1)] };
  return { a: read(query.a) || whole.a, b: read(query.b) || whole.b };
}

function Window({ name, title, own, steps, moving, setMoving }) {
  const enter = (at) => (step) => {
    const next = [...own];
    next[at] = Math.max(0, Math.round(step) || 0);
    if (next[0] > next[1]) next[1 - at] = next[at];
    change({ [name]: next.join("-") });
  };
  const field = (at, label) => html`<${NumberField}
    label=${`${title}: ${label}`}
    value=${own[at]}
    min=${steps[0]}
    max=${steps.at(-1)}
    enter=${enter(at)}
  />`;
  return html`<fieldset class=${`window ${name}`}>
    <legend>
      <label
        ><input type="radio" name="moving" checked=${moving === name} onChange=${() => setMoving(name)} /> ${title}</label
      >
    </legend>
    steps ${field(0, "first step")} to ${field(1, "last step")}
  </fieldset>`;
}

function Presets({ steps }) {
  const at = (share) => steps[Math.min(steps.length - 1, Math.max(0, Math.round(share * (steps.length - 1))))];
  const choose = (a, b) => () => change({ a: a.join("-"), b: b.join("-") }, true);
  const middle = Math.floor(steps.length / 2);
  const last = Math.min(10, Math.floor(steps.length / 2));
  return html`<div class="presets">
    <button type="button" onClick=${choose([at(0), at(0.2)], [at(0.8), at(1)])}>first and last fifth</button>
    <button type="button" onClick=${choose([steps[0], steps[middle - 1]], [steps[middle], steps.at(-1)])}>two halves</button>
    <button
      type="button"
      onClick=${choose([steps.at(-2 * last), steps.at(-last - 1)], [steps.at(-last), steps.at(-1)])}
    >
      the last ${last} against those before
    </button>
  </div>`;
}

function Found({ run, found }) {
  const { change: split, windows } = found;
  if (!split) return html`<p class="note">One of the windows has no completion that was scored.</p>`;
  const [a, b] = windows;
  const share = (name, show) => html`${show(a[name])} → ${show(b[name])}`;
  return html`
    <section class="verdict" aria-label="The change">
      <p class="headline">
        The mean reward went from <b>${figure(split.before)}</b> to <b>${figure(split.after)}</b>:${" "}
        <b class=${split.total.value < 0 ? "down" : "up"} id="total" data-value=${split.total.value}>${signed(split.total.value)}</b>${" "}
        <${Interval} term=${split.total} />
      </p>
      <p class="soft">
        ${a.completions} and ${b.completions} completions of ${a.groups} and ${b.groups} groups. Right${" "}
        ${share("right", percent)}; well-formed ${share("formed", percent)}; cut off ${share("cut", percent)}; length${" "}
        ${share("tokens", figure)} tokens.${" "}
        ${Math.max(a.of - a.groups, b.of - b.groups) > 0 &&
        html`These were drawn at random from ${a.of} and ${b.of} groups: more would take too long. `}
        ${a.unscored + b.unscored > 0 && html`${a.unscored + b.unscored} completions could not be scored and are left out.`}
      </p>
    </section>
    <div class="splits">
      ${split.splits.map((each) => html`<${Split} key=${each.name} split=${each} total=${split.total} found=${found} />`)}
    </div>
    <p class="soft small">
      Brackets are 95 % intervals over prompts. How each split is made, and from which paper, stands in docs/view.md.
    </p>
    <div class="examples">
      <${Moved} run=${run} title="Moved up most" pools=${found.up} by=${found.by} />
      <${Moved} run=${run} title="Moved down most" pools=${found.down} by=${found.by} />
      <${Moved} run=${run} title="Reward up, right down" pools=${found["reward up, right down"]} by=${found.by} />
      <${Moved} run=${run} title="Longer by a fifth or more, without reward" pools=${found["longer without reward"]} by=${found.by} />
      <${Paid} run=${run} rows=${found["wrong but well paid"]} />
      <${Same} run=${run} rows=${found["near-duplicates"]} />
    </div>
  `;
}

function Interval({ term }) {
  if (term.half === null) return null;
  return html`<span class="interval">[${signed(term.value - term.half)}, ${signed(term.value + term.half)}]</span>`;
}

function Split({ split, total, found }) {
  const shown = split.terms.filter((term) => Math.abs(term.value) > 5e-10 || term.half > 5e-10);
  const largest = Math.max(Math.abs(total.value), ...split.terms.map((term) => Math.abs(term.value)), 1e-12);
  const sum = split.terms.reduce((all, term) => all + term.value, 0);
  const csv = () =>
    csvOfRows(
      ["part", "value", "half of the interval"],
      split.terms.map((term) => [term.name, term.value, term.half]),
    );
  const none = split.name === "prompts" && split.terms[0].name === "no prompt in common";
  return html`<section class="split" data-split=${split.name} aria-labelledby=${`split-${split.name}`}>
    <h2 id=${`split-${split.name}`}>${split.title}</h2>
    <p class="about">${split.about}</p>
    ${split.name === "prompts" &&
    found.fields.length > 1 &&
    html`<div class="controls">
      <${Choice}
        label="what counts as the same:"
        name="by"
        value=${found.by}
        options=${found.fields.map((field) => [field, field === "prompt" ? "the prompt itself" : `the same ${field}`])}
      />
    </div>`}
    <table class="bars">
      <thead class="hidden">
        <tr>
          <th scope="col">Part</th>
          <th scope="col">Size</th>
          <th scope="col">Change</th>
        </tr>
      </thead>
      <tbody>
        ${split.terms.map(
          (term) => html`<tr key=${term.name} class="term" hidden=${!shown.includes(term)} data-value=${term.value}>
            <th scope="row">${term.name}<${Facts} term=${term} /></th>
            <td class="bar" aria-hidden="true"><${Bar} value=${term.value} half=${term.half} largest=${largest} /></td>
            <td class="size">${signed(term.value)} <${Interval} term=${term} /></td>
          </tr>`,
        )}
      </tbody>
      <tfoot>
        <tr>
          <th scope="row">sum</th>
          <td class="bar"></td>
          <td class="size" data-value=${sum}><b>${signed(sum)}</b></td>
        </tr>
      </tfoot>
    </table>
    ${none &&
    html`<p class="note">
      No prompt was drawn in both windows, so this log cannot tell better answers from easier prompts. Evaluate both on
      the same prompts (minigrpo evaluate), or choose windows an epoch apart.
    </p>`}
    ${split.notes.tied &&
    html`<p class="note">
      ${split.notes.tied.join(", ")}: always 0 here, or always moved with the others, so no weight of its own can be told.
    </p>`}
    <div class="tools">
      <button type="button" onClick=${() => download(`why-${split.name}.csv`, csv(), "text/csv")}>CSV</button>
    </div>
  </section>`;
}

function Facts({ term }) {
  const { before, after, weight } = term.facts;
  if (before === undefined || before === null || after === null) return null;
  if (term.name === "no prompt in common" || "in both" in term.facts) {
    return html`<small>${term.facts["in both"]} in both windows, of ${before} and ${after}</small>`;
  }
  const isShare = /more or less often/.test(term.name);
  const show = isShare ? percent : figure;
  return html`<small>${weight !== undefined && html`${figure(weight)} × `}${show(before)} → ${show(after)}</small>`;
}

// A bar from the middle, with a whisker for the interval.
function Bar({ value, half, largest }) {
  const place = (v) => 50 + (46 * Math.max(-largest * 1.08, Math.min(largest * 1.08, v))) / (largest * 1.08);
  const [from, to] = [place(Math.min(0, value)), place(Math.max(0, value))];
  return html`<svg viewBox="0 0 100 16" preserveAspectRatio="none" focusable="false">
    <line x1="50" x2="50" y1="0" y2="16" class="zero" />
    <rect x=${from} width=${Math.max(0.4, to - from)} y="3" height="10" class=${value < 0 ? "down" : "up"} />
    ${half !== null &&
    html`<line x1=${place(value - half)} x2=${place(value + half)} y1="8" y2="8" class="whisker" />`}
  </svg>`;
}

function Moved({ run, title, pools, by }) {
  if (!pools.length) return null;
  return html`<section aria-label=${title}>
    <h2>${title}</h2>
    <${Scroll} label=${`Table: ${title}`}
      ><table>
        <thead>
          <tr>
            <th scope="col" class="text">${by === "prompt" ? "Prompt" : by}</th>
            <th scope="col">Reward</th>
            <th scope="col">Change</th>
            <th scope="col">Right</th>
            <th scope="col">Tokens</th>
          </tr>
        </thead>
        <tbody>
          ${pools.map(
            (pool) => html`<tr key=${pool.name}>
              <th scope="row" class="text">
                <a
                  href=${by === "prompt"
                    ? link("prompts", run, { id: pool.name })
                    : link("groups", run, { step: pool.step, line: pool.line })}
                  >${pool.name || "(none)"}</a
                >
              </th>
              <td>${figure(pool.reward[0])} → ${figure(pool.reward[1])}</td>
              <td class=${pool.moved < 0 ? "down" : "up"}>${signed(pool.moved)}</td>
              <td>${percent(pool.right[0])} → ${percent(pool.right[1])}</td>
              <td>${figure(pool.tokens[0])} → ${figure(pool.tokens[1])}</td>
            </tr>`,
          )}
        </tbody>
      </table><//
    >
  </section>`;
}

function Paid({ run, rows }) {
  if (!rows.length) return null;
  return html`<section aria-label="Wrong, and paid like right answers">
    <h2>Wrong, and paid like right answers (B)</h2>
    <ul class="plain">
      ${rows.map(
        (row) => html`<li>
          <a href=${link("groups", run, { step: row.step, line: row.line, sibling: row.sibling })}>step ${row.step}, ${row.prompt}</a>:
          reward ${figure(row.reward)}
        </li>`,
      )}
    </ul>
  </section>`;
}

function Same({ run, rows }) {
  if (!rows.length) return null;
  return html`<section aria-label="Siblings that say the same, not all of them right">
    <h2>Siblings that say the same, not all of them right (B)</h2>
    <ul class="plain">
      ${rows.map(
        (row) => html`<li>
          <a href=${link("groups", run, { step: row.step, line: row.line })}>step ${row.step}, ${row.prompt}</a>: ${row.same} of ${row.of}, mean reward ${figure(row.reward)}
        </li>`,
      )}
    </ul>
  </section>`;
}
