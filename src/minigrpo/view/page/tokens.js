// What a step's update did to the tokens of a group: measured by `minigrpo inspect`, which the page may start.

import { html, useEffect, useMemo, useState } from "./vendor/htm-preact-standalone.js";
import { ask, start } from "./api.js";
import { figure, signed } from "./format.js";
import { Choice } from "./parts.js";
import { Signs } from "./text.js";

const POLL = 1000;
const KINDS = {
  change: ["how far the update moved it", (token) => token.logprob_after - token.logprob],
  logprob: ["log-probability when it was sampled", (token) => token.logprob],
  entropy: ["entropy where it was sampled", (token) => token.entropy],
};
const kindOf = (by) => KINDS[by] || KINDS.change;

// The state of a group's measurement; it is asked for until it is there. {state, found, error, begin}
export function useInspected(run, line) {
  const [answer, set] = useState({ state: "none" });
  useEffect(() => {
    let current = true;
    let timer;
    const look = async () => {
      const now = await ask("inspected", { run, line }).catch((fault) => ({ state: "failed", error: fault.message }));
      if (!current) return;
      set(now);
      if (now.state === "running") timer = setTimeout(look, POLL);
    };
    look();
    return () => {
      current = false;
      clearTimeout(timer);
    };
  }, [run, line, answer.state === "running"]);
  const begin = () => start("inspect", { run, line }).then(set, (fault) => set({ state: "failed", error: fault.message }));
  return { ...answer, begin };
}

export function Measure({ inspected, by }) {
  const { state, error, found, begin } = inspected;
  if (state === "done") {
    return html`<div class="controls">
      <${Choice}
        label="tokens coloured by"
        name="by"
        value=${KINDS[by] ? by : "change"}
        options=${Object.entries(KINDS).map(([key, [title]]) => [key, title])}
      />
      <span class="soft">${found.exact ? "Done again to the last byte." : `Not exact, so these may be other answers. ${found.difference}`}</span>
    </div>`;
  }
  return html`<div class="controls">
    <button type="button" id="measure" disabled=${state === "running"} onClick=${begin}>Measure the tokens</button>
    <span class="soft" role="status">
      ${state === "running"
        ? "Doing the step again, in a process of its own …"
        : error || "Does the step again from its checkpoint (minigrpo inspect): it needs the model, and its time."}
    </span>
  </div>`;
}

// Tokens with a ground as strong as their figure is large among the group's.
export function Tokens({ tokens, by, siblings }) {
  const [title, valueOf] = kindOf(by);
  const largest = useMemo(
    () => Math.max(1e-12, ...siblings.flatMap((sibling) => sibling.tokens.map((token) => Math.abs(valueOf(token))))),
    [siblings, by],
  );
  return html`<div class="model-text tokens" dir="auto" aria-label=${`Tokens, by ${title}`} role="group">
    ${tokens.map((token, n) => {
      const share = Math.abs(valueOf(token)) / largest;
      const kind = kindOf(by) === KINDS.change && valueOf(token) > 0 ? "likelier" : "unlikelier";
      const strength = share < 0.05 ? 0 : Math.max(1, Math.ceil(4 * share));
      const moved = token.logprob_after - token.logprob;
      const words = `log-probability ${figure(token.logprob)}, moved by ${signed(moved)}; entropy ${figure(token.entropy)}`;
      return html`<span key=${n} class=${strength ? `${kind} s${strength}` : ""} title=${words}><${Signs} text=${token.text} /></span>`;
    })}
  </div>`;
}
