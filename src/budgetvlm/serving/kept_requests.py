"""What is kept of a served request for learning: what a replica says of its decision, and the record made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from budgetvlm.feedback.request_store import Decided
from budgetvlm.serving.jobs import Job, question_of

if TYPE_CHECKING:
    from budgetvlm.controller.network import GRPOController
    from budgetvlm.decide import Seen

LARGEST = 6e4  # of a feature: float16 holds no more
Told = tuple[dict[str, Any], list[bytes]]


def identity(controller: GRPOController) -> dict[str, str]:
    """Which controller decides: a digest of its weights, and its knobs, by which settings are numbered."""
    digest = hashlib.sha256()
    for name, tensor in sorted(controller.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return {"controller": digest.hexdigest()[:16], "knobs": json.dumps(controller.knob_space.to_dict())}


def told_of(seen: Seen) -> Told:
    """What a replica says of what its decision saw, and as bytes of float32 the features and the probabilities."""
    said = {
        "seen_ms": float(seen.budget_ms), "price": float(seen.price), "allowed": np.packbits(seen.allowed).tolist(),
        "chosen": int(seen.chosen), "answered": int(seen.answered),
    }  # fmt: skip
    return said, [
        one.astype(np.float32, copy=False).tobytes() for one in (seen.image, seen.language, seen.probabilities)
    ]


def kept(job: Job, answer: dict[str, Any], said: dict[str, Any], blocks: Sequence[bytes], questions: bool) -> Decided:
    """The record of a request that was answered.

    Args:
        said, blocks: of `told_of`, with `identity`. questions: whether the question is kept.
    """
    values = {**said, "allowed": bytes(said["allowed"])}
    values |= dict(zip(("image", "language", "probabilities"), blocks, strict=True))
    for name in ("image", "language"):
        feature = np.frombuffer(values[name], np.float32)
        values[name] = np.clip(feature, -LARGEST, LARGEST).astype(np.float16).tobytes()
    question = question_of(job.messages) if questions else None
    return Decided(
        id=job.id, budget_ms=job.given_budget_ms, latency_ms=answer["latency_ms"], question=question, **values
    )
