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

const SHORT = {
  reward: "mean of the step",
  accuracy: "right",
  format: "well-formed",
  informative_groups: "groups that differ",
  "completions/mean_length": "mean",
  "completions/min_length": "shortest",
  "completions/max_length": "longest",
  "completions/clipped_ratio": "cut off",
  "clip_ratio/low_mean": "below",
  "clip_ratio/high_mean": "above",
  "clip_ratio/region_mean": "either",
  "eval/accuracy": "right",
  "eval/reward": "reward",
  "eval/format": "well-formed",
};

export function shortName(name) {
  return SHORT[name] || name.replace(/^rewards\/(.*)\/mean$/, "$1").replace(/^(seconds|memory_gb|resample)\//, "");
}

// The charts of one run: a title, its figures, and the figure whose sentence explains it. `share`: from 0 to 1.
export function chartsOf(columns) {
  const names = Object.keys(columns).filter((name) => known(columns[name]).length);
  const like = (pattern) => names.filter((name) => pattern.test(name));
  const charts = [
    { id: "reward", title: "Reward", names: ["reward"], band: "reward_std", about: "reward" },
    { id: "functions", title: "Each reward function", names: like(/^rewards\/.*\/mean$/), about: "rewards/NAME/mean" },
    { id: "right", title: "Right and well-formed", names: ["accuracy", "format"], about: "accuracy", share: true },
    { id: "informative", title: "Groups that teach", names: ["informative_groups"], about: "frac_reward_zero_std", share: true },
    {
      id: "length",
      title: "Length, tokens",
      names: ["completions/mean_length", "completions/min_length", "completions/max_length"],
      about: "completions/mean_length",
    },
    { id: "cut", title: "Cut off", names: ["completions/clipped_ratio"], about: "completions/clipped_ratio", share: true },
    { id: "held", title: "Held-out prompts", names: like(/^eval\//), about: "eval/accuracy", dots: true },
    { id: "kl", title: "KL from the reference", names: ["kl"], about: "kl" },
    { id: "entropy", title: "Entropy, nats", names: ["entropy"], about: "entropy" },
    { id: "gradient", title: "Gradient norm", names: ["grad_norm"], about: "grad_norm" },
    { id: "clip", title: "Held back by the clip", names: like(/^clip_ratio\//), about: "clip_ratio/region_mean" },
    { id: "gap", title: "Engine and policy apart, nats", names: like(/^(engine|off_policy)_gap$/), about: "engine_gap" },
    { id: "rate", title: "Learning rate", names: ["learning_rate"], about: "learning_rate" },
    { id: "advantages", title: "Advantages, mean size", names: ["advantages/abs_mean"], about: "advantages/abs_mean" },
    { id: "phases", title: "Seconds a step", names: like(/^seconds(\/|$)/), about: "seconds" },
    { id: "speed", title: "Tokens a second", names: ["tokens_per_second"], about: "tokens_per_second" },
    { id: "memory", title: "Memory, GB", names: like(/^memory_gb\//), about: "memory_gb/rollout", plan: true },
    { id: "resample", title: "Prompts tried in place of ties", names: like(/^resample\//), about: "resample/tried" },
    { id: "unscored", title: "Not scored", names: ["unscored"], about: "unscored", share: true },
    { id: "skipped", title: "Steps thrown away", names: ["skipped"], about: "skipped" },
  ].map((chart) => ({ ...chart, names: chart.names.filter((name) => names.includes(name)) }));
  const shown = new Set([...charts.flatMap((chart) => chart.names), "reward_std", "frac_reward_zero_std", "num_tokens", "loss"]);
  const rest = names.filter((name) => !shown.has(name) && !/^rewards\/.*\/std$/.test(name));
  const more = rest.map((name) => ({ id: name, title: name, names: [name], about: name }));
  // A figure that is 0 in every step has nothing to show: no truncation, no clipping.
  const moves = (name) => known(columns[name]).some((value) => value !== 0);
  return [...charts, ...more].filter((chart) => chart.names.length && (chart.id === "reward" || chart.names.some(moves)));
}
