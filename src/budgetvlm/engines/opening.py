"""Opening a model wherever it is: in this process, or behind an engine or a fleet of them.

What speaks to engines is imported where one is opened: whoever has none needs none of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from budgetvlm.engines.fleet_file import is_engine, read_fleet
from budgetvlm.errors import ConfigError
from budgetvlm.vlm import VLM, load_vlm, loading
from budgetvlm.vlm.fingerprint import model_fingerprint

if TYPE_CHECKING:
    from budgetvlm.engines.engine_model import EngineVLM


def open_model(
    path: str, *, model_path: str | None = None, device: str = "cpu", num_threads: int | None = None,
    trust_remote_code: bool = False,
) -> VLM:  # fmt: skip
    """Open a model by path or name, or the one that engines serve by their address or their fleet's file.

    Args:
        model_path: of the served model's configuration, where the fleet's file says none.
        device, num_threads, trust_remote_code: see `budgetvlm.vlm.load_vlm`.

    Raises:
        ConfigError: it cannot be opened so.
        EngineError: no engine is there, or one shows images in another way than its model would.
    """
    if not is_engine(path):
        return load_vlm(path, device=device, num_threads=num_threads, trust_remote_code=trust_remote_code)
    from budgetvlm.engines.fleet_opening import open_fleet

    return open_fleet(read_fleet(str(path), model_path), trust_remote_code=trust_remote_code)


def fingerprint_of(path: str, vlm: VLM | None = None) -> str:
    """Return the digest by which a model is known again; ``vlm``: it is open already, which an engine's needs."""
    if not is_engine(path):
        return model_fingerprint(loading.model_directory(path))
    return cast("EngineVLM", vlm or open_model(path)).fingerprint()


def bundled_controller(model_path: str) -> Path:
    """Find the directory of the controller that a model brings. Raises ConfigError: it brings none."""
    if is_engine(model_path):
        raise ConfigError(
            f"the engines of {model_path} bring no controller. Train one on their profiles (`budgetvlm profile`, "
            "`prepare` and `train --output_dir DIR`); then give DIR (--checkpoint DIR)"
        )
    return loading.bundled_controller(model_path)
