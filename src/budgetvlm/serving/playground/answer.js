// One answer: its text as it comes, whether it was in time, and its times as a bar against the budget.

import { digits, make, ms, settingText } from "./words.js";

const STAGES = ["queue", "preprocess", "vision", "controller", "prefill", "decode", "rest"];
const NAMES = { queue: "waiting", rest: "the rest" };
const LONG = 40; // characters from which an answer is set as prose

export class AnswerView {
  constructor(parent, budgetMs) {
    const root = document.getElementById("answer-template").content.firstElementChild.cloneNode(true);
    this.root = root;
    this.budgetMs = budgetMs;
    this.text = root.querySelector(".text");
    this.text.classList.add("running");
    parent.append(root);
    root.querySelector(".bar").hidden = true;
  }

  addText(piece) {
    this.text.textContent += piece;
    this.text.classList.toggle("long", this.text.textContent.length > LONG);
  }

  finish(result) {
    this.text.classList.remove("running");
    this.result = result;
    this.#showVerdict(result);
    this.#showStages(stageTimes(result));
    this.scaleTo(Math.max(result.latency_ms, this.budgetMs));
    this.root.querySelector(".why").replaceChildren(make("b", {}, settingText(result.setting)), `. ${result.why}`);
  }

  fail(message) {
    this.text.classList.remove("running");
    const verdict = this.root.querySelector(".verdict");
    verdict.classList.add("failed");
    verdict.textContent = message;
  }

  #showVerdict({ latency_ms, budget_met, predicted_ms }) {
    const state = make("b", { class: budget_met ? "met" : "missed" }, budget_met ? "in time" : "late");
    const bound = predicted_ms ? `, expected at most ${ms(predicted_ms)}` : "";
    this.root.querySelector(".verdict").replaceChildren(`${ms(latency_ms)} of ${ms(this.budgetMs)}: `, state, bound);
  }

  #showStages(times) {
    const items = times.map(([name, time]) => {
      return make("li", {}, make("i", { class: name }), `${NAMES[name] ?? name} `, make("b", {}, digits(time)));
    });
    this.root.querySelector(".stages").replaceChildren(...items, make("li", {}, "ms"));
    const bar = this.root.querySelector(".bar");
    bar.hidden = false;
    const words = times.map(([name, time]) => `${NAMES[name] ?? name} ${ms(time)}`).join(", ");
    bar.setAttribute("aria-label", `Times of the answer against ${ms(this.budgetMs)}: ${words}`);
  }

  // Draw the bar so that its whole length is a little more than this time.
  scaleTo(longestMs) {
    const share = (time) => `${(100 * time) / (1.04 * longestMs)}%`;
    const parts = stageTimes(this.result).map(([name, time]) => {
      const part = make("i", { class: name });
      part.style.width = share(time);
      return part;
    });
    this.root.querySelector(".times").replaceChildren(...parts);
    const limit = this.root.querySelector(".limit");
    limit.style.left = share(this.budgetMs);
    limit.classList.toggle("early", this.budgetMs < 0.4 * longestMs);
    limit.replaceChildren(make("span", {}, `budget ${ms(this.budgetMs)}`));
  }
}

// Name and ms of each part of an answer's time; what no part explains is the rest. A microsecond is rounding.
function stageTimes({ stages_ms, queue_ms, latency_ms }) {
  const times = { queue: queue_ms ?? 0, ...stages_ms };
  const known = Object.values(times).reduce((sum, time) => sum + time, 0);
  times.rest = Math.max(latency_ms - known, 0);
  return STAGES.filter((name) => times[name] > 0.001).map((name) => [name, times[name]]);
}
