"""What a model is checked with: images, questions and settings, and the logits that they give.

Differences of logits are measured in standard deviations of the logits. Shapes: V words of the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from budgetvlm.knobs import KnobSpace, Setting
from budgetvlm.vlm.adapter import Adapter
from budgetvlm.vlm.conversation import is_plain
from budgetvlm.vlm.decoding import stopwatch
from budgetvlm.vlm.families.base import Images, TiledImages
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.own_processor import NoReference, OwnProcessor
from budgetvlm.vlm.prompt import EmbeddedPrompt
from budgetvlm.vlm.protocol import Conversation, Deadline, Generation

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


STEPS = 3  # tokens decoded in a check
READINGS = 6  # of each setting's prompt in all checks
ENOUGH_S = 1.0  # what takes longer is not timed again


class Broken(Exception):
    """A check that does not hold; the message says what was seen."""


class EncodedOnce:
    """Within a ``with`` block, what was encoded before comes from memory: single tiles, or whole pictures.

    Checks ask for the same ones many times, and encoding is most of their time.
    """

    def __init__(self, images: Images) -> None:
        self._images, self._renews = images, False
        self._name = "encode_tiles" if isinstance(images, TiledImages) else "encode"
        self._encode = getattr(images, self._name)
        self._seen: dict[Hashable, torch.Tensor] = {}

    def __enter__(self) -> EncodedOnce:
        setattr(self._images, self._name, self._tiles if self._name == "encode_tiles" else self._pictures)
        return self

    def __exit__(self, *_: object) -> None:
        delattr(self._images, self._name)

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Encode everything anew for a ``with`` block, so that it can be timed, and remember it."""
        self._renews = True
        try:
            yield
        finally:
            self._renews = False

    def _tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return features of tiles ``[n, ...]``, ``[n, T, C]``."""
        keys = [_digest(tile) for tile in tiles]
        return torch.stack(self._remembered(keys, lambda new: self._encode(tiles[new])))

    def _pictures(self, pixels: Sequence[torch.Tensor], layouts: Sequence[ImageLayout]) -> list[torch.Tensor]:
        keys = [(_digest(one), layout.grid) for one, layout in zip(pixels, layouts, strict=True)]
        return self._remembered(keys, lambda new: self._encode([pixels[i] for i in new], [layouts[i] for i in new]))

    def _remembered(
        self, keys: Sequence[Hashable], encode: Callable[[list[int]], Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        new = [i for i, key in enumerate(keys) if self._renews or key not in self._seen]
        if new:
            self._seen.update(zip([keys[i] for i in new], encode(new), strict=True))
        return [self._seen[key] for key in keys]


def _digest(pixels: torch.Tensor | Mapping[str, torch.Tensor]) -> bytes:
    parts = pixels.values() if isinstance(pixels, Mapping) else [pixels]
    held = b"".join(part.float().cpu().contiguous().numpy().tobytes() for part in parts)
    return blake2b(held, digest_size=16).digest()


class Probe:
    """A model, one or more questions about images, and the settings to try (None: all)."""

    def __init__(
        self,
        vlm: Adapter,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        settings: Sequence[Setting] | None = None,
    ) -> None:
        self.vlm, self.images, self.questions = vlm, list(images), list(questions)
        self.settings = list(vlm.knob_space.settings if settings is None else settings)
        self.memory = EncodedOnce(vlm.images)
        self._visual: dict[tuple[ImageLayout, int], torch.Tensor] = {}
        self._image_ms: dict[tuple[ImageLayout, int], dict[str, float]] = {}
        self._decoded: dict[Setting, tuple[torch.Tensor, list[int]]] = {}
        self.tolerance = TOLERANCE.get(vlm.model.dtype, TOLERANCE[torch.float32])

    @property
    def space(self) -> KnobSpace:
        return self.vlm.knob_space

    @cached_property
    def question_ids(self) -> list[Any]:
        return [self.vlm.prompt.question_ids(question) for question in self.questions]

    def crops(self, setting: Setting) -> int:
        return int(setting.get("max_crops", self.vlm.most_crops))

    def layout(self, max_crops: int, i: int = 0) -> ImageLayout:
        return self.vlm.images.layout_of(self.images[i], max_crops)

    def prompt(self, max_crops: int, i: int = 0, answer_ids: Sequence[int] = ()) -> EmbeddedPrompt:
        """Return the prompt of one image and question, encoded without a reused overview, with part of an answer."""
        visual = self.visual(max_crops, i)
        return self.vlm.embed_prompt(visual, self.question_ids[i], self.layout(max_crops, i), answer_ids)

    def visual(self, max_crops: int, i: int = 0) -> torch.Tensor:
        """Return visual tokens of one image ``[T, C]``; encoded once, and timed."""
        key = self.layout(max_crops, i), i
        if key not in self._visual:
            self._visual[key], self._image_ms[key] = self._encoded(max_crops, i)
        return self._visual[key]

    def image_ms(self, max_crops: int, repeats: int) -> dict[str, float]:
        """Return the fastest preprocessing and vision of the first image, `visual`'s own among them."""
        self.visual(max_crops)
        key = self.layout(max_crops), 0
        self._image_ms[key] = fastest(lambda: self._encoded(max_crops, 0)[1], repeats, [self._image_ms[key]])
        return self._image_ms[key]

    def _encoded(self, max_crops: int, i: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Encode an image anew."""
        lap, images = stopwatch(self.vlm.wait), self.vlm.images
        with self.memory.anew():
            pixels = images.all(self.images[i], max_crops)
            stages = {"preprocess": lap()}
            visual = images.encoded(pixels, None, self.layout(max_crops, i))
            return visual, {**stages, "vision": lap()}

    def logits(self, prompt: EmbeddedPrompt) -> torch.Tensor:
        """Return the logits behind the prompt ``[V]``, without a cache."""
        return self.vlm.decoder.logits(prompt.embeddings[None], **self.vlm.decoder_inputs([prompt]).prefill())[0]

    def logits_at(self, setting: Setting) -> torch.Tensor:
        """Return the logits behind the first prompt ``[V]``."""
        return self.decoded(setting)[0][0]

    def decoded(self, setting: Setting) -> tuple[torch.Tensor, list[int]]:
        """Return the logits behind the first prompt and behind each token of its answer, and these; decoded once.

        Returns:
            logits ``[1 + STEPS, V]``, each step's read with a cache; STEPS token ids.
        """
        if setting not in self._decoded:
            decoder, prompt = self.vlm.decoder, self.prompt(self.crops(setting))
            inputs, cache, ids = self.vlm.decoder_inputs([prompt]), decoder.new_cache(), []
            with self.vlm.apply(setting):
                logits = [decoder.logits(prompt.embeddings[None], cache, **inputs.prefill())]
                for _ in range(STEPS):
                    token = logits[-1].argmax(-1)
                    ids.append(int(token))
                    logits.append(decoder.logits(decoder.embed(token[:, None]), cache, **inputs.step(token)))
            self._decoded[setting] = torch.cat(logits), ids
        return self._decoded[setting]

    def read_at_once(self, setting: Setting, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits behind the first prompt and behind each token of its answer, without a cache."""
        prompt, decoder = self.prompt(self.crops(setting), answer_ids=ids), self.vlm.decoder
        with self.vlm.apply(setting):
            hidden = decoder.hidden(prompt.embeddings[None], **self.vlm.decoder_inputs([prompt]).prefill())
            logits: torch.Tensor = decoder.head(hidden[0, -1 - len(ids) :])
        return logits

    def seconds(self) -> float:
        """Return about how long the checks take, from one short reading and the encoding of a cheap image."""
        least = self.crops(self.space.cheapest)
        prompt, image_ms = self.prompt(least), sum(self.image_ms(least, 1).values())
        began_s = time.perf_counter()
        self.logits(prompt)
        read_s = (time.perf_counter() - began_s) / len(prompt)
        sizes = {crops: len(self.layout(crops).ids) for crops in {self.crops(s) for s in self.space.settings}}
        encoded = sum(sizes.values()) + max(sizes.values())  # once more by the model's own forward
        read = sum(sizes[self.crops(s)] for s in self.settings)
        return image_ms / 1e3 * encoded / sizes[least] + read_s * READINGS * read

    @cached_property
    def own_processor(self) -> OwnProcessor:
        """The model's own processor. Raises NoReference."""
        if self.vlm.prompt.is_own:
            raise NoReference("knobs.json brings a prompt of its own")
        return OwnProcessor(Path(self.vlm.prompt.tokenizer.name_or_path), self.vlm.images)

    def same_ids(self, said: Conversation, max_crops: int, *, plain: bool = False) -> None:
        """Compare a prompt's token ids with those of the model's own processor. Raises Broken, NoReference.

        One question about one image is tokenised in a shorter way, and compared in both ways.
        """
        wanted = self.own_processor.ids(said, max_crops, plain=plain)
        prompt, layouts = self.vlm.prompt, [self.vlm.images.layout_of(image, max_crops) for image in said.images]
        asked: list[str | Conversation] = [said, said.question] if is_plain(said) else [said]
        for question in asked:
            first, *texts = prompt.around(question, [layout.lead for layout in layouts])
            behind = ((*layout.ids, *text) for layout, text in zip(layouts, texts, strict=True))
            self._same_ids((*first, *chain.from_iterable(behind)), wanted, f"max_crops={max_crops}, {said}")

    def _same_ids(self, got: tuple[int, ...], wanted: tuple[int, ...], where: str) -> None:
        if got == wanted:
            return
        tokenizer = self.vlm.prompt.tokenizer
        place = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), len(got))
        ours, theirs = (tokenizer.convert_ids_to_tokens(ids[place : place + 3]) for ids in (got, wanted))
        raise Broken(
            f"{where}: from token {place} on {ours} "
            f"instead of the processor's {theirs}; {len(got)} tokens, {len(wanted)} of the processor"
        )

    def untouched(self, max_crops: int) -> torch.Tensor:
        """Return the logits of the model's own forward, with pixels of its own processor ``[V]``."""
        prompt = self.prompt(max_crops)
        family, model = self.vlm.family, self.vlm.model
        inputs = self.vlm.images.plain(self.images[0], max_crops) | family.plain_arguments(prompt, model)
        moved = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        return family.untouched_logits(model, prompt, moved)

    def answer(self, setting: Setting, max_new_tokens: int, deadline: Deadline | None = None) -> Generation:
        """Answer the first question."""
        return self.vlm.generate(
            self.images[0], self.questions[0], setting, max_new_tokens=max_new_tokens, deadline=deadline
        )

    def same(self, got: torch.Tensor, wanted: torch.Tensor, where: str) -> float:
        """Return how far apart two logits are, in standard deviations. Raises Broken: further than the tolerance."""
        apart = float((got.float() - wanted.float()).abs().max() / wanted.float().std())
        if not apart <= self.tolerance:
            raise Broken(f"{where}: logits differ by {apart:.2g} standard deviations")
        return apart


def fastest(
    measure: Callable[[], dict[str, float]], repeats: int, before: Sequence[dict[str, float]] = ()
) -> dict[str, float]:
    """Return the stages in ms that sum to the least, of some measurements taken before and of those taken here.

    Args:
        repeats: how many of them count behind a first one that warms up; fewer where they take long.
    """
    runs = list(before) or [measure()]
    while len(runs) < 1 + repeats and sum(sum(run.values()) for run in runs) < ENOUGH_S * 1e3:
        runs.append(measure())
    return min(runs[1:] or runs, key=lambda run: sum(run.values()))


def one_knob_at_a_time(space: KnobSpace) -> list[Setting]:
    """Return settings that differ in one knob, the full and the cheapest one.

    Other knobs than `max_crops` are turned where the image is small, which takes a fraction of the time.
    """
    small = small_image(space)
    near = {
        space.setting(**{**(space.full if name == "max_crops" else small), name: value})
        for name in space.names
        for value in space.values(name)
    }
    return [s for s in space.settings if s in near | {space.cheapest, space.full}]


def small_image(space: KnobSpace) -> Setting:
    """Return the full setting with the fewest crops."""
    return setting_with(space, **{name: space.cheapest[name] for name in space.names if name == "max_crops"})


def setting_with(space: KnobSpace, **values: float) -> Setting:
    """Return the full setting with other values."""
    return space.setting(**{**space.full, **values})


def own_values(vlm: Adapter) -> dict[str, int]:
    """Return the knob values of the untouched model."""
    experts = min((dial.get() for dial in vlm.dials), default=0)
    return {"max_crops": vlm.images.most_crops, "top_k": experts, "num_active_blocks": vlm.num_total_blocks}


def state_of(vlm: Adapter) -> tuple[Any, ...]:
    """Return what a setting changes, to be compared before and after."""
    return list(map(id, vlm.layers)), [dial.get() for dial in vlm.dials]


class TopKRecorder(TorchFunctionMode):
    """Records how many experts each router chooses per token: what `topk` over that many experts returns."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.chosen: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, torch.Tensor.topk):
            scores = args[0] if args else (kwargs or {})["input"]
            if scores.shape[-1] == self.num_experts:
                self.chosen.append(int(result[0].shape[-1]))
        return result
