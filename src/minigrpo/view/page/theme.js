// Colours of the style sheet, as a canvas needs them, and the words of the axes.

import { duration, figure } from "./format.js";

// Kinds of marks that are drawn, and in which colour.
export const MARK_COLOURS = { alarm: "--warn", failed: "--bad", killed: "--bad", resumed: "--accent", stopped: "--soft" };

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export function lineColour(at) {
  return colour(`--line-${(at % 8) + 1}`);
}

export function axisName(axis) {
  return { time: "after", tokens: "tokens" }[axis] || "step";
}

export function axisValue(axis, value) {
  return axis === "time" ? duration(value) : figure(value);
}
