"""Checkpoints of trained controllers.

`best_checkpoint.pt` holds ``controller_state_dict``, ``controller_config`` (for ``GRPOController(**config)``),
``knob_space``, ``trained_on`` (the model and the samples), ``feature_statistics``, ``guard``, ``metrics``, ``training``
(the options), ``epoch``, ``versions`` and ``schema_version``. Beside it lie ``config.json`` and ``model.safetensors``,
the same controller without the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from budgetvlm._version import versions
from budgetvlm.controller.checkpoint_files import read_checkpoint, write_checkpoint
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.provenance import CONFIG
from budgetvlm.errors import CheckpointError

BEST, LAST = "best_checkpoint.pt", "last_checkpoint.pt"
PRICES = "price_curve.json"  # mean latency at each price; see `budgetvlm.controller.price_curve`
GUARD = "guard.json"  # bounds on latency at run time; see `budgetvlm.guard.adaptive`
FEATURE_STATISTICS = ("image_input.", "lang_input.")


def controller_document(controller: GRPOController) -> dict[str, Any]:
    """The part of a checkpoint that describes the controller; copies of its tensors."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in controller.state_dict().items()}
    return {
        "controller_state_dict": state,
        "controller_config": controller.config,
        "knob_space": controller.knob_space.to_dict(),
        "trained_on": controller.trained_on.to_dict(),
        "feature_statistics": {name: tensor for name, tensor in state.items() if name.startswith(FEATURE_STATISTICS)},
        "versions": versions("torch"),
    }


def load_controller(path: str | Path) -> GRPOController:
    """The controller of a checkpoint, a training directory or `save_pretrained`, for use. Raises CheckpointError."""
    path = Path(path)
    if path.is_dir():
        if not (path / BEST).exists() and (path / CONFIG).exists():
            return GRPOController.from_pretrained(path)
        path = path / BEST
    document = read_checkpoint(path)
    missing = [name for name in ("controller_config", "controller_state_dict") if name not in document]
    if missing:
        raise CheckpointError(f"{path} lacks {' and '.join(missing)}; give a {BEST}, not the file for resuming")
    parts = document["controller_config"], document["controller_state_dict"], document.get("trained_on", {})
    return GRPOController.restored(path, *parts)


def set_default_price(controller: GRPOController, price: float, directory: Path) -> None:
    """Give a trained controller another default price, also in the directory of its training. Raises OutputError."""
    controller.default_price.fill_(price)
    write_checkpoint(directory / BEST, {**read_checkpoint(directory / BEST), **controller_document(controller)})
    controller.save_pretrained(directory)


def save_pretrained(controller: GRPOController, directory: str | Path) -> None:
    """As `GRPOController.save_pretrained`."""
    controller.save_pretrained(directory)


def from_pretrained(directory: str | Path) -> GRPOController:
    """As `GRPOController.from_pretrained`."""
    return GRPOController.from_pretrained(directory)
