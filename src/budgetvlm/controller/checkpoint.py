"""Writing and reading trained controllers. Nothing is pickled but tensors and plain values: ``torch.load(path)`` opens
a checkpoint under its safe default.

`best_checkpoint.pt` holds ``controller_state_dict``, ``controller_config`` (for ``GRPOController(**config)``),
``knob_space``, ``feature_statistics``, ``guard``, ``metrics``, ``training`` (the options), ``epoch``, ``versions`` and
``schema_version``. Beside it lie ``config.json`` and ``model.safetensors``, the same controller without the rest.
"""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from budgetvlm._io import atomic_path, read_json, write_json
from budgetvlm._version import __version__
from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import BudgetVLMError, CheckpointError, DataError

SCHEMA_VERSION = 1
BEST, LAST = "best_checkpoint.pt", "last_checkpoint.pt"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
GUARD = "guard.json"  # what bounds latencies at run time; see `budgetvlm.guard.adaptive`
FEATURE_STATISTICS = ("image_input.", "lang_input.")


def versions() -> dict[str, str]:
    """What the checkpoint was made with."""
    return {"budgetvlm": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def write_checkpoint(path: str | Path, document: Mapping[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all.

    Raises:
        OutputError: the directory cannot be written, or the disk is full.
    """
    buffer = io.BytesIO()  # torch.save's own error on a full disk is no OSError
    torch.save({"schema_version": SCHEMA_VERSION, **document}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, foreign or of another schema version.
    """
    path = Path(path)
    if not path.is_file():
        directory = path.parent if path.suffix else path
        raise CheckpointError(f"{path} does not exist; `budgetvlm train --output_dir {directory}` makes it")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError and more for a bad file
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"{path} is not a checkpoint, or is truncated ({reason}). Train again.") from None
    found = document.get("schema_version") if isinstance(document, dict) else None
    if found != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {found}, and this version of budgetvlm reads {SCHEMA_VERSION}. It was made by "
            "another program or version; train again."
        )
    return dict(document)


def controller_document(
    controller: GRPOController, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """The part of a checkpoint that describes the controller; copies of its tensors."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in (state_dict or controller.state_dict()).items()}
    return {
        "controller_state_dict": state,
        "controller_config": controller.config,
        "knob_space": controller.knob_space.to_dict(),
        "feature_statistics": {name: tensor for name, tensor in state.items() if name.startswith(FEATURE_STATISTICS)},
        "versions": versions(),
    }


def load_controller(path: str | Path) -> GRPOController:
    """The controller of a checkpoint file, of a training directory or of `save_pretrained`, in evaluation mode.

    Raises:
        CheckpointError: nothing readable lies there.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / BEST).exists() and (path / CONFIG).exists():
            return from_pretrained(path)
        path = path / BEST
    document = read_checkpoint(path)
    missing = [name for name in ("controller_config", "controller_state_dict") if name not in document]
    if missing:
        raise CheckpointError(f"{path} lacks {' and '.join(missing)}; give a {BEST}, not the file for resuming")
    return _build(path, document["controller_config"], document["controller_state_dict"])


def save_pretrained(controller: GRPOController, directory: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    Raises:
        OutputError: the directory cannot be written, or the disk is full.
    """
    directory = Path(directory)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in controller.state_dict().items()}
    with atomic_path(directory / WEIGHTS) as temporary:
        temporary.write_bytes(tensors_to_bytes(tensors, metadata={"format": "pt"}))
    write_json(
        directory / CONFIG,
        {"schema_version": SCHEMA_VERSION, "controller_config": controller.config, "versions": versions()},
    )


def from_pretrained(directory: str | Path) -> GRPOController:
    """The controller that `save_pretrained` wrote, in evaluation mode.

    Raises:
        CheckpointError: a file is missing, truncated or foreign.
    """
    directory = Path(directory)
    try:
        document = read_json(directory / CONFIG)
        tensors = tensors_from_bytes((directory / WEIGHTS).read_bytes())
    except (DataError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} holds no saved controller ({error}); it needs {CONFIG} and {WEIGHTS}, which "
            "`budgetvlm train` and save_pretrained() write"
        ) from None
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(f"{directory / CONFIG} is not of schema version {SCHEMA_VERSION}; train again")
    return _build(directory, document.get("controller_config"), tensors)


def _build(path: Path, config: Any, tensors: Mapping[str, torch.Tensor]) -> GRPOController:
    try:
        controller = GRPOController(**config)
        controller.load_state_dict(dict(tensors))
    except (BudgetVLMError, TypeError, RuntimeError) as error:
        reason = json.dumps(str(error).strip().split("\n")[0], ensure_ascii=False)
        raise CheckpointError(f"{path} does not hold a usable controller: {reason}. Train again.") from error
    return controller.eval()
