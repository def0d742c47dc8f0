"""What one kind of engine is told beside OpenAI's fields, and how it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from budgetvlm.knobs import KNOBS, Value

# Families whose image processor takes options with each request at vLLM, as counts of tokens have shown.
STEERED_BY_KWARGS = {"gemma3", "idefics3", "smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl"}
TRUST_FLAG = "--trust-request-mm-kwargs"


@dataclass(frozen=True)
class Dialect:
    """One kind of engine.

    Attributes:
        knobs: those that it takes with each request.
        takes_options: whether a request may say what the image processor is told.
        takes_setting: whether it is told the setting itself.
        load_metrics: names of its figures of requests that run and that wait.
        lossless: format of images that have no file. Writing and reading PNG takes 45 ms for 640 x 480 pixels on a CPU
            and BMP 2 ms; sending the larger file takes a few more.
        health: where it says whether it is well, below its host or, without a slash, below its API.
    """

    name: str
    knobs: tuple[str, ...] = ("max_crops",)
    takes_options: bool = False
    takes_setting: bool = False
    load_metrics: tuple[str, ...] = ()
    lossless: str = "BMP"
    health: str = "models"

    def fields(self, setting: Mapping[str, Value], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body's fields of a setting.

        Args:
            setting: values of the knobs that go with a request.
            options: of the image processor.
        """
        if self.takes_setting:
            return {"setting": dict(setting)} if setting else {}
        return {"mm_processor_kwargs": dict(options)} if options else {}


DIALECTS = {
    one.name: one
    for one in (
        Dialect(
            "vllm",
            takes_options=True,
            load_metrics=("vllm:num_requests_running", "vllm:num_requests_waiting"),
            health="/health",
        ),
        Dialect("budgetvlm", KNOBS, takes_setting=True, health="/ready"),
        Dialect("openai", lossless="PNG"),
    )
}


def dialect_of(models: Mapping[str, Any]) -> Dialect:
    """Tell the kind of an engine from an entry of its list of models."""
    return DIALECTS.get(str(models.get("owned_by")), DIALECTS["openai"])
