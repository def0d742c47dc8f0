// The grid of settings, the slider's scale, and what the preview says at a budget.

import { digits, knobName, knobText, make, ms, percent, settingText, shortTime } from "./words.js";

const find = (id) => document.getElementById(id);
const slider = find("budget");
let shown = null; // the preview, and its cells

// Settings are numbered in row-major order: the last knob varies fastest.
function settingsOf(knobs) {
  let all = [{}];
  for (const { name, values } of knobs) all = all.flatMap((one) => values.map((value) => ({ ...one, [name]: value })));
  return all;
}

// Show another request's preview: a table for each value of the leading knobs, the last two are its rows and columns.
export function showPreview(preview, budgetMs) {
  const settings = settingsOf(preview.knobs);
  const [rows, columns] = [preview.knobs.at(-2), preview.knobs.at(-1)];
  const size = (rows?.values.length ?? 1) * columns.values.length;
  const cells = settings.map((setting, k) => cell(settingText(setting), preview.expected_ms[k]));
  const tables = [];
  for (let start = 0; start < settings.length; start += size) {
    tables.push(table(preview.knobs, settings[start], cells.slice(start, start + size)));
  }
  find("settings").replaceChildren(...tables);
  find("settings").style.setProperty("--columns", columns.values.length);
  shown = { ...preview, settings, cells };
  drawScale(preview);
  slider.max = preview.budgets_ms.length - 1;
  slider.value = nearest(preview.budgets_ms, budgetMs ?? firstBudget(preview));
  slider.disabled = false;
  showBudget();
}

function cell(name, expectedMs) {
  const text = expectedMs === null ? "–" : shortTime(expectedMs);
  const state = make("span", { class: "unseen" });
  return make("td", { title: `${name}: expected ${expectedMs === null ? "never" : ms(expectedMs)}` }, text, state, make("i"));
}

function table(knobs, first, cells) {
  const [rows, columns] = [knobs.at(-2), knobs.at(-1)];
  const leading = knobs.slice(0, -2).map(({ name }) => knobText(name, first[name])).join(", ");
  const heads = columns.values.map((value) => {
    const [number, unit] = [make("span", { "aria-hidden": "true" }, `${value}`), make("span", { class: "unseen" }, knobText(columns.name, value))];
    return make("th", { scope: "col" }, number, unit);
  });
  const body = (rows?.values ?? [null]).map((value, n) => {
    const head = make("th", { scope: "row" }, value === null ? "" : knobText(rows.name, value));
    return make("tr", {}, head, ...cells.slice(n * heads.length, (n + 1) * heads.length));
  });
  const head = make("thead", {}, make("tr", {}, make("td", { "aria-hidden": "true" }, knobName(columns.name)), ...heads));
  return make("table", {}, make("caption", {}, leading), head, make("tbody", {}, ...body));
}

// The first budget that leaves a choice: a quarter of the settings.
function firstBudget({ budgets_ms, allowed, expected_ms }) {
  const index = allowed.findIndex((numbers) => 4 * numbers.length >= expected_ms.length);
  return budgets_ms[Math.max(index, 0)];
}

function nearest(budgets, wantedMs) {
  const distance = (ms) => Math.abs(Math.log(ms / wantedMs));
  return budgets.reduce((best, ms, n) => (distance(ms) < distance(budgets[best]) ? n : best), 0);
}

// Below the slider: a mark where each setting begins to be allowed, and round numbers of ms.
function drawScale({ budgets_ms, allowed, expected_ms }) {
  const last = budgets_ms.length - 1;
  const starts = expected_ms.map((_, k) => allowed.findIndex((numbers) => numbers.includes(k))).filter((n) => n >= 0);
  find("rug").replaceChildren(...starts.map((n) => at(make("i", { "data-start": n }), n / last)));
  const [low, high] = [Math.log(budgets_ms[0]), Math.log(budgets_ms[last])];
  const round = [1, 2, 5].flatMap((digit) => [0, 1, 2, 3, 4, 5].map((power) => digit * 10 ** power));
  const inside = round.filter((ms) => ms >= budgets_ms[0] && ms <= budgets_ms[last]);
  find("axis").replaceChildren(...inside.map((ms) => at(make("span", {}, `${ms}`), (Math.log(ms) - low) / (high - low))));
}

function at(element, share) {
  element.style.left = `${100 * share}%`;
  return element;
}

export const budgetMs = () => shown?.budgets_ms[slider.value];

// Budgets that are worth comparing: the tightest that a setting is sure to keep, an ample one, and one between.
export function threeBudgets() {
  const { budgets_ms, allowed, expected_ms } = shown;
  const possible = expected_ms.filter((ms) => ms !== null).length;
  const tight = Math.max(allowed.findIndex((numbers) => numbers.length > 0), 0);
  const ample = allowed.findIndex((numbers) => numbers.length === possible);
  const last = ample < 0 ? budgets_ms.length - 1 : ample;
  return [tight, Math.round((tight + last) / 2), last].map((n) => budgets_ms[n]);
}

// Light what the slider's budget allows, and say what would be chosen.
export function showBudget() {
  const n = Number(slider.value);
  const budget = shown.budgets_ms[n];
  const allowed = new Set(shown.allowed[n]);
  shown.cells.forEach((cell, k) => {
    cell.classList.toggle("lit", allowed.has(k));
    cell.classList.toggle("chosen", k === shown.choice[n]);
    cell.style.setProperty("--share", percent(shown.values[n][k]));
    cell.querySelector(".unseen").textContent = (allowed.has(k) ? " ms, allowed" : " ms, may be late") + (k === shown.choice[n] ? ", chosen" : "");
  });
  for (const mark of find("rug").children) mark.classList.toggle("lit", Number(mark.dataset.start) <= n);
  slider.style.setProperty("--filled", `${(100 * n) / (shown.budgets_ms.length - 1)}%`);
  slider.setAttribute("aria-valuetext", `${digits(budget)} milliseconds`);
  find("budget-text").replaceChildren(digits(budget), make("small", {}, " ms"));
  find("choice").replaceChildren(...choiceWords(n));
  find("change").replaceChildren(changeWords(n, 0.8, "A fifth less", shown.less[n]), changeWords(n, 1.2, "A fifth more", shown.more[n]));
}

const strong = (k) => make("b", {}, settingText(shown.settings[k]));

function choiceWords(n) {
  const [allowed, chosen, values] = [shown.allowed[n], shown.choice[n], shown.values[n]];
  const budget = ms(shown.budgets_ms[n]);
  const facts = ` (expected: ${ms(shown.expected_ms[chosen])}, ${percent(values[chosen])} right)`;
  if (!allowed.length) {
    return [`No setting is sure to keep ${budget}. The fastest is taken: `, strong(chosen), `${facts}.`];
  }
  const count = `${allowed.length} of ${values.length} settings ${allowed.length > 1 ? "keep" : "keeps"} ${budget}. The controller takes `;
  const why = `${facts}${allowed.length > 1 ? ", the best of them" : ""}. `;
  return [count, strong(chosen), why, ...betterWords(n, chosen)];
}

// The best setting that the budget does not allow, and what it would need.
function betterWords(n, chosen) {
  const values = shown.values[n];
  const out = values.map((_, k) => k).filter((k) => !shown.allowed[n].includes(k) && shown.expected_ms[k] !== null);
  const best = out.reduce((top, k) => (top === null || values[k] > values[top] ? k : top), null);
  if (best === null || values[best] <= values[chosen]) return ["None of the others is expected to do better."];
  const from = shown.allowed.findIndex((numbers) => numbers.includes(best));
  const needs = from < 0 ? "" : `, but needs ${ms(shown.budgets_ms[from])}`;
  return [`Better would be ${settingText(shown.settings[best])} (${percent(values[best])} right)${needs}.`];
}

function changeWords(n, factor, name, other) {
  const [chosen, values] = [shown.choice[n], shown.values[n]];
  const title = make("dt", {}, `${name}: ${ms(factor * shown.budgets_ms[n])}`);
  if (other === chosen) return make("div", {}, title, make("dd", {}, "the same setting"));
  const points = Math.round(100 * (values[other] - values[chosen]));
  const change = points ? ` (${points > 0 ? "+" : "−"}${Math.abs(points)} points)` : "";
  const text = `${settingText(shown.settings[other])}: ${percent(values[other])} right${change}`;
  return make("div", {}, title, make("dd", {}, text));
}
