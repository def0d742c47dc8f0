"""How sure a model was of each token of its answers at one setting: recorded once, as features for a second decision.

Needs a model of the package's own adapter, whose head can be listened to. Shapes: S samples, D features.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from budgetvlm.controller.run_directory import fingerprint
from budgetvlm.errors import DataError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.journal import Journal
from budgetvlm.profiling.prepare.document import read_document
from budgetvlm.profiling.prepare.splits import TASK_SPLIT
from budgetvlm.profiling.prepare.task_samples import find_samples
from budgetvlm.table import ProfileTable
from budgetvlm.tasks import load_task
from budgetvlm.vlm import load_vlm

BATCH = 32
TOKENS = 4  # of an answer, each of which gets features of its own
COMMON = 20  # training samples that have a token in one place; it is then a feature
MOST_OTHER = 0.02  # share of the answers that may be scored otherwise than in the table: other machines round otherwise

Pass = dict[
    str, Any
]  # sample_id, text, score, token_ids, steps: [log-probability, margin to the next, entropy] a token


class Listener:
    """Stands in for a decoder's head and notes log-probability, margin and entropy of each step's first choice."""

    def __init__(self, head: Any) -> None:
        self.head, self.steps = head, list[torch.Tensor]()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(hidden)
        log_probs = logits.float().log_softmax(-1)
        best = log_probs.topk(2).values
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        self.steps.append(torch.stack([best[:, 0], best[:, 0] - best[:, 1], entropy], -1))
        return logits


@contextmanager
def listening(vlm: Any) -> Iterator[Listener]:
    """Listens to the model's head inside the ``with`` block."""
    head = vlm.decoder.head
    vlm.decoder.head = listener = Listener(head)
    try:
        yield listener
    finally:
        vlm.decoder.head = head


def record(data: Path, table: ProfileTable, first: int, path: Path) -> list[Pass]:
    """A pass over all samples at setting ``first``, in the table's order; what ``path`` holds already is kept.

    Raises:
        DataError: answers are scored otherwise than in the table.
        OutputError: ``path`` is of other samples, of another setting or model, or cannot be written.
    """
    source, setting = read_document(data), table.knob_space.settings[first]
    header = {"setting": dict(setting), "samples": fingerprint(table, None), "model": source["source"]["model"]}
    with Journal(path, header) as journal:
        done = sum(len(batch) for batch in journal.entries)
        if done < len(table):
            vlm, task = load_vlm(source["model_path"]), load_task(source["dataset_name"])
            places = find_samples(task, table.sample_ids, sorted(set(table.groups[TASK_SPLIT])))
            length = int(table.metadata["exp5_config"]["max_new_tokens"])
            with tqdm(total=len(table), initial=done, desc="first pass", unit="answer", file=sys.stderr) as bar:
                for start in range(done, len(table), BATCH):
                    samples = [place.sample for place in places[start : start + BATCH]]
                    journal.append(answer(vlm, task, samples, setting, length))
                    bar.update(len(samples))
        passes = [one for batch in journal.entries for one in batch]
    other = np.mean(np.array([one["score"] for one in passes]) != table.accuracy[:, first])
    if other > MOST_OTHER:
        raise DataError(
            f"the pass is scored otherwise than in {data} on {other:.0%} of the samples: it is of another model or "
            "data set. Prepare the data again."
        )
    return passes


def answer(vlm: Any, task: Any, samples: Sequence[Any], setting: Setting, length: int) -> list[Pass]:
    """One batch of answers with their confidences."""
    with listening(vlm) as listener:
        images, questions = [s.load_image() for s in samples], [s.question for s in samples]
        answers = vlm.generate_batch(images, questions, setting, max_new_tokens=length)
    steps = torch.stack(listener.steps, 1).double().numpy().round(6)
    return [
        {
            "sample_id": sample.sample_id, "text": one.text, "score": float(task.score(one.text, sample)),
            "token_ids": one.token_ids, "steps": rows[: len(one.token_ids)].tolist(),
        }
        for sample, one, rows in zip(samples, answers, steps, strict=True)
    ]  # fmt: skip


def confidences(passes: Sequence[Pass], train: np.ndarray) -> np.ndarray:
    """Of each token, of the whole answer, and which answer it was, float32 ``[S, D]``.

    Args:
        train: the samples that tell which answers are common, bool ``[S]``.
    """
    size = np.array([[min(len(one["steps"]), TOKENS)] for one in passes])
    steps, tokens = np.zeros((len(passes), TOKENS, 3)), np.full((len(passes), TOKENS), -1)
    for row, (one, (n,)) in enumerate(zip(passes, size, strict=True)):
        steps[row, :n], tokens[row, :n] = one["steps"][:n], one["token_ids"][:n]
    log_probs, margins, entropies = np.moveaxis(steps, 2, 0)
    probabilities = np.where(np.arange(TOKENS) < size, np.exp(log_probs), 0)
    least, mean = log_probs.min(1), log_probs.sum(1) / size[:, 0]
    whole = np.stack([mean, least, np.exp(least), entropies.max(1), size[:, 0]], 1)
    parts = [log_probs, probabilities, margins, entropies, whole]
    for column in tokens.T:
        values, counts = np.unique(column[train], return_counts=True)
        parts.append(column[:, None] == values[counts >= COMMON])
    return np.concatenate(parts, axis=1).astype(np.float32)
