// The state of the page is its address: #/PAGE/RUN?name=value. Every state is a link.

import { useEffect, useState } from "./vendor/htm-preact-standalone.js";

export function parse(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [page = "", run = ""] = path.split("/").map(decodeURIComponent);
  return { page: page || "runs", run, query: Object.fromEntries(new URLSearchParams(query)) };
}

export function link(page, run, query = {}) {
  const known = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const text = new URLSearchParams(known).toString();
  return `#/${page}${run ? `/${encodeURIComponent(run)}` : ""}${text ? `?${text}` : ""}`;
}

// Change parts of the state; `push` leaves the old one to the Back button.
export function change(query, push = false) {
  const now = parse(location.hash);
  const hash = link(now.page, now.run, { ...now.query, ...query });
  if (hash === location.hash) return;
  if (push) location.hash = hash;
  else {
    history.replaceState(null, "", hash);
    dispatchEvent(new HashChangeEvent("hashchange"));
  }
}

export function useAddress() {
  const [address, set] = useState(() => parse(location.hash));
  useEffect(() => {
    const read = () => set(parse(location.hash));
    addEventListener("hashchange", read);
    return () => removeEventListener("hashchange", read);
  }, []);
  return address;
}

// Load something when `keys` change; keeps the old while the new is on its way. [data, fault, reload]
export function useLoaded(load, keys) {
  const [state, set] = useState({ data: null, fault: null });
  const [turn, again] = useState(0);
  useEffect(() => {
    let current = true;
    load().then(
      (data) => current && set({ data, fault: null }),
      (fault) => current && set((old) => ({ data: old.data, fault })),
    );
    return () => (current = false);
  }, [...keys, turn]);
  return [state.data, state.fault, () => again((n) => n + 1)];
}
