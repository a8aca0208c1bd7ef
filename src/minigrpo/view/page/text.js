// A model's text, only ever as text: what would steer the display is shown as a sign, and what is endless is cut.

import { html, useState } from "./vendor/htm-preact-standalone.js";
import { pieces } from "./format.js";

const SHOWN = 4000;

// `mark`: [start, end) to be marked, `find`: words to be marked wherever they stand.
export function Text({ text, mark, find }) {
  const [whole, setWhole] = useState(false);
  const shown = whole ? text : text.slice(0, SHOWN);
  const spans = cut(shown, mark ? [mark] : find ? places(shown, find) : []);
  return html`<div class="model-text" dir="auto">${spans.map(([part, marked], n) =>
      marked ? html`<mark key=${n}><${Signs} text=${part} /></mark>` : html`<${Signs} key=${n} text=${part} />`,
    )}${text.length > shown.length &&
    html`<button type="button" onClick=${() => setWhole(true)}>
      … all ${text.length.toLocaleString("en")} characters
    </button>`}${!text && html`<i class="soft">nothing</i>`}</div>`;
}

export function Signs({ text }) {
  return pieces(text).map((piece, n) =>
    piece.sign ? html`<span key=${n} class="sign" title="a character that steers the display">${piece.sign}</span>` : piece.text,
  );
}

function places(text, find) {
  const found = [];
  const [low, words] = [text.toLowerCase(), find.toLowerCase()];
  for (let at = low.indexOf(words); at >= 0 && words && found.length < 200; at = low.indexOf(words, at + words.length)) {
    found.push([at, at + words.length]);
  }
  return found;
}

function cut(text, marks) {
  const spans = [];
  let from = 0;
  for (const [start, end] of marks) {
    if (start >= text.length) break;
    if (start > from) spans.push([text.slice(from, start), false]);
    spans.push([text.slice(start, end), true]);
    from = end;
  }
  if (from < text.length) spans.push([text.slice(from), false]);
  return spans;
}

// The messages of a prompt, and what it asks for.
export function Question({ messages, target }) {
  return html`<div class="question">
    ${(messages || []).map(
      (message, n) => html`<div key=${n} class="message">
        <span class="role">${String(message.role)}</span>
        <${Text} text=${typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? "")} />
      </div>`,
    )}
    ${target !== null &&
    target !== undefined &&
    html`<details>
      <summary>Target, which the model does not see</summary>
      <${Text} text=${typeof target === "string" ? target : JSON.stringify(target, null, 2)} />
    </details>`}
  </div>`;
}
