// Pieces that several pages use.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { ask } from "./api.js";
import { change } from "./state.js";

// The figures of a run; later only what is new of them. Null until they are there.
export function useMetrics(run, turn) {
  const [metrics, set] = useState(null);
  useEffect(() => {
    let current = true;
    const old = metrics;
    const query = old ? { run, since: old.steps.length, generation: old.generation } : { run };
    ask("metrics", query).then((more) => {
      if (current) set(joined(old, more));
    }, () => {});
    return () => (current = false);
  }, [run, turn]);
  return metrics;
}

export function joined(old, more) {
  if (!old || more.generation !== old.generation || !more.since) return more;
  if (!more.steps.length) return old;
  const blank = (count) => Array(count).fill(null);
  const names = new Set([...Object.keys(old.columns), ...Object.keys(more.columns)]);
  const columns = {};
  for (const name of names) {
    columns[name] = [
      ...(old.columns[name] || blank(old.steps.length)),
      ...(more.columns[name] || blank(more.steps.length)),
    ];
  }
  return { ...more, since: 0, steps: [...old.steps, ...more.steps], columns };
}

// The sentences of docs/metrics.md, once for all charts.
let sentences = null;
export function useSentences() {
  const [found, set] = useState({});
  useEffect(() => {
    sentences ||= fetch("metrics.json").then((answer) => answer.json());
    sentences.then(set);
  }, []);
  return found;
}

export function About({ sentence }) {
  if (!sentence) return null;
  const first = sentence.means.charAt(0).toUpperCase() + sentence.means.slice(1);
  return html`<p class="about">
    ${first}.${sentence.when && html` <span>Look closer when: ${sentence.when}.</span>`}
  </p>`;
}

export const SMOOTHINGS = [1, 5, 10, 25, 50];

export function AxisControls({ query, axes }) {
  return html`
    <${Choice} label="over" name="x" value=${query.x || "step"} options=${Object.entries(axes)} />
    <${Choice}
      label="smoothed over"
      name="smooth"
      value=${query.smooth || "5"}
      options=${SMOOTHINGS.map((n) => [String(n), n === 1 ? "nothing" : `${n} steps`])}
    />
  `;
}

export function Choice({ label, name, value, options }) {
  return html`<label class="choice"
    >${label}${" "}
    <select value=${value} onChange=${(event) => change({ [name]: event.target.value })}>
      ${options.map(([key, text]) => html`<option key=${key} value=${key}>${text}</option>`)}
    </select></label
  >`;
}

// A text field that changes the address a moment after the last key.
export function Field({ label, name, value, placeholder, invalid }) {
  const [text, set] = useState(value || "");
  const sent = useRef(value || "");
  useEffect(() => {
    // What the field itself sent comes back later than the next key: only what others chose replaces the text.
    if ((value || "") !== sent.current) set((sent.current = value || ""));
  }, [value]);
  useEffect(() => {
    if (text === sent.current) return;
    const timer = setTimeout(() => change({ [name]: (sent.current = text) }), 250);
    return () => clearTimeout(timer);
  }, [text]);
  return html`<label class="choice"
    >${label}${" "}
    <input
      type="search"
      value=${text}
      placeholder=${placeholder}
      aria-invalid=${invalid ? "true" : undefined}
      onInput=${(event) => set(event.target.value)}
  /></label>`;
}

// A field for a whole number. What is being typed stays, whatever the page shows anew meanwhile, until it is entered.
export function NumberField({ label, value, min, max, enter }) {
  const [typed, type] = useState(null);
  const entered = (event) => {
    type(null);
    enter(Number(event.target.value));
  };
  return html`<input
    type="number"
    aria-label=${label}
    min=${min}
    max=${max}
    value=${typed ?? value}
    onInput=${(event) => type(event.target.value)}
    onChange=${entered}
  />`;
}

export function Fault({ fault }) {
  return fault ? html`<p class="note bad" role="alert">${String(fault.message)}</p>` : null;
}

export function Scroll({ label, children }) {
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${label}>${children}</div>`;
}
