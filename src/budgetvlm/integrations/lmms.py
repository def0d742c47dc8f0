"""BudgetVLM as a model of lmms-eval: what its command line may say, and one request of it.

lmms-eval finds `manifest` by the entry point "budgetvlm" of the group "lmms_eval.models"; the class itself is in
`budgetvlm.integrations.lmms_model`, the only module that imports lmms-eval when it is loaded. Times in ms.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from budgetvlm.answer import Answer
from budgetvlm.decide import Terms, check_request
from budgetvlm.errors import ConfigError, InputError
from budgetvlm.knobs import KNOBS
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.vlm import Generation, load_vlm

MODEL_ID = "budgetvlm"
IMAGE_MARK = "<image>"  # tasks put it where an image belongs; the model's own prompt has a place for it
Request = Callable[[Image.Image, str, int], tuple[str, dict[str, Any]]]  # image, question, longest answer


def manifest() -> Any:
    """Tell lmms-eval where it finds the model; this is the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_ID, simple_class_path="budgetvlm.integrations.lmms_model.BudgetVLM")


@dataclass(frozen=True)
class ModelArgs:
    """What ``--model_args`` may say.

    Attributes:
        pretrained: "reference" or a model's directory.
        controller: a trained controller's directory; None: the one that comes with the model.
        budget_ms: time for each request. Either this or every knob has to be given.
        price: accuracy given for one latency of the full setting; None: the controller's own default.
        when_infeasible: "fastest" or "best_effort", where nothing is expected to keep the budget.
        max_new_tokens: longest answer; None: what the task asks for.
        device, num_threads: of torch.
        allow_other_model: take a controller that was made for other weights.
        knobs: a fixed setting instead of a controller, for a run of each setting.

    Raises:
        ConfigError: anything that cannot work; all problems are named at once.
    """

    pretrained: str = "reference"
    controller: str | None = None
    budget_ms: float | None = None
    price: float | None = None
    when_infeasible: str = "fastest"
    max_new_tokens: int | None = None
    device: str = "cpu"
    num_threads: int | None = None
    allow_other_model: bool = False
    knobs: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        problems = []
        given = [name for name, _ in self.knobs]
        if bool(given) == (self.budget_ms is not None):
            problems.append(
                "give budget_ms=N, so that a controller chooses, or each of "
                f"{', '.join(KNOBS)}, for one fixed setting; given: {'both' if given else 'neither'}"
            )
        if given and self.controller is not None:
            problems.append(f"controller={self.controller} has nothing to choose beside a fixed setting")
        if self.when_infeasible not in ("fastest", "best_effort"):
            problems.append(
                f"when_infeasible={self.when_infeasible!r} leaves samples without an answer or is unknown; choose "
                "fastest or best_effort"
            )
        if self.max_new_tokens is not None and (type(self.max_new_tokens) is not int or self.max_new_tokens < 1):
            problems.append(f"max_new_tokens={self.max_new_tokens!r} has to be a whole number, 1 at least")
        if self.budget_ms is not None:
            try:
                check_request("?", Terms(self.budget_ms, self.price))
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("--model_args cannot work: " + "; ".join(problems))

    @classmethod
    def parse(cls, words: Mapping[str, Any]) -> ModelArgs:
        """Read the names and values that lmms-eval parsed; those that it adds (batch size, device) may be None.

        Raises:
            ConfigError: an unknown name, a batch, or values that cannot work.
        """
        words = {name: value for name, value in words.items() if value is not None}
        batch = words.pop("batch_size", 1), words.pop("max_batch_size", 1)
        known = {*cls.__dataclass_fields__, *KNOBS} - {"knobs"}
        unknown = [name for name in words if name not in known]
        if unknown:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"--model_args has no {', '.join(unknown)}; known: {', '.join(sorted(known))}.{meant}")
        if any(str(size) != "1" for size in batch):
            raise ConfigError(f"batch_size={batch[0]}: requests are answered one at a time, as they are timed; give 1")
        knobs = tuple((name, words.pop(name)) for name in KNOBS if name in words)
        return cls(**words, knobs=knobs)


def open_model(args: ModelArgs) -> Request:
    """Return a function that answers one request and says what it cost.

    Raises:
        BudgetVLMError: the model or its controller cannot be opened, or they do not fit.
    """
    if args.budget_ms is None:
        vlm = load_vlm(args.pretrained, device=args.device, num_threads=args.num_threads)
        setting = vlm.knob_space.setting(**dict(args.knobs))

        def ask_at_setting(image: Image.Image, question: str, max_new_tokens: int) -> tuple[str, dict[str, Any]]:
            made = vlm.generate(image, question, setting, max_new_tokens=max_new_tokens)
            return made.text, _record(made, dict(setting), made.total_ms)

        return ask_at_setting
    budget_ms = args.budget_ms
    model = AdaptiveVLM.from_pretrained(
        args.pretrained, args.controller, device=args.device, num_threads=args.num_threads,
        allow_other_model=args.allow_other_model,
    )  # fmt: skip

    def ask(image: Image.Image, question: str, max_new_tokens: int) -> tuple[str, dict[str, Any]]:
        answer: Answer = model.generate(  # type: ignore[call-overload]
            image,
            question,
            budget_ms=budget_ms,
            price=args.price,
            max_new_tokens=max_new_tokens,
            when_infeasible=args.when_infeasible,
        )
        kept = {name: getattr(answer, name) for name in ("budget_ms", "budget_met", "feasible")}
        return answer.answer, _record(answer, dict(answer.setting), answer.latency_ms) | kept

    return ask


def _record(made: Answer | Generation, setting: dict[str, Any], latency_ms: float) -> dict[str, Any]:
    """What the log says of a request, with the field names that lmms-eval and `budgetvlm import` know."""
    return {
        "input_tokens": made.num_vision_tokens + made.num_language_tokens,
        "output_tokens": made.num_output_tokens,
        "vision_tokens": made.num_vision_tokens,
        "latency_ms": round(latency_ms, 4),
        "stages_ms": {stage: round(ms, 4) for stage, ms in made.stages_ms.items()},
        "setting": setting,
        "finish_reason": made.finish_reason,
    }


def one_image(visuals: Any, where: str) -> Image.Image:
    """Return the image of a sample, from what a task calls its visuals.

    Raises:
        InputError: none, several, or something that is no image.
    """
    visuals = visuals if isinstance(visuals, Sequence) and not isinstance(visuals, str) else [visuals]
    flat = [v for item in visuals for v in (item if isinstance(item, list | tuple) else [item])]
    if len(flat) != 1 or not isinstance(flat[0], Image.Image):
        kinds = ", ".join(type(v).__name__ for v in flat) or "nothing"
        raise InputError(f"{where} has {kinds} to be seen; budgetvlm answers questions about one image. Leave it out.")
    return flat[0]


def question_of(context: str) -> str:
    """Return the task's prompt without the mark of the image."""
    return " ".join(context.replace(IMAGE_MARK, " ").split()) if IMAGE_MARK in context else context.strip()


def longest_answer(args: ModelArgs, generation_kwargs: Mapping[str, Any]) -> int:
    """Return the most tokens of an answer; the user's word goes before the task's."""
    return args.max_new_tokens or int(generation_kwargs.get("max_new_tokens") or 16)


def cut(text: str, generation_kwargs: Mapping[str, Any]) -> str:
    """Return the answer up to the first of the task's stop words."""
    until = generation_kwargs.get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return latency (p50, p95) and, with a budget, the share of requests beyond it."""
    times = sorted(record["latency_ms"] for record in records)
    figures = {"p50_latency_ms": times[len(times) // 2], "p95_latency_ms": times[int(0.95 * (len(times) - 1))]}
    met = [record["budget_met"] for record in records if "budget_met" in record]
    return figures | ({"violation_rate": 1 - sum(met) / len(met)} if met else {})
