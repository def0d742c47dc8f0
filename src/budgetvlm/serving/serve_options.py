"""Options of the server. Reading them takes no PyTorch, so that `budgetvlm serve --help` is quick."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from budgetvlm.errors import ConfigError

WhenInfeasible = Literal["fastest", "reject", "best_effort"]


@dataclass(frozen=True)
class ServeOptions:
    """Everything that can be set of a server; a ConfigError names all that cannot work.

    Attributes:
        model_path: model directory or hub name.
        checkpoint: directory of the controller; the one that comes with the model if not given.
        device: PyTorch device of the replicas.
        num_threads: threads of PyTorch in each replica; PyTorch's own choice if not given.
        allow_other_model: serve a controller or a guard although it was made for other weights than the model's.
        model_name: name by which clients ask for the model; the last part of --model_path if not given.
        host: address to listen on; 127.0.0.1 is this machine alone.
        port: port to listen on.
        replicas: processes that hold the model, each answering one request at a time.
        budget_ms: budget of requests that bring none, in ms; no budget if not given.
        when_infeasible: what is done with requests that no setting is sure to answer in time, where they do not say it
            themselves.
        max_new_tokens: longest answer where the request does not say it.
        max_queue: requests that may wait; further ones are refused.
        playground: serve a page at /playground/ to try budgets on.
    """

    model_path: str = "reference"
    checkpoint: Path | None = None
    device: str = "cpu"
    num_threads: int | None = None
    allow_other_model: bool = False
    model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    budget_ms: float | None = None
    when_infeasible: WhenInfeasible = "fastest"
    max_new_tokens: int = 16
    max_queue: int = 64
    playground: bool = False

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("these options cannot work: " + "; ".join(problems))

    @property
    def served_name(self) -> str:
        """The model's name in requests and answers."""
        return self.model_name or Path(self.model_path).name


def _problems(options: ServeOptions) -> Iterator[str]:
    least = {"port": 0, "replicas": 1, "max_new_tokens": 1, "max_queue": 1, "num_threads": 1}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in least and value is not None and value < least[field.name]:
            yield f"{field.name}={value} is less than {least[field.name]}"
    if options.budget_ms is not None and not options.budget_ms > 0:
        yield f"budget_ms={options.budget_ms} is not a positive number of milliseconds"
    known = get_args(WhenInfeasible)
    if options.when_infeasible not in known:
        yield f"when_infeasible={options.when_infeasible!r} is unknown; choose from {', '.join(known)}"
