"""Files of trained controllers as plain configurations and tensors; nothing here knows the network.

Nothing is pickled but tensors and plain values: ``torch.load(path)`` opens a checkpoint under its safe default.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from budgetvlm._io import atomic_path, read_json, write_json
from budgetvlm._version import versions
from budgetvlm.controller.provenance import CONFIG
from budgetvlm.errors import CheckpointError, DataError

SCHEMA_VERSION = 1
WEIGHTS = "model.safetensors"


def write_checkpoint(path: str | Path, document: Mapping[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all. Raises OutputError."""
    buffer = io.BytesIO()  # torch.save's own error on a full disk is no OSError
    torch.save({"schema_version": SCHEMA_VERSION, **document}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote. Raises CheckpointError: missing, truncated, foreign, of another version."""
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


def write_pretrained(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], trained_on: Mapping[str, Any], directory: str | Path
) -> None:
    """Write ``config.json``, with the controller's origin, and ``model.safetensors``. Raises OutputError."""
    directory = Path(directory)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(directory / WEIGHTS) as temporary:
        temporary.write_bytes(tensors_to_bytes(plain, metadata={"format": "pt"}))
    document = {"schema_version": SCHEMA_VERSION, "controller_config": config, "trained_on": trained_on}
    write_json(directory / CONFIG, {**document, "versions": versions("torch")})


def read_pretrained(directory: str | Path) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """Read configuration, tensors and origin (empty in old files) of `write_pretrained`. Raises CheckpointError."""
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
    return document.get("controller_config"), tensors, document.get("trained_on", {})
