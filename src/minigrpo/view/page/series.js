// Columns of metrics.jsonl as what a chart draws: over steps, time or tokens, smoothed, with names.

export const AXES = { step: "steps", time: "time", tokens: "tokens" };

// The values of the chosen axis: the step itself, or seconds or completion tokens summed up to its end.
export function axisOf(metrics, axis) {
  const name = { time: "seconds", tokens: "num_tokens" }[axis];
  if (!name || !metrics.columns[name]) return metrics.steps;
  let sum = 0;
  return metrics.columns[name].map((value) => (sum += value ?? 0));
}

// The mean of each value and the `window - 1` known ones before it.
export function smooth(values, window) {
  if (window <= 1) return values;
  const recent = [];
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    recent.push(value);
    if (recent.length > window) recent.shift();
    return recent.reduce((sum, each) => sum + each, 0) / recent.length;
  });
}

export function known(values) {
  return (values || []).filter((value) => value !== null && value !== undefined);
}

export function summary(label, values) {
  const found = known(values);
  if (!found.length) return `${label}: nothing known`;
  const show = (value) => Number(value.toPrecision(4));
  const [low, high] = found.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  return `${label}: from ${show(found[0])} to ${show(found.at(-1))}, lowest ${show(low)}, highest ${show(high)}`;
}
