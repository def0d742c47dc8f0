"""The class that lmms-eval makes and asks: `--model budgetvlm --model_args pretrained=reference,budget_ms=80`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from budgetvlm.errors import ConfigError
from budgetvlm.integrations.lmms import ModelArgs, cut, longest_answer, one_image, open_model, question_of, summary


@dataclass
class Cost(TokenCounts):
    """Tokens and all else that a request cost. The evaluator writes `to_dict` into each sample's ``token_counts``."""

    record: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the record; it holds lmms-eval's own fields too."""
        return self.record


class BudgetVLM(lmms):
    """A model that answers each request within a budget, one request at a time.

    Args:
        words: see `budgetvlm.integrations.lmms.ModelArgs`, and what lmms-eval adds: batch_size (1) and device.

    Raises:
        BudgetVLMError: arguments that cannot work; a model or a controller that cannot be opened.
    """

    is_simple = True

    def __init__(self, **words: Any) -> None:
        super().__init__()
        self.args = ModelArgs.parse(words)
        self.ask = open_model(self.args)

    @property
    def device(self) -> torch.device:
        """Where the tensors are that lmms-eval gathers from several processes."""
        return torch.device(self.args.device)

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answer all; the cost of each goes into the log of the samples, a summary into the results' throughput."""
        results, records = [], []
        for request in tqdm(requests, desc="budgetvlm", unit="request", disable=self.rank != 0):
            context, generation_kwargs, doc_to_visual, doc_id, task, split = request.args
            image = one_image(doc_to_visual(self.task_dict[task][split][doc_id]), f"sample {doc_id} of {task}")
            text, record = self.ask(image, question_of(context), longest_answer(self.args, generation_kwargs))
            text = cut(text, generation_kwargs)
            results.append(GenerationResult(text, Cost(record["input_tokens"], record["output_tokens"], None, record)))
            records.append(record)
            self.cache_hook.add_partial("generate_until", (context, generation_kwargs), text)
        if records:
            seconds = sum(record["latency_ms"] for record in records) / 1e3
            tokens = sum(record["output_tokens"] for record in records)
            log_metrics(seconds, tokens, tokens / seconds, {"total_requests": len(records), **summary(records)})
        return results

    def loglikelihood(self, requests: list[Any]) -> NoReturn:
        """Raise ConfigError: this model only generates."""
        _generated_only(requests, "loglikelihood")

    def generate_until_multi_round(self, requests: list[Any]) -> NoReturn:
        """Raise ConfigError: this model only generates."""
        _generated_only(requests, "generate_until_multi_round")


def _generated_only(requests: list[Any], kind: str) -> NoReturn:
    tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
    raise ConfigError(
        f"{tasks} asks for {kind}; budgetvlm answers generate_until only. Choose tasks of that output_type."
    )
