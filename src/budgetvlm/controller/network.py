"""The controller: (image feature, language feature, budget, price) -> a distribution over the settings.

Shapes: B states, G settings drawn for a state, K settings, N knobs, Di and Dl features. Budgets and latencies in ms.

The policy is softmax over the settings of ``logit_scale * (value(state, setting) - price * latency / reference)``.
``value`` is on the accuracy scale, a sum of one head a knob and a joint term, so the knobs are chosen together. The
price enters as what it means, and the network learns only what the features, the budget and the price change. With an
entropy bonus of 1 / logit_scale the best ``value`` is each setting's expected accuracy (Ziebart et al. 2008: the
optimum of reward plus t x entropy is softmax(reward / t)), so an untrained controller whose values are the settings'
mean accuracies is the lookup table, and training starts from there (`start_from`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budgetvlm.controller.arguments import (
    NetworkOptions,
    bounds_tensor,
    check_arguments,
    check_state_dict,
    feature_matrices,
    per_state,
)
from budgetvlm.controller.checkpoint_files import read_pretrained, write_pretrained
from budgetvlm.controller.known_terms import nearest
from budgetvlm.controller.layers import BoundsLayer, LogEmbedding, Standardiser, head_sum_matrix
from budgetvlm.controller.provenance import TrainedOn
from budgetvlm.errors import BudgetVLMError, CheckpointError, InputError
from budgetvlm.knobs import KnobSpace, Value

GUIDE_KNOBS: dict[str, list[Value]] = {
    "max_crops": [2, 4, 6, 8, 10, 12],
    "top_k": [4, 8, 12],
    "num_active_blocks": [12, 13, 14, 15, 16],
}
LARGEST_LOG_RATIO = 4.0  # budgets beyond e**4 (55) times the reference, "no limit" among them, all look the same
SMALLEST_PRICE = 1e-4


class GRPOController(nn.Module):
    """A policy over the settings of a knob space.

    Args:
        image_feat_dim, lang_feat_dim: Di and Dl, widths of the raw features.
        budget_dim: width of the budget's embedding and of the price's.
        hidden_dim: width of the network between features and heads.
        knob_values: knob name -> allowed values; None means the space of the guide's model (`GUIDE_KNOBS`).
        latency_reference_ms: latency of the full setting (median on the training samples); budgets are read as
            multiples of it, and a price is accuracy given for one such latency.
        latency_ms: mean latency of each setting ``[K]``; None, for all or for one, means unknown: there a price acts
            through learning alone.
        bounds_ms: upper latency bound of each setting ``[K]`` (see `guard.static`); None allows every setting, a
            None among the bounds never allows that one (it was not measured).
        options: the rarely changed ones, by the names of `NetworkOptions`.

    Raises:
        ConfigError: sizes that are not positive and the like, all problems at once.
        KnobSpaceError: `knob_values` that are no knob space, or a knob with a reserved name.
    """

    latency_reference_ms: Tensor
    default_price: Tensor
    bounds_ms: Tensor
    latency_ms: Tensor
    value_matrix: Tensor
    head_sum: Tensor
    trained_on = TrainedOn()  # travels with the weights

    def __init__(
        self,
        image_feat_dim: int,
        lang_feat_dim: int,
        budget_dim: int = 32,
        hidden_dim: int = 256,
        knob_values: Mapping[str, Sequence[Value]] | None = None,
        latency_reference_ms: float = 1000.0,
        latency_ms: Sequence[float | None] | None = None,
        bounds_ms: Sequence[float | None] | None = None,
        **options: Any,
    ):
        super().__init__()
        self.knob_space = KnobSpace(GUIDE_KNOBS if knob_values is None else knob_values)
        network = NetworkOptions(**options)
        self._sizes: dict[str, Any] = {
            "image_feat_dim": image_feat_dim,
            "lang_feat_dim": lang_feat_dim,
            "budget_dim": budget_dim,
            "hidden_dim": hidden_dim,
            **asdict(network),
        }
        self.logit_scale, self.dropout = network.logit_scale, network.dropout
        check_arguments(self._sizes, self.knob_space, latency_reference_ms, latency_ms, bounds_ms)
        self._add_buffers(latency_reference_ms, network.default_price, latency_ms, bounds_ms)
        width = image_feat_dim + lang_feat_dim
        self.input_bounds = BoundsLayer(width, self.num_settings) if network.bounds_by_input else None
        self.image_input = Standardiser(image_feat_dim, network.feature_dim)
        self.lang_input = Standardiser(lang_feat_dim, network.feature_dim)
        self.budget_embedding = LogEmbedding(budget_dim)
        self.price_embedding = LogEmbedding(budget_dim)
        self.feature_layer = nn.Linear(self.image_input.out_dim + self.lang_input.out_dim, hidden_dim)
        self.context_layer = nn.Linear(2 * budget_dim, hidden_dim)
        # Mask and price term already say what budget and price mean; the values start out independent of both.
        nn.init.zeros_(self.context_layer.weight)
        nn.init.zeros_(self.context_layer.bias)
        layers: list[nn.Module] = [nn.SiLU(), nn.Dropout(network.dropout)]
        for _ in range(network.num_hidden_layers - 1):
            layers += [nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), nn.Dropout(network.dropout)]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.Linear(hidden_dim, sum(self.knob_space.sizes) + self.num_settings)
        nn.init.zeros_(self.heads.weight)  # the untrained policy is uniform but for the price
        nn.init.zeros_(self.heads.bias)

    def _add_buffers(
        self,
        reference: float,
        price: float,
        latency_ms: Sequence[float | None] | None,
        bounds_ms: Sequence[float | None] | None,
    ) -> None:
        """Register what is not learnt but has to travel with the weights.

        A latency of 0 means unknown, a bound of 0 allows its setting at every budget, a bound of infinity at none.
        """
        space = self.knob_space
        unknown: list[float | None] = [None] * self.num_settings
        self.register_buffer("latency_reference_ms", torch.tensor(float(reference)))
        self.register_buffer("default_price", torch.tensor(float(price)))
        self.register_buffer("latency_ms", torch.tensor([ms or 0.0 for ms in latency_ms or unknown]))
        self.register_buffer(
            "bounds_ms", torch.zeros(self.num_settings) if bounds_ms is None else bounds_tensor(bounds_ms)
        )
        self.register_buffer("value_matrix", torch.from_numpy(space.value_matrix.copy()))
        self.register_buffer("head_sum", head_sum_matrix(space), persistent=False)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``. Raises OutputError."""
        write_pretrained(self.config, self.state_dict(), self.trained_on.to_dict(), directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> GRPOController:
        """The controller that `save_pretrained` or training wrote there, ready for use. Raises CheckpointError."""
        return cls.restored(Path(directory), *read_pretrained(directory))

    @classmethod
    def restored(
        cls, source: Path, config: Any, tensors: Mapping[str, Tensor], trained_on: Mapping[str, Any]
    ) -> GRPOController:
        """A controller of this configuration with these weights and this origin, in evaluation mode.

        ``source``: where both were read, for the message. Raises CheckpointError: they make no usable controller.
        """
        try:
            controller = cls(**config)
            controller.load_state_dict(dict(tensors))
            controller.trained_on = TrainedOn.from_dict(trained_on)
        except (BudgetVLMError, TypeError, RuntimeError) as error:
            reason = json.dumps(str(error).strip().split("\n")[0], ensure_ascii=False)
            raise CheckpointError(f"{source} does not hold a usable controller: {reason}. Train again.") from error
        return controller.eval()

    @property
    def num_settings(self) -> int:
        return self.knob_space.num_settings

    @property
    def config(self) -> dict[str, Any]:
        """JSON values from which ``GRPOController(**controller.config)`` builds the same network, untrained."""
        latencies = [ms or None for ms in self.latency_ms.tolist()]
        bounds = [ms if ms < math.inf else None for ms in self.bounds_ms.tolist()]
        return {
            **self._sizes,
            "knob_values": self.knob_space.to_dict(),
            "latency_reference_ms": self.latency_reference_ms.item(),
            "latency_ms": latencies if any(latencies) else None,
            "bounds_ms": bounds if any(bounds) else None,
            "default_price": self.default_price.item(),
        }

    def fit_features(self, image_feat: Tensor, lang_feat: Tensor, rows: Tensor | None = None) -> None:
        """Fit standardisation (and principal components) on the training split, ``[S, Di]`` and ``[S, Dl]``.

        ``rows`` selects the training split's rows of the features; None means all.
        """
        self.image_input.fit(image_feat, rows)
        self.lang_input.fit(lang_feat, rows)

    def copy_feature_statistics(self, other: GRPOController) -> None:
        """Take over what `fit_features` found in a controller of the same sizes."""
        self.image_input.load_state_dict(other.image_input.state_dict())
        self.lang_input.load_state_dict(other.lang_input.state_dict())

    @torch.no_grad()
    def start_from(self, accuracy: Sequence[float]) -> None:
        """Make the untrained policy the lookup table of mean accuracies ``[K]``; NaN counts as the lowest one."""
        values = torch.as_tensor(accuracy).to(self.heads.bias)
        self.heads.bias[self.head_sum.shape[0] :] = values.nan_to_num(nan=float(values.nan_to_num(nan=1.0).min()))

    def forward(
        self, image_feat: Tensor, lang_feat: Tensor, budget: Tensor | float, price: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """Compute the logits of a batch of states.

        Args:
            image_feat, lang_feat: raw features ``[B, Di]`` and ``[B, Dl]``, or ``[Di]`` and ``[Dl]`` for one state.
            budget: ms, a number, ``[B]`` or ``[B, 1]``; infinity means no limit.
            price: accuracy for one reference latency, a number, ``[B]`` or ``[B, 1]``; None means `default_price`.

        Returns:
            ``{knob name: [B, n_values], ..., "joint": [B, K], "feasible": bool [B, K]}``; `setting_logits` adds them
            up. ``feasible`` marks settings whose bounds lie within the budget, and applies if no other mask is given.

        Raises:
            InputError: features of another width, a budget that is not positive, a price below 0, NaN in either.
        """
        image, lang = feature_matrices(image_feat, lang_feat, self.image_input, self.lang_input)
        budget_B = per_state(budget, len(image), "budget", self.latency_reference_ms)
        price_B = per_state(
            self.default_price if price is None else price, len(image), "price", self.latency_reference_ms
        )
        basis = self.context_basis(*nearest(self, budget_B, price_B))
        raw = self.contextual_heads(self.feature_layer(self.encode(image, lang)), basis)
        out = self._named(raw)
        out["joint"] = out["joint"] + self.price_term(price_B)
        out["feasible"] = self.feasible(budget_B, self.bounds_of(image, lang))
        return out

    def bounds_of(self, image_feat: Tensor, lang_feat: Tensor) -> Tensor:
        """Latency bounds of states by their raw features, ``[B, K]`` in ms, or ``[K]`` where the input changes none."""
        return self.bounds_ms if self.input_bounds is None else self.input_bounds(image_feat, lang_feat)

    def encode(self, image_feat: Tensor, lang_feat: Tensor) -> Tensor:
        """Standardise raw features and put them side by side, ``[B, F]``; this has no parameters."""
        return torch.cat([self.image_input(image_feat), self.lang_input(lang_feat)], dim=-1)

    def context_basis(self, budget: Tensor, price: Tensor) -> Tensor:
        """What the embeddings read of budget and price, ``[B]`` each -> ``[B, 2, C]``; this has no parameters."""
        largest = self.bounds_ms.masked_fill(self.bounds_ms.isinf(), 0.0).amax()
        # A budget beyond the largest bound allows what no limit at all allows, so it has to look the same.
        budget = torch.where(largest > 0, budget.clamp(max=largest), budget)
        budget_log = (budget / self.latency_reference_ms).log().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        price_log = (price.clamp(min=SMALLEST_PRICE) / 0.1).log().clamp(max=LARGEST_LOG_RATIO)
        return torch.stack([self.budget_embedding.basis(budget_log), self.price_embedding.basis(price_log)], dim=1)

    def contextual_heads(self, hidden: Tensor, basis: Tensor) -> Tensor:
        """Heads side by side and the joint term, ``[B, sum(sizes) + K]``.

        Features and context are added in the first hidden layer, so several budgets can share one pass over the
        features.

        Args:
            hidden: output of `feature_layer` on the encoded features, ``[B, hidden_dim]`` or ``[1, hidden_dim]``.
            basis: of `context_basis`, ``[B, 2, C]`` or ``[1, 2, C]``.
        """
        context = torch.cat([self.budget_embedding(basis[:, 0]), self.price_embedding(basis[:, 1])], dim=-1)
        out: Tensor = self.heads(self.trunk(hidden + self.context_layer(context)))
        return out * self.logit_scale

    def price_term(self, price: Tensor) -> Tensor:
        """The part of each setting's logit that the price subtracts, ``[B]`` -> ``[B, K]``."""
        return price[:, None] * (self.latency_ms * (-self.logit_scale / self.latency_reference_ms))

    def summed(self, raw: Tensor) -> Tensor:
        """Add up heads and joint term for each setting, ``[B, sum(sizes) + K]`` -> ``[B, K]``."""
        split = self.head_sum.shape[0]
        return torch.addmm(raw[:, split:], raw[:, :split], self.head_sum)

    def _named(self, raw: Tensor) -> dict[str, Tensor]:
        parts = raw.split([*self.knob_space.sizes, self.num_settings], dim=-1)
        return dict(zip((*self.knob_space.names, "joint"), parts, strict=True))

    def setting_logits(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Add up the logits of `forward` for each setting, ``[B, K]``; nothing is masked."""
        heads = torch.cat([logits[name] for name in self.knob_space.names], dim=-1)
        return torch.addmm(logits["joint"], heads, self.head_sum)

    def feasible(self, budget: Tensor, bounds_ms: Tensor | None = None) -> Tensor:
        """Which settings' bounds (None: those of no input) lie within each budget ``[B]``; a row may be all False."""
        largest = torch.finfo(budget.dtype).max  # an infinite bound is above an infinite budget
        return (self.bounds_ms if bounds_ms is None else bounds_ms) <= budget.reshape(-1, 1).clamp(max=largest)

    def allowed(self, feasible: Tensor) -> Tensor:
        """The mask ``[B, K]`` with the setting of the smallest bound allowed in each row that is empty."""
        cheapest = torch.arange(self.num_settings, device=feasible.device) == self.bounds_ms.argmin()
        return torch.where(feasible.any(dim=-1, keepdim=True), feasible, cheapest)

    def log_policy(self, logits: Mapping[str, Tensor], feasible: Tensor | None = None) -> Tensor:
        """Log-probability of every setting, ``[B, K]``, -inf where not allowed.

        ``feasible`` None means the mask within ``logits``, if there is one.
        """
        total = self.setting_logits(logits)
        mask = logits.get("feasible") if feasible is None else feasible
        if mask is not None:
            if mask.shape[-1] != self.num_settings:
                raise InputError(
                    f"the feasible mask has {mask.shape[-1]} columns, but there are {self.num_settings} settings"
                )
            total = total.masked_fill(~self.allowed(mask.bool().expand_as(total)), -math.inf)
        return total.log_softmax(dim=-1)

    def sample_actions(
        self,
        logits: Mapping[str, Tensor],
        deterministic: bool = False,
        feasible: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Choose a setting for each state: the likeliest one, or one drawn from the policy.

        Args:
            feasible: bool ``[B, K]``, the settings to choose from; None means the mask that `forward` found. A row
                without any gets the setting with the smallest bound.

        Returns:
            ``{knob name: values [B], ..., "indices": {knob name: [B]}, "setting_index": [B]}``.
        """
        log_policy = self.log_policy(logits, feasible)
        if deterministic:
            chosen = log_policy.argmax(dim=-1)
        else:
            chosen = torch.multinomial(log_policy.exp(), 1, generator=generator)[:, 0]
        indices = torch.from_numpy(self.knob_space.value_indices).to(chosen.device)[chosen]
        actions: dict[str, Any] = {}
        for column, (name, values) in enumerate(self.knob_space.knobs):
            actions[name] = torch.tensor(values, device=chosen.device)[indices[:, column]]
        actions["indices"] = {name: indices[:, column] for column, name in enumerate(self.knob_space.names)}
        actions["setting_index"] = chosen
        return actions

    def log_probs(self, logits: Mapping[str, Tensor], setting_index: Tensor, feasible: Tensor | None = None) -> Tensor:
        """Log-probability of settings ``[B]`` or ``[B, G]``, in the same shape; -inf where not allowed."""
        log_policy = self.log_policy(logits, feasible)
        wide = setting_index if setting_index.ndim == 2 else setting_index[:, None]
        return log_policy.gather(1, wide).reshape(setting_index.shape)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Refuse another knob space or other sizes before anything is copied."""
        given = {name: state_dict.get(prefix + name) for name in self.state_dict()}
        check_state_dict(given, self.state_dict(), self.knob_space)
        super()._load_from_state_dict(state_dict, prefix, *args)
