// Ask the server. The token comes with the address, behind #, which browsers send to nobody; it is kept for this origin
// alone (scheme, host and port), so that links and new tabs work.

const KEY = "minigrpo.token";

export function takeToken() {
  const found = /[#&]token=([\w-]+)/.exec(location.hash);
  if (!found) return;
  localStorage.setItem(KEY, found[1]);
  const rest = location.hash.replace(found[0], "");
  history.replaceState(null, "", rest.length > 1 ? rest : "#/");
}

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(question, query = {}, signal) {
  const known = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return answered(`api/${question}?${new URLSearchParams(known)}`, { signal });
}

// Begin something: the only question that is not only read.
export async function start(question, query) {
  const headers = { "Content-Type": "application/json" };
  return answered(`api/${question}`, { method: "POST", headers, body: JSON.stringify(query) });
}

async function answered(address, options) {
  const headers = { ...options.headers, Authorization: `Bearer ${localStorage.getItem(KEY) || ""}` };
  const answer = await fetch(address, { ...options, headers, cache: "no-store" });
  const data = await answer.json();
  if (!answer.ok) throw new Refused(answer.status, data.error);
  return data;
}

// Call `changed` whenever the files of a run (or of any run) are no longer what `news` says. Returns a function that
// ends it. Nothing is asked while the tab is hidden.
export function follow(run, news, changed) {
  const stop = new AbortController();
  let known = news;
  const visible = () =>
    new Promise((resolve) => {
      if (!document.hidden) resolve();
      else document.addEventListener("visibilitychange", () => resolve(), { once: true });
    });
  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  (async () => {
    while (!stop.signal.aborted) {
      await visible();
      try {
        const answer = await ask("wait", { run, news: known }, stop.signal);
        if (answer.news === known) continue;
        known = answer.news;
        await changed();
      } catch (fault) {
        if (stop.signal.aborted) return;
        if (fault.status === 401) return;
        await pause(2000); // the server was stopped, or the run moved: ask again
      }
    }
  })();
  return () => stop.abort();
}
