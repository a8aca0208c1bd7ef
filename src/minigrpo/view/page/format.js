// Numbers and texts as people read them.

export function figure(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e-", "e−").replace(/^-/, "−");
  return value
    .toLocaleString("en", { maximumSignificantDigits: Math.max(digits, Math.ceil(Math.log10(size + 1))) })
    .replace("-", "−");
}

// A number on an axis, short.
export function tick(value) {
  const size = Math.abs(value);
  if (size === 0 || (size >= 1e-3 && size < 1e6)) return figure(value);
  return Number(value.toPrecision(3)).toExponential().replace("e-", "e−").replace("e+", "e").replace(/^-/, "−");
}

export function signed(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const fixed = Math.abs(value).toFixed(digits);
  return (Number(fixed) === 0 ? "" : value > 0 ? "+" : "−") + fixed;
}

export function percent(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.round(seconds);
  const two = (count, unit, rest, small) => `${count} ${unit}${rest ? ` ${rest} ${small}` : ""}`;
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return two(Math.floor(whole / 60), "min", whole % 60, "s");
  return two(Math.floor(whole / 3600), "h", Math.floor((whole % 3600) / 60), "min");
}

export function bytes(count) {
  if (count < 1000) return `${count} B`;
  const unit = ["kB", "MB", "GB", "TB"];
  let value = count;
  let at = -1;
  while (value >= 1000) {
    value /= 1000;
    at += 1;
  }
  return `${value.toPrecision(3)} ${unit[at]}`;
}

export function value(any) {
  if (any === null || any === undefined) return "–";
  if (typeof any === "number") return figure(any);
  return typeof any === "object" ? JSON.stringify(any) : String(any);
}

// A text in pieces, so that characters that steer the display are shown instead of obeyed: [{text, sign}].
const STEERING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]/gu;

export function pieces(text) {
  const found = [];
  let from = 0;
  for (const match of text.matchAll(STEERING)) {
    if (match.index > from) found.push({ text: text.slice(from, match.index) });
    const code = match[0].codePointAt(0);
    found.push({ sign: code < 32 ? `\\x${code.toString(16).padStart(2, "0")}` : `U+${code.toString(16).toUpperCase()}` });
    from = match.index + match[0].length;
  }
  if (from < text.length || !found.length) found.push({ text: text.slice(from) });
  return found;
}

// Where b first differs from a, as [start, end) of the differing word in b; null where they are the same.
export function firstDifference(a, b) {
  if (a === b) return null;
  const limit = Math.min(a.length, b.length);
  let at = 0;
  while (at < limit && a[at] === b[at]) at += 1;
  const isSpace = (i) => /\s/.test(b[i]);
  let start = Math.min(at, Math.max(0, b.length - 1));
  while (start > 0 && !isSpace(start) && !isSpace(start - 1)) start -= 1;
  let end = Math.max(at, start + 1);
  while (end < b.length && !isSpace(end)) end += 1;
  return b.length ? [start, Math.min(end, start + 200)] : null;
}
