// The groups of a step: every prompt with its siblings, compared with one another; and a search through all steps.

import { html, useEffect, useMemo, useState } from "../vendor/htm-preact-standalone.js";
import { ask } from "../api.js";
import { figure, firstDifference, signed, value } from "../format.js";
import { change, link, useLoaded } from "../state.js";
import { Choice, Fault, Field, NumberField } from "../parts.js";
import { Question, Text } from "../text.js";
import { Measure, Tokens, useInspected } from "../tokens.js";

const KINDS = [
  ["right", "right"],
  ["wrong", "wrong"],
  ["malformed", "malformed"],
  ["cut", "cut off"],
  ["cheats", "cheated"],
  ["tied", "tied group"],
  ["unscored", "not scored"],
];
const SORTS = {
  reward: ["reward, best first", (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity)],
  advantage: ["advantage", (a, b) => (b.advantage ?? 0) - (a.advantage ?? 0)],
  length: ["length, longest first", (a, b) => b.tokens - a.tokens],
  sampled: ["as sampled", (a, b) => a.sibling - b.sibling],
};

export function Groups({ run, query, turn }) {
  const kinds = (query.only || "").split(",").filter(Boolean);
  const searching = Boolean(query.text || kinds.length);
  return html`
    <h1>Groups</h1>
    <div class="controls">
      <${Field} label="find" name="text" value=${query.text} placeholder="any words of an answer" />
      <div class="chips" role="group" aria-label="Only answers that are">
        ${KINDS.map(
          ([kind, title]) => html`<button
            key=${kind}
            type="button"
            aria-pressed=${kinds.includes(kind) ? "true" : "false"}
            onClick=${() => change({ only: (kinds.includes(kind) ? kinds.filter((k) => k !== kind) : [...kinds, kind]).join(",") })}
          >
            ${title}
          </button>`,
        )}
      </div>
    </div>
    ${searching && html`<${Hits} run=${run} query=${query} turn=${turn} />`}
    <${Step} ...${{ run, query, turn }} />
  `;
}

function Step({ run, query, turn }) {
  const asked = query.step;
  const [found, fault] = useLoaded(() => ask("step", { run, step: asked }), [run, asked, asked === undefined && turn]);
  // Without a choice: a group whose siblings differ, where there is one.
  const chosen = useMemo(() => {
    if (!found?.groups.length) return null;
    return found.groups.find((group) => String(group.line) === query.line) || found.groups.find((group) => !group.tied) || found.groups[0];
  }, [found, query.line]);
  useEffect(() => {
    const pressed = (event) => {
      if (!found || event.target.closest("input, select, textarea, dialog") || event.ctrlKey || event.metaKey) return;
      const now = Number(asked ?? found.step); // keys may be quicker than the server
      if (event.key === "." || event.key === ",") go(now + (event.key === "." ? 1 : -1));
      if (asked !== undefined && now !== found.asked) return;
      const at = found.groups.findIndex((group) => group === chosen);
      const next = found.groups[at + { j: 1, k: -1 }[event.key]];
      if (next) change({ step: found.step, line: next.line, sibling: undefined });
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, [found, chosen, asked]);
  if (fault && !found) return html`<${Fault} fault=${fault} />`;
  if (!found) return html`<p role="status">Reading the groups …</p>`;
  if (!found.groups.length) return html`<p>No group is logged yet.</p>`;
  const go = (step) =>
    change({ step: Math.max(found.first, Math.min(found.last, step)), line: undefined, sibling: undefined });
  return html`
    <div class="slider">
      <button type="button" aria-label="step before" disabled=${found.step <= found.first} onClick=${() => go(found.step - 1)}>‹</button>
      <label
        >step${" "}
        <${NumberField} value=${found.step} min=${found.first} max=${found.last} enter=${(step) => go(step || found.first)} />
      </label>
      <input
        type="range"
        aria-label="step"
        min=${found.first}
        max=${found.last}
        value=${found.step}
        onInput=${(event) => go(Number(event.target.value))}
      />
      <button type="button" aria-label="next step" disabled=${found.step >= found.last} onClick=${() => go(found.step + 1)}>›</button>
      <span class="soft">of ${found.last}</span>
    </div>
    <div class="split-view">
      <nav class="list" aria-label="Groups of the step">
        ${found.groups.map(
          (group) => html`<a
            key=${group.line}
            class="item"
            href=${link("groups", run, { ...query, step: found.step, line: group.line, sibling: undefined })}
            aria-current=${group === chosen ? "true" : undefined}
          >
            <span class="name">${group.prompt}</span>
            <${Rewards} group=${group} />
            <span class="soft"
              >mean ${figure(group.reward)}, ${figure(group.tokens)} tokens${group.tied ? ", tied" : ""}</span
            >
          </a>`,
        )}
      </nav>
      <${Group} key=${chosen.line} run=${run} line=${chosen.line} query=${query} />
    </div>
  `;
}

// One mark a sibling: its height is its reward among its siblings'.
function Rewards({ group }) {
  const known = group.rewards.filter((reward) => reward !== null);
  const [low, high] = [Math.min(0, ...known), Math.max(...known, 1e-9)];
  const right = group.right.filter(Boolean).length;
  return html`<svg
    class="strip"
    viewBox=${`0 0 ${group.rewards.length * 8} 20`}
    style=${{ width: `${Math.min(160, group.rewards.length * 8)}px` }}
    role="img"
    aria-label=${`${right} of ${group.rewards.length} right`}
  >
    ${group.rewards.map((reward, n) => {
      const height = reward === null ? 2 : 3 + (17 * (reward - low)) / (high - low);
      return html`<rect
        key=${n}
        x=${n * 8 + 1}
        width="6"
        y=${20 - height}
        height=${height}
        class=${group.right[n] ? "right" : group.cut[n] ? "cut" : "wrong"}
      />`;
    })}
  </svg>`;
}

function Group({ run, line, query }) {
  const [group, fault] = useLoaded(() => ask("group", { run, line }), [run, line]);
  const inspected = useInspected(run, line);
  const sort = SORTS[query.sort] ? query.sort : "reward";
  const siblings = useMemo(() => {
    const numbered = (group?.completions || []).map((completion, sibling) => ({ ...completion, sibling }));
    return numbered.sort(SORTS[sort][1]);
  }, [group, sort]);
  if (fault) return html`<${Fault} fault=${fault} />`;
  if (!group) return html`<p role="status">Reading the group …</p>`;
  const best = siblings[0];
  return html`<article class="group" aria-label=${`Group of ${group.prompt}`}>
    <h2>${group.prompt}</h2>
    <p class="soft">
      step ${group.step}, ${siblings.length} siblings. <a href=${link("prompts", run, { id: group.prompt })}>This prompt through time</a>
    </p>
    <${Question} messages=${group.messages} target=${group.target} />
    <div class="controls">
      <${Choice} label="sorted by" name="sort" value=${sort} options=${Object.entries(SORTS).map(([key, [title]]) => [key, title])} />
      <span class="soft">Marked: the first word that differs from the one on top.</span>
    </div>
    <${Measure} inspected=${inspected} by=${query.by} />
    <ol class="siblings">
      ${siblings.map(
        (each) => html`<${Sibling} key=${each.sibling} ...${{ each, best, query, inspected }} here=${String(each.sibling) === query.sibling} />`,
      )}
    </ol>
  </article>`;
}

function Sibling({ each, best, query, inspected, here }) {
  const measured = inspected.found?.siblings[each.sibling];
  const text = `${each.opening || ""}${each.text ?? ""}`;
  const first = `${best.opening || ""}${best.text ?? ""}`;
  const mark = useMemo(() => (each === best ? null : firstDifference(first, text)), [first, text]);
  const same = each !== best && text === first;
  return html`<li class=${`sibling ${here ? "here" : ""}`} id=${here ? "here" : undefined}>
    <div class="facts">
      <span class=${`badge ${each.solved ? "right" : each.formed ? "wrong" : "malformed"}`}
        >${each.solved ? "right" : each.formed ? "wrong" : "malformed"}</span
      >
      <b>reward ${each.reward === null ? "unknown" : figure(each.reward)}</b>
      ${Object.entries(each.parts || {}).map(([name, part]) => html`<span key=${name} class="part">${name} ${figure(part)}</span>`)}
      <span class=${each.advantage < 0 ? "down" : each.advantage > 0 ? "up" : "soft"}>advantage ${signed(each.advantage)}</span>
      <span>${figure(each.tokens)} tokens</span>
      ${each.finish === "length" && html`<span class="badge cut">cut off</span>`} ${same && html`<span class="soft">the same text</span>`}
      <span class="soft">sibling ${each.sibling + 1}</span>
    </div>
    ${measured
      ? html`<${Tokens} tokens=${measured.tokens} by=${query.by} siblings=${inspected.found.siblings} />`
      : html`<${Text} text=${text} mark=${query.text ? null : mark} find=${query.text} />`}
    ${Object.entries(each.notes || {}).map(
      ([name, note]) => html`<div key=${name} class="message"><span class="role">${name}</span><${Text} text=${value(note)} /></div>`,
    )}
  </li>`;
}

const MOST_HITS = 200;

// What the search has found so far; it goes on by itself until it has enough, or the log ends.
function Hits({ run, query, turn }) {
  const [state, set] = useState({ hits: [], next: 0, of: 0 });
  const [fault, setFault] = useState(null);
  const [wanted, setWanted] = useState(MOST_HITS);
  useEffect(() => {
    let current = true;
    set({ hits: [], next: 0, of: 0 });
    const look = async (from, hits) => {
      const found = await ask("find", { run, text: query.text, only: query.only, from });
      if (!current) return;
      const all = [...hits, ...found.hits];
      set({ hits: all, next: found.next, of: found.of });
      if (found.next !== null && all.length < wanted) await look(found.next, all);
    };
    look(0, []).catch(setFault);
    return () => (current = false);
  }, [run, query.text, query.only, wanted]);
  const looking = state.next !== null && state.hits.length < wanted;
  return html`<section class="hits" aria-label="Found">
    <p role="status">
      ${state.hits.length} answers${looking ? `, still looking: ${state.next} of ${state.of} groups` : ` in ${state.next ?? state.of} of ${state.of} groups`}
    </p>
    <${Fault} fault=${fault} />
    <ol class="plain scroll" tabindex="0">
      ${state.hits.map(
        (hit) => html`<li key=${`${hit.line}-${hit.sibling}`}>
          <a href=${link("groups", run, { ...query, step: hit.step, line: hit.line, sibling: hit.sibling })}
            >step ${hit.step}, ${hit.prompt}</a
          >${" "}<span class="soft">reward ${figure(hit.reward)}</span>
          <${Text} text=${hit.text} find=${query.text} />
        </li>`,
      )}
    </ol>
    ${!looking && state.next !== null && html`<button type="button" onClick=${() => setWanted(wanted + MOST_HITS)}>Look further</button>`}
  </section>`;
}
