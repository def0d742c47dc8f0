// Numbers and settings in words, and a short way to make elements.

const NAMES = { max_crops: "tile", top_k: "expert", num_active_blocks: "block" };

export const ms = (value) => `${digits(value)} ms`;

export function digits(value) {
  return value < 100 ? value.toFixed(value < 10 ? 2 : 1) : value.toFixed(0);
}

// For a small cell whose unit is said elsewhere: whole ms, or seconds.
export const shortTime = (value) => (value < 1000 ? value.toFixed(0) : `${(value / 1000).toFixed(1)} s`);

export const percent = (value) => `${Math.round(100 * Math.min(1, Math.max(0, value)))}%`;

export function knobText(name, value) {
  const word = NAMES[name];
  return word ? `${value} ${word}${value === 1 ? "" : "s"}` : `${name} ${value}`;
}

export const knobName = (name) => (NAMES[name] ? `${NAMES[name]}s` : name);

export const settingText = (setting) => Object.entries(setting).map(([name, value]) => knobText(name, value)).join(", ");

// An element with attributes and children; text is never taken for HTML.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
