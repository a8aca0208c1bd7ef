// All runs: a table, several of them side by side over one axis, and what their recipes differ in.

import { html, useEffect, useMemo, useState } from "../vendor/htm-preact-standalone.js";
import { ask } from "../api.js";
import { Chart } from "../chart.js";
import { figure, percent, value } from "../format.js";
import { change, link } from "../state.js";
import { AXES, axisOf, smooth } from "../series.js";
import { About, AxisControls, Field, Scroll, joined, useSentences } from "../parts.js";

const FIRST = "^(reward|accuracy|completions/mean_length|entropy)$";
const MOST_CHARTS = 24;

export function Runs({ library, query, turn }) {
  const names = library.runs.map((each) => each.name);
  const chosen = (query.runs !== undefined ? query.runs.split("|") : names.slice(0, 4)).filter((name) => names.includes(name));
  const found = useSeveral(chosen, turn);
  const toggle = (name) => {
    const now = chosen.includes(name) ? chosen.filter((each) => each !== name) : [...chosen, name];
    change({ runs: now.join("|") || "|" });
  };
  return html`
    <h1>Runs</h1>
    <p class="lead">in <code>${library.folder}</code>. Tick those that are to be drawn.</p>
    <${Scroll} label="All runs">
      <table class="runs">
        <thead>
          <tr>
            <th scope="col"><span class="hidden">Drawn</span></th>
            <th scope="col" class="text">Run</th>
            <th scope="col" class="text">State</th>
            <th scope="col">Steps</th>
            <th scope="col">Reward</th>
            <th scope="col">Right</th>
            <th scope="col" class="text">Task</th>
            <th scope="col" class="text">Model</th>
          </tr>
        </thead>
        <tbody>
          ${library.runs.map(
            (each) => html`<tr key=${each.name}>
              <td>
                <input
                  type="checkbox"
                  aria-label=${`draw ${each.name}`}
                  checked=${chosen.includes(each.name)}
                  onChange=${() => toggle(each.name)}
                />
              </td>
              <th scope="row" class="text">
                ${chosen.includes(each.name) && html`<i class=${`swatch line-${(chosen.indexOf(each.name) % 8) + 1}`}></i>${" "}`}
                <a href=${link("run", each.name)}>${each.name}</a>
              </th>
              <td class="text"><span class=${`dot ${each.state}`}></span> ${each.state}</td>
              <td>${each.steps}${each.of ? ` / ${each.of}` : ""}</td>
              <td>${figure(each.reward)}</td>
              <td>${percent(each.accuracy)}</td>
              <td class="text">${each.task || "–"}</td>
              <td class="text">${each.model || "–"}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    <//>
    <${Side} ...${{ chosen, found, query }} />
    <${Differences} ...${{ chosen, found }} />
  `;
}

// {name: {metrics, knobs}} of the chosen runs, as far as they are there.
function useSeveral(names, turn) {
  const [found, set] = useState({});
  useEffect(() => {
    let current = true;
    for (const run of names) {
      const old = found[run]?.metrics;
      const since = old && { since: old.steps.length, generation: old.generation };
      Promise.all([ask("metrics", { run, ...since }), ask("run", { run })]).then(
        ([more, about]) => current && set((all) => ({ ...all, [run]: { metrics: joined(old, more), knobs: about.knobs } })),
        () => {},
      );
    }
    return () => (current = false);
  }, [names.join("|"), turn]);
  return found;
}

function Side({ chosen, found, query }) {
  const sentences = useSentences();
  const axis = AXES[query.x] ? query.x : "step";
  const window = Number(query.smooth || 5);
  const [wanted, broken] = useMemo(() => {
    try {
      return [new RegExp(query.match || FIRST), null];
    } catch (fault) {
      return [new RegExp(FIRST), fault.message];
    }
  }, [query.match]);
  const ready = chosen.filter((name) => found[name]?.metrics.steps.length);
  const metrics = [...new Set(ready.flatMap((name) => Object.keys(found[name].metrics.columns)))].filter((each) => wanted.test(each));
  return html`<section aria-labelledby="side">
    <h2 id="side">Side by side</h2>
    <div class="controls">
      <${AxisControls} query=${query} axes=${AXES} />
      <${Field} label="figures like" name="match" value=${query.match} placeholder="regex: reward|entropy" invalid=${broken} />
    </div>
    ${broken && html`<p class="note bad" role="alert">No regular expression: ${broken}</p>`}
    ${!ready.length && html`<p>No run is ticked that has a step.</p>`}
    ${ready.length > 0 && !metrics.length && html`<p>No figure has a name like that.</p>`}
    ${metrics.length > MOST_CHARTS && html`<p class="note">The first ${MOST_CHARTS} of ${metrics.length} figures.</p>`}
    <div class="charts">
      ${metrics.slice(0, MOST_CHARTS).map(
        (name) => html`<${Compared} key=${name} ...${{ name, chosen, ready, found, axis, window, sentences }} />`,
      )}
    </div>
  </section>`;
}

function Compared({ name, chosen, ready, found, axis, window, sentences }) {
  const drawn = ready.filter((run) => found[run].metrics.columns[name]);
  const { x, series } = useMemo(() => {
    const each = drawn.map((run) => {
      const metrics = found[run].metrics;
      return [axisOf(metrics, axis), smooth(metrics.columns[name], window)];
    });
    const x = [...new Set(each.flatMap(([own]) => own))].sort((a, b) => a - b);
    const spread = (own, values) => {
      const at = new Map(own.map((place, n) => [place, values[n]]));
      return x.map((place) => at.get(place));
    };
    return { x, series: each.map(([own, values], n) => ({ label: drawn[n], colour: chosen.indexOf(drawn[n]), values: spread(own, values) })) };
  }, [found, drawn.join("|"), axis, window, name]);
  const sentence = sentences[name] || sentences[name.replace(/^(rewards|servers)\/.*\//, "$1/NAME/")];
  return html`<${Chart} id=${name} title=${name} ...${{ x, axis, series }}><${About} sentence=${sentence} /><//>`;
}

function Differences({ chosen, found }) {
  const ready = chosen.filter((name) => found[name]);
  const knobs = [...new Set(ready.flatMap((name) => Object.keys(found[name].knobs)))].sort();
  const differ = knobs.filter((knob) => new Set(ready.map((name) => JSON.stringify(found[name].knobs[knob]))).size > 1);
  if (ready.length < 2) return null;
  return html`<section aria-labelledby="differ">
    <h2 id="differ">What their recipes differ in</h2>
    ${!differ.length
      ? html`<p>In nothing: every knob is the same.</p>`
      : html`<${Scroll} label="Differences of the recipes"
          ><table>
            <thead>
              <tr>
                <th scope="col" class="text">Knob</th>
                ${ready.map((name) => html`<th scope="col" class="text">${name}</th>`)}
              </tr>
            </thead>
            <tbody>
              ${differ.map(
                (knob) => html`<tr key=${knob}>
                  <th scope="row" class="text"><code>${knob}</code></th>
                  ${ready.map((name) => html`<td class="text">${value(found[name].knobs[knob])}</td>`)}
                </tr>`,
              )}
            </tbody>
          </table><//
        >`}
  </section>`;
}
