// The page: what was asked, when to ask the server again, and what to do with its answers.

import { ServerError, ask, modelName, preview, useKey } from "./api.js";
import { AnswerView } from "./answer.js";
import { budgetMs, showBudget, showPreview, threeBudgets } from "./settings.js";
import { make } from "./words.js";

const TYPING_MS = 300; // without a key, until a question is taken for finished

const find = (id) => document.getElementById(id);
const question = find("question");
const state = { image: "", model: "", running: null, looking: null, timer: 0 };

// ---- what is asked

async function dataUrl(blob) {
  const reader = new FileReader();
  await new Promise((resolve, reject) => {
    reader.onload = resolve;
    reader.onerror = () => reject(new ServerError("This file cannot be read."));
    reader.readAsDataURL(blob);
  });
  return reader.result;
}

async function takeImage(blob, name) {
  const url = await dataUrl(blob);
  const shown = find("image");
  shown.src = url;
  try {
    await shown.decode();
  } catch {
    shown.src = state.image;
    throw new ServerError(`${name} is not an image that this browser can show; try PNG or JPEG.`);
  }
  shown.alt = `The image that is asked about: ${name}`;
  state.image = url;
  for (const example of find("examples").children) example.setAttribute("aria-pressed", "false");
}

async function takeFile(file) {
  await takeImage(file, file.name || "the pasted image");
  find("suggestions").replaceChildren();
  await look();
}

async function takeExample(button) {
  const picture = button.querySelector("img");
  const response = await fetch(picture.src);
  await takeImage(await response.blob(), picture.alt);
  button.setAttribute("aria-pressed", "true");
  const questions = button.dataset.questions.split("|");
  find("suggestions").replaceChildren(...questions.map(suggestion));
  question.value = questions[0];
  await look();
}

function suggestion(text) {
  const button = make("button", { type: "button" }, text);
  button.addEventListener("click", guarded(() => {
    question.value = text;
    return look();
  }));
  return button;
}

const asked = () => ({ model: state.model, image: state.image, question: question.value.trim() });

// ---- what the server says

// Ask what would be chosen for this image and question; an earlier look that is not done yet is given up.
async function look() {
  clearTimeout(state.timer);
  state.timer = 0;
  state.looking?.abort();
  const ready = Boolean(state.image && question.value.trim());
  find("ask").disabled = find("compare").disabled = !ready;
  if (!ready) return;
  find("settings").setAttribute("aria-busy", "true");
  state.looking = new AbortController();
  const signal = state.looking.signal;
  const found = await preview(asked(), signal);
  if (signal.aborted) return;
  showPreview(found, budgetMs());
  find("settings").setAttribute("aria-busy", "false");
}

// Ask at a budget and show the answer as it comes.
async function answerInto(view, signal) {
  try {
    view.finish(await ask(asked(), view.budgetMs, (piece) => view.addText(piece), signal));
  } catch (error) {
    view.fail(error.name === "AbortError" ? "Stopped." : error.message);
    throw error;
  }
}

// Run one thing at a time; its button stops it.
async function run(button, work) {
  if (state.running) return state.running.abort();
  const label = button.textContent;
  state.running = new AbortController();
  button.textContent = "Stop";
  button.classList.add("stops");
  try {
    await work(state.running.signal);
  } finally {
    state.running = null;
    button.textContent = label;
    button.classList.remove("stops");
  }
}

const askOnce = guarded(() => run(find("ask"), async (signal) => {
  if (state.timer || budgetMs() === undefined) await look();
  find("answer").replaceChildren();
  await answerInto(new AnswerView(find("answer"), budgetMs()), signal);
}));

const compare = guarded(() => run(find("compare"), async (signal) => {
  find("three").replaceChildren();
  const views = threeBudgets().map((budget) => new AnswerView(find("three"), budget));
  const longest = () => Math.max(...views.map((view) => Math.max(view.budgetMs, view.result?.latency_ms ?? 0)));
  for (const view of views) { // one after another: they would wait for each other
    await answerInto(view, signal);
    for (const done of views.filter(({ result }) => result)) done.scaleTo(longest());
  }
}));

// ---- errors

function guarded(work) {
  return async (...given) => {
    showError(null);
    try {
      await work(...given);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ServerError)) throw error;
      showError(error);
    }
  };
}

function showError(error) {
  find("error").hidden = !error;
  find("error").querySelector("p").textContent = error?.message ?? "";
  find("key").hidden = error?.status !== 401;
}

// ---- events

async function start() {
  state.model = await modelName();
  find("model").textContent = state.model;
  await takeExample(find("examples").firstElementChild);
}

function connect() {
  for (const example of find("examples").children) {
    example.addEventListener("click", guarded(() => takeExample(example)));
  }
  find("upload").addEventListener("click", () => find("file").click());
  find("file").addEventListener("change", guarded(async ({ target }) => {
    if (target.files.length) await takeFile(target.files[0]);
    target.value = "";
  }));
  question.addEventListener("input", () => {
    clearTimeout(state.timer);
    state.timer = setTimeout(guarded(look), TYPING_MS);
  });
  find("budget").addEventListener("input", showBudget);
  find("request").addEventListener("submit", (event) => {
    event.preventDefault();
    askOnce();
  });
  find("compare").addEventListener("click", compare);
  find("error").lastElementChild.addEventListener("click", () => showError(null));
  find("key").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(find("key-text").value);
    guarded(state.model ? look : start)();
  });
  connectKeyboard();
  connectDropAndPaste();
  connectTheme();
}

function connectKeyboard() {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (!state.running && !find("ask").disabled) askOnce();
    }
    if (event.key === "Escape") state.running?.abort();
  });
}

function connectDropAndPaste() {
  const take = guarded(takeFile);
  const image = (transfer) => [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));
  const over = (on) => find("drop").classList.toggle("over", on);
  document.addEventListener("paste", (event) => {
    const file = image(event.clipboardData);
    if (file) {
      event.preventDefault();
      take(file);
    }
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    over(true);
  });
  document.addEventListener("dragleave", (event) => over(Boolean(event.relatedTarget)));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    const [file] = event.dataTransfer.files;
    if (file) take(file);
  });
}

function connectTheme() {
  const root = document.documentElement;
  const button = find("theme");
  const show = (dark) => button.setAttribute("aria-pressed", String(dark));
  const kept = localStorage.getItem("theme");
  if (kept) root.dataset.theme = kept;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  show(isDark());
  system.addEventListener("change", () => show(isDark()));
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
    show(isDark());
  });
}

connect();
guarded(start)();
