// What the stages before and after training left: verdicts, evidence, tables, answers, files.

import { html, useEffect, useState } from "../vendor/htm-preact-standalone.js";
import { ask } from "../api.js";
import { bytes, duration, figure, percent, value } from "../format.js";
import { change, useLoaded } from "../state.js";
import { Fault, Scroll } from "../parts.js";
import { Text } from "../text.js";

export function Stages({ run, query, turn }) {
  const [found, fault] = useLoaded(() => ask("stages", { run }), [run, turn]);
  if (fault && !found) return html`<${Fault} fault=${fault} />`;
  if (!found) return html`<p role="status">Reading the stages …</p>`;
  const there = (name) => Object.keys(found[name]).length > 0;
  return html`
    <h1>Stages</h1>
    ${there("preflight") && html`<${Preflight} found=${found.preflight} />`}
    ${found.evaluations.length > 0 && html`<${Evaluations} ...${{ run, found, query }} />`}
    ${there("check") && html`<${Check} found=${found.check} />`} ${there("parity") && html`<${Parity} found=${found.parity} />`}
    <${Files} found=${found} />
  `;
}

function Section({ id, title, verdict, good, damaged, children }) {
  return html`<section class="stage" aria-labelledby=${id}>
    <h2 id=${id}>${title} ${verdict && html`<span class=${`badge ${good ? "right" : "malformed"}`}>${verdict}</span>`}</h2>
    ${damaged ? html`<p class="note bad">${damaged}</p>` : children}
  </section>`;
}

function Facts({ facts }) {
  return html`<dl class="facts-list">
    ${facts
      .filter(([, shown]) => shown !== undefined && shown !== null)
      .map(([name, shown]) => html`<div key=${name}><dt>${name}</dt><dd>${shown}</dd></div>`)}
  </dl>`;
}

function Preflight({ found }) {
  const figures = found.figures || {};
  const facts = [
    ["groups sampled", figure(figures.groups)],
    ["well-formed", percent(figures.formed)],
    ["right", percent(figures.solved)],
    ["groups that would teach", percent(figures.informative)],
    ["cut off", percent(figures.truncated)],
    ["mean reward", figure(figures.reward_mean)],
    ["training would take", duration(figures.training_seconds)],
    ["memory, planned", figures.planned_memory_gb && `${figure(figures.planned_memory_gb)} GB`],
    ["memory, seen", figures.peak_memory_gb && `${figure(figures.peak_memory_gb)} GB`],
  ];
  return html`<${Section} id="preflight" title="Preflight" verdict=${found.go ? "go" : "no go"} good=${found.go} damaged=${found.damaged}>
    ${[...(found.reasons || []), ...(found.warnings || [])].map((text) => html`<p class="note">${text}</p>`)}
    <${Facts} facts=${facts} />
    <div class="pairs">
      ${(found.samples || []).map(
        (sample) => html`<div key=${sample.which}>
          <h3>The ${sample.which} answer it saw</h3>
          <${Text} text=${String(sample.prompt ?? "")} />
          <div class="facts"><b>reward ${figure(sample.reward)}</b><span>${figure(sample.tokens)} tokens</span></div>
          <${Text} text=${String(sample.text ?? "")} />
        </div>`,
      )}
    </div>
  <//>`;
}

function rate(found) {
  if (!found || found.value === undefined || !found.count) return "–";
  return html`${percent(found.value)} <span class="interval">[${(100 * found.low).toFixed(1)}, ${(100 * found.high).toFixed(1)}]</span>`;
}

function Evaluations({ run, found, query }) {
  const comparisons = Object.entries(found.comparison.comparisons || {});
  return html`<${Section} id="evaluation" title="Evaluation">
    <${Scroll} label="Evaluations">
      <table>
        <thead>
          <tr>
            <th scope="col" class="text">Of</th>
            <th scope="col">Prompts</th>
            <th scope="col">Right</th>
            <th scope="col">Well-formed</th>
            <th scope="col">Cut off</th>
            <th scope="col">Reward</th>
            <th scope="col">Tokens</th>
          </tr>
        </thead>
        <tbody>
          ${found.evaluations.map(
            (each) => html`<tr key=${each.file}>
              <th scope="row" class="text">
                ${each.name || each.file}, ${each.task} ${each.split}${each.sampling?.temperature ? `, temperature ${each.sampling.temperature}` : ", greedy"}
              </th>
              <td>${figure(each.scores.accuracy?.count)}</td>
              <td>${rate(each.scores.accuracy)}</td>
              <td>${rate(each.scores.formed)}</td>
              <td>${rate(each.scores.truncated)}</td>
              <td>${figure(each.scores.mean_reward)}</td>
              <td>${figure(each.scores.mean_tokens)}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    <//>
    ${comparisons.map(
      ([name, each]) =>
        each.change &&
        html`<p key=${name}>
          ${name}: ${each.change.gained} prompts gained, ${each.change.lost} lost, ${(100 * each.change.difference).toFixed(1)} points${" "}
          <span class="interval">[${(100 * each.change.low).toFixed(1)}, ${(100 * each.change.high).toFixed(1)}]</span>; by luck alone: p = ${figure(each.change.p)}
        </p>`,
    )}
    <${Answers} ...${{ run, found, query }} />
  <//>`;
}

// The evaluation whose answers are shown, beside the other one of the same sampling.
function Answers({ run, found, query }) {
  const files = found.evaluations.map((each) => each.file);
  const tuned = found.evaluations.filter((each) => each.name === "tuned");
  const first = tuned.find((each) => !each.sampling?.temperature) || tuned[0] || found.evaluations[0];
  const file = files.includes(query.file) ? query.file : first.file;
  const guess = files.find((name) => name === file.replace(/^tuned/, "base") && name !== file);
  const beside = query.beside === undefined ? guess || "" : query.beside;
  const only = query.only === undefined ? "" : query.only;
  const [state, set] = useState(null);
  const [fault, setFault] = useState(null);
  const load = (from, rows) =>
    ask("evaluation", { run, file, beside, only, from }).then(
      (more) => set({ ...more, rows: [...rows, ...more.rows] }),
      setFault,
    );
  useEffect(() => {
    load(0, []);
  }, [run, file, beside, only]);
  const pick = (name, label, own, options) =>
    html`<label class="choice"
      >${label}
      <select value=${own} onChange=${(event) => change({ [name]: event.target.value })}>
        ${options.map(([key, text]) => html`<option key=${key} value=${key}>${text}</option>`)}
      </select></label
    >`;
  const counts = state?.counts || {};
  return html`<h3>Every answer</h3>
    <div class="controls">
      ${pick("file", "of", file, files.map((name) => [name, name.replace(/\.json$/, "")]))}
      ${pick("beside", "beside", beside, [["", "nothing"], ...files.filter((name) => name !== file).map((name) => [name, name.replace(/\.json$/, "")])])}
      ${pick("only", "only", only, [
        ["", `all (${state?.of ?? "…"})`],
        ...["gained", "lost", "right", "wrong"].map((kind) => [kind, `${kind} (${counts[kind] ?? "…"})`]),
      ])}
    </div>
    <${Fault} fault=${fault} />
    <ol class="plain answers">
      ${(state?.rows || []).map(
        ({ answer, before }, n) => html`<li key=${n}>
          <${Text} text=${String(answer.messages?.at(-1)?.content ?? answer.prompt ?? "")} />
          <div class="pairs">
            ${before && html`<${Answer} title="before" answer=${before} />`}
            <${Answer} title=${before ? "after" : ""} answer=${answer} />
          </div>
        </li>`,
      )}
    </ol>
    ${state?.next && html`<button type="button" onClick=${() => load(state.next, state.rows)}>More: ${state.found - state.rows.length} left</button>`}`;
}

function Answer({ title, answer }) {
  return html`<div>
    <div class="facts">
      ${title && html`<span class="soft">${title}</span>`}
      <span class=${`badge ${answer.solved ? "right" : answer.formed === false ? "malformed" : "wrong"}`}
        >${answer.solved ? "right" : answer.formed === false ? "malformed" : "wrong"}</span
      >
      <span>reward ${figure(answer.reward)}</span>
    </div>
    <${Text} text=${String(answer.text ?? "")} />
  </div>`;
}

function Check({ found }) {
  const effect = found.effect || {};
  return html`<${Section} id="check" title="Adapter" verdict=${found.ok ? "sound" : "faulty"} good=${found.ok} damaged=${found.damaged}>
    ${(found.faults || []).map((fault) => html`<p class="note bad">${String(fault)}</p>`)}
    <p>It moves the base by ${figure(effect.mean_kl)} nats a token, over ${figure(effect.tokens)} tokens (${found.texts || "texts"}).</p>
    <details>
      <summary>${(found.facts || []).length} layers</summary>
      <${Scroll} label="Layers of the adapter">
        <table>
          <thead>
            <tr>
              <th scope="col" class="text">Layer</th>
              <th scope="col">Rank</th>
              <th scope="col">‖A‖</th>
              <th scope="col">‖B‖</th>
              <th scope="col">‖change‖</th>
            </tr>
          </thead>
          <tbody>
            ${(found.facts || []).map(
              (each) => html`<tr key=${each.module}>
                <th scope="row" class="text"><code>${each.module}</code></th>
                <td>${figure(each.rank)}</td>
                <td>${figure(each.norm_a)}</td>
                <td>${figure(each.norm_b)}</td>
                <td>${figure(each.norm_delta)}</td>
              </tr>`,
            )}
          </tbody>
        </table>
      <//>
    </details>
  <//>`;
}

function Parity({ found }) {
  const rows = found.stages || [];
  const good = rows.every((row) => row.ok !== false);
  return html`<${Section} id="parity" title="Parity" verdict=${good ? "proved" : "not proved"} good=${good} damaged=${found.damaged}>
    <p class="about">Distance from the policy that was trained, on the same texts.</p>
    <${Scroll} label="Parity">
      <table>
        <thead>
          <tr>
            <th scope="col" class="text">Stage</th>
            <th scope="col">KL, nats a token</th>
            <th scope="col">Of what training did</th>
            <th scope="col">Worst token</th>
            <th scope="col">Same likeliest token</th>
            <th scope="col" class="text">Verdict</th>
          </tr>
        </thead>
        <tbody>
          ${rows.map(
            (row) => html`<tr key=${row.name}>
              <th scope="row" class="text">${row.name}</th>
              <td>${figure(row.mean_kl)}</td>
              <td>${figure(row.relative_kl)}</td>
              <td>${figure(row.max_kl)}</td>
              <td>${percent(row.top1)}</td>
              <td class="text">${row.limit === null && row.ceiling === null ? "what training did" : row.ok ? "proved" : "too far"}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    <//>
  <//>`;
}

function Files({ found }) {
  const seconds = Object.entries(found.seconds).filter(([, each]) => typeof each === "number");
  const machine = Object.entries(found.machine).filter(([name]) => !["seal", "format"].includes(name));
  return html`<${Section} id="files" title="Files, machine and time">
    <${Facts} facts=${seconds.map(([name, each]) => [name, duration(each)])} />
    <${Facts} facts=${machine.map(([name, each]) => [name, value(each)])} />
    <details>
      <summary>${found.files.length} files</summary>
      <${Scroll} label="Files">
        <table>
          <thead>
            <tr>
              <th scope="col" class="text">File</th>
              <th scope="col">Size</th>
            </tr>
          </thead>
          <tbody>
            ${found.files.map(
              (file) => html`<tr key=${file.name}>
                <th scope="row" class="text"><code>${file.name}</code></th>
                <td>${bytes(file.bytes)}</td>
              </tr>`,
            )}
          </tbody>
        </table>
      <//>
    </details>
  <//>`;
}
