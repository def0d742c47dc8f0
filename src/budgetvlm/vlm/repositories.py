"""From the name of a model to its directory: a directory as given, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from budgetvlm.errors import ConfigError

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def is_hub_name(model_path: str) -> bool:
    """Return whether this reads like organisation/name and is no directory."""
    return bool(_HUB_NAME.fullmatch(model_path)) and not Path(model_path).exists()


def fetch(name: str, *, trust_remote_code: bool = False) -> Path:
    """Fetch a repository of the hub, or find it in its cache; return its directory. Raises ConfigError."""
    from huggingface_hub import errors, snapshot_download

    patterns = [*_WANTED, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise ConfigError(
            f"the model {name!r} is gated: its authors ask you to accept their terms. Accept them on the model's page "
            "of the hub, log in with `hf auth login`, and run this again"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"there is no model {name!r} on the hub, or it is private. Check the spelling; a private one needs "
            "`hf auth login`. A directory is given by its path, for example ./{0}".format(name.split("/")[-1])
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ConfigError(
            f"the model {name!r} is not in the hub's cache, and the hub cannot be asked: it is offline (HF_HUB_OFFLINE "
            "is set, or there is no network). Fetch it once with a network, or give a directory"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"the model {name!r} cannot be fetched: {reason}. Try again, or give a directory") from None
