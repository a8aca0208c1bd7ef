// The frame of the page: which run, which of its pages, whether it is live, and the keys.

import { html, render, useEffect, useRef, useState } from "./vendor/htm-preact-standalone.js";
import { ask, follow, takeToken } from "./api.js";
import { link, useAddress } from "./state.js";
import { Runs } from "./pages/runs.js";
import { One } from "./pages/one.js";
import { Why } from "./pages/why.js";
import { Groups } from "./pages/groups.js";
import { Prompts } from "./pages/prompts.js";
import { Stages } from "./pages/stages.js";

const PAGES = [
  ["runs", "Runs", Runs],
  ["run", "One run", One],
  ["why", "Why", Why],
  ["groups", "Groups", Groups],
  ["prompts", "Prompts", Prompts],
  ["stages", "Stages", Stages],
];
const STATES = { running: "live", killed: "killed", idle: "not running" };

function App() {
  const address = useAddress();
  const [library, setLibrary] = useState(null);
  const [fault, setFault] = useState(null);
  const [turn, setTurn] = useState(0); // rises with every change of the files that are looked at
  const page = PAGES.find(([name]) => name === address.page) || PAGES[0];
  const chosen = address.run || library?.first || library?.runs[0]?.name || "";
  const run = page[0] === "runs" ? "" : chosen;

  const load = async () => {
    try {
      const found = await ask("runs");
      setLibrary(found);
      setFault(null);
      return found;
    } catch (refused) {
      setFault(refused);
      return null;
    }
  };
  useEffect(() => {
    let end = () => {};
    let gone = false;
    load().then(async (found) => {
      if (!found || gone) return;
      const known = run ? (await ask("run", { run }).catch(() => null))?.news : found.news;
      if (gone) return;
      end = follow(run, known, async () => {
        setTurn((n) => n + 1);
        await load();
      });
    });
    return () => {
      gone = true;
      end();
    };
  }, [run]);
  useKeys(run || chosen);
  const heading = useRef(null);
  useEffect(() => {
    document.title = `${page[1]}${run ? ` · ${run}` : ""} · minigrpo view`;
  }, [page[0], run]);

  if (fault?.status === 401) return html`<${Closed} />`;
  if (!library) return html`<main class="wide"><p role="status">${fault ? String(fault.message) : "Reading the runs …"}</p></main>`;
  const about = library.runs.find((each) => each.name === run);
  const Page = page[2];
  return html`
    <a class="skip" href="#main" onClick=${(event) => (event.preventDefault(), heading.current.focus())}>To the content</a>
    <header>
      <a class="brand" href=${link("runs")}><b>minigrpo</b> view</a>
      <nav aria-label="Pages">
        ${PAGES.map(
          ([name, title], n) => html`<a
            key=${name}
            href=${link(name, name === "runs" ? "" : chosen)}
            aria-current=${name === page[0] ? "page" : undefined}
            title=${`key ${n + 1}`}
            >${title}</a
          >`,
        )}
      </nav>
      ${page[0] !== "runs" &&
      html`<label class="which"
        ><span class="hidden">Run</span>
        <select value=${run} onChange=${(event) => (location.hash = link(page[0], event.target.value))}>
          ${library.runs.map((each) => html`<option key=${each.name} value=${each.name}>${each.name}</option>`)}
        </select></label
      >`}
    </header>
    <main id="main" tabindex="-1" ref=${heading}>
      ${fault && html`<p class="note bad" role="alert">The server does not answer: ${String(fault.message)}</p>`}
      ${about &&
      html`<div class="state" role="status">
        <span class=${`dot ${about.state}`}></span>
        <span>${STATES[about.state]}</span>
        <span data-step=${about.steps}>step ${about.steps}${about.of ? ` of ${about.of}` : ""}</span>
        ${about.task && html`<span>${about.task}</span>`} ${about.model && html`<span>${about.model}</span>`}
      </div>`}
      ${library.runs.length
        ? html`<${Page} key=${page[0] + run} run=${run} about=${about} library=${library} query=${address.query} turn=${turn} />`
        : html`<p>
            There is no run in <code>${library.folder}</code> yet. Train one, and it appears here by itself:
            <code>minigrpo quickstart</code>
          </p>`}
    </main>
    <${Help} />
  `;
}

function Closed() {
  return html`<main class="wide">
    <h1>This address is not enough</h1>
    <p>
      The runs are shown only to whoever has the token. Open the whole address that <code>minigrpo view</code> printed in
      its terminal, with what stands behind <code>#</code>; every start has a new one.
    </p>
  </main>`;
}

const KEYS = [
  ["1 – 6", "the pages"],
  ["← → on a chart", "read its values; Home, End, Page up and Page down leap"],
  [", and .", "the step before, the next step (Groups)"],
  ["k and j", "the group before, the next group (Groups)"],
  ["?", "this list"],
];

function Help() {
  return html`<dialog id="help" aria-labelledby="help-title">
    <h2 id="help-title">Keys</h2>
    <dl>${KEYS.map(([key, what]) => html`<dt key=${key}><kbd>${key}</kbd></dt><dd>${what}</dd>`)}</dl>
    <form method="dialog"><button>Close</button></form>
  </dialog>`;
}

function useKeys(run) {
  useEffect(() => {
    const pressed = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
      if (event.key === "?") document.getElementById("help").showModal();
      const page = PAGES[Number(event.key) - 1];
      if (page) location.hash = link(page[0], page[0] === "runs" ? "" : run);
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, [run]);
}

takeToken();
addEventListener("hashchange", takeToken);
render(html`<${App} />`, document.getElementById("app"));
