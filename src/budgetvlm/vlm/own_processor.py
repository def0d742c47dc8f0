"""The model's own processor of Transformers, to compare prompts with and to try unknown types with.

It is made without the parts that only videos and sounds need.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from budgetvlm._io import read_json
from budgetvlm.vlm.prompt import IMAGE, SOME_SIZE
from budgetvlm.vlm.protocol import Conversation


class NoReference(Exception):
    """There is nothing to compare with; the message says why."""


class _Absent:
    """A part of a processor that is asked for its settings and never used."""

    def __getattr__(self, name: str) -> None:
        return None


def processor_of(directory: Path, **parts: Any) -> Any:
    """Make the processor of the model in a directory of its tokenizer and these parts; others are never used.

    Raises NoReference: Transformers has none for this type of model, or it cannot be made here.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    model_type = read_json(directory / "config.json").get("model_type")
    found = processor_class_from_name(_named(directory) or PROCESSOR_MAPPING_NAMES.get(model_type, ""))
    if found is None:
        raise NoReference(f"Transformers has no processor for model_type {model_type!r}")
    parts["tokenizer"] = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    lenient = _without_parts_for_videos(found)
    try:
        settings, _ = lenient.get_processor_dict(directory, local_files_only=True)
        args = [parts.get(name, _Absent()) for name in lenient.get_attributes()]
        with patch.dict(vars(sys.modules[found.__module__]), num2words=str):
            return lenient.from_args_and_dict(args, settings)
    except Exception as error:  # it may miss any part of a model's directory
        raise NoReference(f"{found.__name__} cannot be made: {type(error).__name__}: {error}") from None


def _named(directory: Path) -> str | None:
    """Return the class of processor that a model's files name."""
    files = (directory / name for name in ("processor_config.json", "preprocessor_config.json"))
    named = (read_json(path).get("processor_class") for path in files if path.is_file())
    return next((str(name) for name in named if name), None)


def _without_parts_for_videos(processor_class: Any) -> Any:
    """Return a processor's class that takes anything for a part that needs torchvision."""
    taken = {
        "check_argument_for_proper_class": lambda self, name, part: type(part),
        "__repr__": lambda self: "processor",
    }
    return type(processor_class.__name__, (processor_class,), taken)


class OwnProcessor:
    """The processor of the model in a directory; the family's `Images` give its image processor. Raises NoReference."""

    def __init__(self, directory: Path, images: Any) -> None:
        self._images = images
        self._processor = processor_of(directory, image_processor=images.set_to(*SOME_SIZE, images.most_crops))
        if not self._processor.chat_template:
            self._processor.chat_template = self._processor.tokenizer.chat_template

    def ids(self, said: Conversation, max_crops: int, *, plain: bool = False) -> tuple[int, ...]:
        """Return the token ids of a prompt with images of one size, in which special tokens' names may be plain text.

        Raises NoReference: the processor has no such setting, or no way to keep special tokens plain.
        """
        size, images = (said.images[0].height, said.images[0].width), iter(said.images)
        options = self._images.options(*size, max_crops)
        if options is None:
            raise NoReference(f"the processor has nothing like max_crops={max_crops}")
        turns: list[Any] = [
            {
                **turn,
                "content": [{**part, "image": next(images)} if part == IMAGE else part for part in turn["content"]],
            }
            for turn in said.turns
        ]
        self._processor.image_processor = self._images.set_to(*size, max_crops)
        try:
            if not self._processor.chat_template and not plain:
                done = self._processor(images=said.images[0], text=f"<image>{said.question}", images_kwargs=options)
                return tuple(done["input_ids"][0])
            done = self._processor.apply_chat_template(
                turns,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"images_kwargs": options},
                **({"sanitize_control_tokens": True} if plain else {}),
            )
        except Exception as error:
            if plain:  # many processors know no such thing
                raise NoReference(str(error)) from None
            raise
        return tuple(done["input_ids"][0].tolist())
