// One prompt through time: every answer that it ever got.

import { html, useMemo, useState } from "../vendor/htm-preact-standalone.js";
import { ask } from "../api.js";
import { Chart } from "../chart.js";
import { figure, percent } from "../format.js";
import { link, useLoaded } from "../state.js";
import { Fault, Field, Scroll } from "../parts.js";
import { Question, Text } from "../text.js";

export function Prompts({ run, query, turn }) {
  return html`
    <h1>Prompts through time</h1>
    <div class="split-view">
      <${List} ...${{ run, query, turn }} />
      ${query.id !== undefined
        ? html`<${Prompt} key=${query.id} run=${run} id=${query.id} turn=${turn} />`
        : html`<p class="soft">Choose a prompt to see every answer that it got.</p>`}
    </div>
  `;
}

function List({ run, query, turn }) {
  const [found, fault] = useLoaded(() => ask("prompts", { run, text: query.text }), [run, query.text, turn]);
  return html`<div>
    <div class="controls"><${Field} label="name" name="text" value=${query.text} placeholder="part of a name" /></div>
    <${Fault} fault=${fault} />
    ${found &&
    html`<nav class="list" aria-label="Prompts">
      ${found.prompts.map(
        (each) => html`<a
          key=${each.prompt}
          class="item"
          href=${link("prompts", run, { ...query, id: each.prompt })}
          aria-current=${each.prompt === query.id ? "true" : undefined}
        >
          <span class="name">${each.prompt}</span>
          <span class="soft">drawn ${each.drawn === 1 ? "once" : `${each.drawn} times`}</span>
        </a>`,
      )}
      ${found.found > found.prompts.length &&
      html`<p class="soft">${found.prompts.length} of ${found.found}: a part of the name finds the others.</p>`}
    </nav>`}
  </div>`;
}

function Prompt({ run, id, turn }) {
  const [found, fault] = useLoaded(() => ask("prompt", { run, prompt: id }), [run, id, turn]);
  const times = found?.times || [];
  const last = times.at(-1);
  const [group] = useLoaded(() => (last ? ask("group", { run, line: last.line }) : Promise.resolve(null)), [run, last?.line]);
  const chart = useMemo(
    () => ({
      x: times.map((time) => time.step),
      series: [
        { label: "right", values: times.map((time) => share(time.right)), dots: true },
        { label: "reward", values: times.map((time) => time.reward), dots: true },
      ],
    }),
    [found],
  );
  if (fault) return html`<${Fault} fault=${fault} />`;
  if (!found) return html`<p role="status">Reading the prompt …</p>`;
  if (!last) return html`<p>This run never drew ${id}.</p>`;
  return html`<article class="group">
    <h2>${id}</h2>
    <p>
      Drawn ${times.length === 1 ? "once" : `${times.length} times`}, right at last in ${percent(share(last.right))}.${" "}
      ${found.rest === null || found.rest === undefined
        ? "No prompt of this run ever rests (groups.rest)."
        : found.rests
          ? `It rests for ${found.rest_epochs} epochs: at least ${percent(found.rest)} were right.`
          : `It does not rest: that takes ${percent(found.rest)} right.`}
    </p>
    <${Question} messages=${group?.messages} target=${group?.target} />
    ${times.length > 1 && html`<${Chart} id="prompt" title="Right and reward, each time" ...${chart} />`}
    <h3>Every time, the newest first</h3>
    ${[...times].reverse().map((time, n) => html`<${Time} key=${time.line} run=${run} time=${time} open=${n === 0} />`)}
  </article>`;
}

const share = (flags) => (flags.length ? flags.filter(Boolean).length / flags.length : 0);

function Time({ run, time, open }) {
  const [shown, setShown] = useState(open);
  const [group, fault] = useLoaded(
    () => (shown ? ask("group", { run, line: time.line }) : Promise.resolve(null)),
    [run, time.line, shown],
  );
  return html`<details class="time" open=${open} onToggle=${(event) => setShown(event.target.open)}>
    <summary>
      step ${time.step}: ${percent(share(time.right))} right, mean reward ${figure(time.reward)}, ${figure(time.tokens)} tokens
    </summary>
    <p><a href=${link("groups", run, { step: time.step, line: time.line })}>The whole group</a></p>
    <${Fault} fault=${fault} />
    ${group &&
    html`<${Scroll} label=${`answers of step ${time.step}`}
      ><table class="wide-text">
        <thead>
          <tr>
            <th scope="col">Reward</th>
            <th scope="col">Tokens</th>
            <th scope="col" class="text">Answer</th>
          </tr>
        </thead>
        <tbody>
          ${group.completions.map(
            (each, n) => html`<tr key=${n}>
              <td>${each.solved ? "✓ " : ""}${figure(each.reward)}</td>
              <td>${figure(each.tokens)}</td>
              <td class="text"><${Text} text=${`${each.opening || ""}${each.text ?? ""}`} /></td>
            </tr>`,
          )}
        </tbody>
      </table><//
    >`}
  </details>`;
}
