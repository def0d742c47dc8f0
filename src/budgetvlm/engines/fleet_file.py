"""engines.yaml: which engines serve a model, what each was started with, and how they are steered.

    model_path: ./smolvlm              # configuration, tokenizer, image processor; weights are not needed
    replicas:
      - url: http://127.0.0.1:8000/v1
        knobs: {top_k: 2}              # what it was started with

docs/engines.md lists all keys. An address alone is a fleet of one replica.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from budgetvlm import _extras
from budgetvlm.errors import ConfigError
from budgetvlm.knobs import MODEL, Value

ENGINES = ("vllm", "budgetvlm", "openai")
STEERS = ("kwargs", "pixels", "none")
NEEDS_MODEL_PATH = (
    "model_path is missing: it names a directory with the served model's config.json, tokenizer and image processor "
    "(weights are not needed), from which the tokens of a request are known; give it in the file or by --model_path"
)


@dataclass(frozen=True)
class ReplicaSpec:
    """One engine of a fleet.

    Attributes:
        url: up to and with its version, such as http://127.0.0.1:8000/v1.
        model_path: of its configuration; None: what the engine says.
        engine: one of `ENGINES`; None: found out.
        model: the name that it serves; None: asked.
        knobs: values that it was started with.
        concurrency: requests in flight at most.
        cost: what a second of it costs, in any unit; cheaper ones are asked first.
        api_key_env: the environment variable that holds its key.
    """

    url: str
    model_path: str | None = None
    engine: str | None = None
    model: str | None = None
    knobs: Mapping[str, Value] = field(default_factory=dict)
    concurrency: int = 8
    cost: float = 1.0
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError where the address holds a password."""
        if "@" in urlsplit(self.url).netloc:
            raise ConfigError(
                f"the address of the engine at {urlsplit(self.url).netloc.rpartition('@')[2]} holds a user's name or "
                "password, which logs and results would show; give a key by api_key_env"
            )

    def api_key(self) -> str | None:
        """Return the key, which no message shows. Raises ConfigError: its environment variable holds none."""
        if self.api_key_env is None:
            return None
        if not (key := os.environ.get(self.api_key_env, "").strip()):
            raise ConfigError(f"{self.url}: the environment variable {self.api_key_env} (api_key_env) is not set")
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"{self.url}: the environment variable {self.api_key_env} (api_key_env) holds characters that no key "
                "has; keys are of one line of ASCII"
            )
        return key


@dataclass(frozen=True)
class Fleet:
    """Engines that together are one model with knobs.

    Attributes:
        name: the file or address.
        steer: one of `STEERS`; None: what each engine and family of models can do.
        knobs: values to offer; of knobs that are not named, all.
    """

    name: str
    replicas: tuple[ReplicaSpec, ...]
    steer: str | None = None
    knobs: Mapping[str, Sequence[Value]] = field(default_factory=dict)


def is_address(path: str) -> bool:
    """Tell whether this is an address and no file."""
    return path.startswith(("http://", "https://"))


def is_engine(path: str | Path) -> bool:
    """Tell whether this names an engine or a fleet's file, and not a model's directory."""
    return is_address(str(path)) or str(path).endswith((".yaml", ".yml"))


def read_fleet(source: str, model_path: str | None = None) -> Fleet:
    """Read a fleet's file, or make the fleet of one address.

    Args:
        model_path: of the served model, where the file says none.

    Raises ConfigError: the file cannot be read or used; all problems at once.
    """
    if is_address(source):
        document: Any = {"replicas": [{"url": source}]}
    else:
        document = _document(Path(source))
    problems: list[str] = []
    taken = _taken(document, "", _FLEET, problems)
    default = model_path or _found_beside(source, taken.get("model_path"))
    replicas = []
    for i, raw in enumerate(taken.get("replicas", ())):
        found = _taken(raw, f"replicas[{i}].", _REPLICA, problems)
        own = _found_beside(source, found.get("model_path"))
        if "url" in found:
            replicas.append(ReplicaSpec(**{**found, "url": _with_version(found["url"]), "model_path": own or default}))
    problems += _models_problems(replicas, bool(is_address(source)))
    if problems:
        raise ConfigError(f"{source} cannot be used as a fleet of engines: " + "; ".join(problems))
    return Fleet(source, tuple(replicas), taken.get("steer"), taken.get("knobs", {}))


def _document(path: Path) -> Any:
    _extras.require("yaml", "engines", "reading of a fleet's file")
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"the fleet's file {path} does not exist; docs/engines.md shows one") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the fleet's file {path} cannot be read: {' '.join(str(error).split())}") from None


def _is_url(value: Any) -> bool:
    try:
        return isinstance(value, str) and is_address(value) and bool(urlsplit(value).hostname)
    except ValueError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_started_with(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(name) and _is_number(one) for name, one in value.items())


def _is_offer(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_text(name) and isinstance(values, list) and values and all(map(_is_number, values))
        for name, values in value.items()
    )


Check = tuple[Callable[[Any], bool], str]
_TEXT: Check = _is_text, "a text"
_FLEET: dict[str, Check] = {
    "model_path": _TEXT,
    "replicas": (lambda value: isinstance(value, list) and bool(value), "a list of at least one engine"),
    "steer": (STEERS.__contains__, f"one of {', '.join(STEERS)}"),
    "knobs": (_is_offer, "the values to offer of each knob, such as {max_crops: [1, 4]}"),
}
_REPLICA: dict[str, Check] = {
    "url": (_is_url, "an address such as http://127.0.0.1:8000/v1"),
    "engine": (ENGINES.__contains__, f"one of {', '.join(ENGINES)}"),
    "model": _TEXT,
    "knobs": (_is_started_with, "the values that it was started with, such as {top_k: 2}"),
    "concurrency": (lambda value: type(value) is int and value > 0, "a whole number of at least 1"),
    "cost": (_is_number, "a positive number"),
    "api_key_env": (_is_text, "the name of an environment variable"),
    "model_path": _TEXT,
}


def _taken(raw: Any, where: str, known: Mapping[str, Check], problems: list[str]) -> dict[str, Any]:
    """Return what can be used of a part of the document; what cannot is added to the problems."""
    if not isinstance(raw, dict):
        what = "empty" if raw is None else f"{raw!r:.80}"
        problems.append(f"{where.rstrip('.') or 'it'} is {what}; give keys of {', '.join(known)}")
        return {}
    problems += [f"{where}{key} is unknown; known: {', '.join(known)}" for key in raw if key not in known]
    wrong = [key for key in raw if key in known and not known[key][0](raw[key])]
    problems += [f"{where}{key} is {raw[key]!r:.80}; give {known[key][1]}" for key in wrong]
    problems += [f"{where}{key} is missing" for key in ("replicas", "url") if key in known and key not in raw]
    return {key: value for key, value in raw.items() if key in known and key not in wrong}


def _found_beside(source: str, path: str | None) -> str | None:
    """Return the model's directory: beside the fleet's file where there is one of that name, otherwise as given."""
    if path is None or is_address(source):
        return path
    beside = Path(source).parent / path
    return str(beside) if beside.is_dir() else path


def _with_version(url: str) -> str:
    url = url.rstrip("/")
    return url if urlsplit(url).path else f"{url}/v1"


def _models_problems(replicas: Sequence[ReplicaSpec], is_bare: bool) -> list[str]:
    """Check that all replicas say which model they serve, where they are several."""
    if not is_bare and any(spec.model_path is None for spec in replicas):
        return [NEEDS_MODEL_PATH]
    values = {(spec.knobs.get(MODEL), spec.model_path) for spec in replicas}
    if len({path for _, path in values}) == 1 and {value for value, _ in values} == {None}:
        return []
    paths: dict[Any, Any] = {}
    problems = []
    for i, spec in enumerate(replicas):
        value = spec.knobs.get(MODEL)
        if value is None:
            problems.append(f"replicas[{i}].knobs names no {MODEL!r}, though several models are served")
        elif paths.setdefault(value, spec.model_path) != spec.model_path:
            problems.append(f"replicas[{i}]: {MODEL}={value} is {paths[value]} elsewhere and {spec.model_path} here")
    return problems
