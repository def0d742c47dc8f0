"""Options of the server. Reading them takes no PyTorch, so that `budgetvlm serve --help` is quick."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from budgetvlm.engines.fleet_file import is_address, is_engine
from budgetvlm.errors import ConfigError

WhenInfeasible = Literal["fastest", "reject", "best_effort"]
Order = Literal["deadline", "arrival"]
KEY_VARIABLE = "BUDGETVLM_API_KEY"
HOST = re.compile(r"[a-z0-9.-]+(:\d+)?|\[[0-9a-f:]+\](:\d+)?")
LEAST = {
    "port": 0, "replicas": 1, "num_threads": 1, "max_new_tokens": 1, "max_tokens": 1, "max_queue": 1, "max_open": 1,
    "max_images": 0, "max_pixels": 1, "max_side": 1, "max_text": 1, "grace_s": 0, "store_mb": 16,
}  # fmt: skip
POSITIVE = {
    "budget_ms", "mean_budget_ms", "max_open_mb", "max_body_mb", "body_timeout_s", "fetch_timeout_s", "update_every",
}  # fmt: skip


@dataclass(frozen=True)
class ServeOptions:
    """Everything that can be set of a server; a ConfigError names all that cannot work.

    Attributes:
        model_path: model directory or hub name.
        engine: file that lists engines (engines.yaml) or the address of one, whose model is served in place of one that
            this machine holds.
        checkpoint: directory of the controller; the one that comes with the model if not given.
        device: PyTorch device of the replicas.
        num_threads: threads of PyTorch in each replica; PyTorch's own choice if not given.
        allow_other_model: serve a controller or a guard although it was made for other weights than the model's.
        model_name: name by which clients ask for the model; the last part of --model_path if not given,
            of engines the name of their file without .yaml, or "engines" for an address.
        host: address to listen on; 127.0.0.1 is this machine alone.
        port: port to listen on.
        replicas: processes that hold the model, each answering one request at a time.
        budget_ms: budget of requests that bring none, in ms; no budget if not given.
        when_infeasible: what is done with requests that no setting is sure to answer in time, where they do not say it
            themselves.
        max_new_tokens: longest answer where the request does not say it.
        max_queue: requests that may wait; further ones are refused.
        mean_budget_ms: time that requests may take on average, in ms, waiting included; the price where nobody waits
            then moves with what was spent.
        price: price of every request, in accuracy for one latency of the full setting; it follows the queue if not
            given.
        order: deadline, or arrival: first in, first out, and nobody is refused before the queue is full.
        full_only: answer at the full setting alone, to compare with.
        max_open: requests that may be read, wait or be answered at once; further ones are refused unread.
        max_open_mb: bodies of all these requests together, in millions of bytes; one beyond that is refused.
        max_body_mb: largest body of a request, in millions of bytes.
        body_timeout_s: time that a client has to send a body, in seconds.
        max_images: images in one request.
        max_pixels: pixels of all images of one request; it is read from their heads before any is decoded.
        max_side: longest side of an image, in pixels.
        max_text: characters of all messages of one request.
        max_tokens: longest answer that a request may ask for.
        allow_hosts: hosts (HOST or HOST:PORT) whose http and https addresses may be given as images; none if not given.
        fetch_timeout_s: time that such a host has to send an image, in seconds.
        access_log: file for a line of JSON on each request, - for standard output; none is written if not given.
        log_texts: write what was asked and answered into these lines too; images never are.
        log_requests: file that keeps what was served, to learn from: features, budget, settings and scores (see
            docs/learning_in_service.md); images never are. Nothing is kept if not given.
        store_mb: the most that this file takes, in millions of bytes; the oldest requests make room.
        store_questions: keep the questions too.
        explore: share of requests whose setting is drawn among those that keep the budget and are not valued clearly
            worse.
        shadow: share of requests that are answered again at the full setting and at a drawn one, while nobody waits;
            whether the answers agree is kept as a score.
        trial: share of requests whose setting a candidate chooses, while there is one that `budgetvlm update` keeps to
            prove itself; only among settings that keep the budget.
        update_every: seconds between two updates of the controller in the background, see `budgetvlm update`; none if
            not given.
        update_data: controller_training_data.json of the profile, for these updates.
        state_dir: directory for what the guard learns; that of the controller if not given.
        grace_s: time to finish what was accepted after a signal to stop, in seconds.
        api_key: what clients have to send as bearer token; $BUDGETVLM_API_KEY or none if not given. Others on this
            machine may see flags, so a file or the environment is the better place.
        api_key_file: file that holds the key.
        playground: serve a page at /playground/ to try budgets on.
    """

    model_path: str = "reference"
    engine: str | None = None
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
    mean_budget_ms: float | None = None
    price: float | None = None
    order: Order = "deadline"
    full_only: bool = False
    max_open: int = 256
    max_open_mb: float = 512.0
    max_body_mb: float = 16.0
    body_timeout_s: float = 30.0
    max_images: int = 8
    max_pixels: int = 32_000_000
    max_side: int = 16_384
    max_text: int = 20_000
    max_tokens: int = 1024
    allow_hosts: tuple[str, ...] = ()
    fetch_timeout_s: float = 5.0
    access_log: Path | None = None
    log_texts: bool = False
    log_requests: Path | None = None
    store_mb: float = 200.0
    store_questions: bool = False
    explore: float = 0.0
    shadow: float = 0.0
    trial: float = 0.3
    update_every: float | None = None
    update_data: Path | None = None
    state_dir: Path | None = None
    grace_s: float = 20.0
    api_key: str | None = field(default=None, repr=False)
    api_key_file: Path | None = None
    playground: bool = False

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("these options cannot work: " + "; ".join(problems))

    @property
    def opened(self) -> str:
        """What is opened: a model, or the engines that hold it."""
        return self.engine or self.model_path

    @property
    def has_engines(self) -> bool:
        """Whether engines hold the model."""
        return is_engine(self.opened)

    def for_replicas(self) -> dict[str, Any]:
        """What those need that open the model, as JSON takes it."""
        return {
            "model_path": self.opened, "checkpoint": self.checkpoint and str(self.checkpoint),
            "device": self.device, "num_threads": self.num_threads, "allow_other_model": self.allow_other_model,
            "state_dir": self.state_dir and str(self.state_dir), "full_only": self.full_only,
            "mean_budget_ms": self.mean_budget_ms, "explore": self.explore, "trial": self.trial,
            "keeps": self.log_requests is not None,
        }  # fmt: skip

    @property
    def served_name(self) -> str:
        """The model's name in requests and answers."""
        if self.model_name or not self.has_engines:
            return self.model_name or Path(self.model_path).resolve().name  # also of "."
        return "engines" if is_address(self.opened) else Path(self.opened).stem

    @property
    def max_body(self) -> int:
        """Largest body, in bytes."""
        return int(self.max_body_mb * 1e6)

    def key(self) -> str | None:
        """The key that clients need: from the flag, the file or the environment. Raises ConfigError."""
        if self.api_key or not self.api_key_file:
            return (self.api_key or os.environ.get(KEY_VARIABLE, "")).strip() or None
        try:
            key = self.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_key_file={self.api_key_file} cannot be read: {error}") from None
        if not key:
            raise ConfigError(f"api_key_file={self.api_key_file} is empty; write the key into it")
        return key


def _problems(options: ServeOptions) -> Iterator[str]:
    for one in fields(options):
        value, least = getattr(options, one.name), LEAST.get(one.name)
        if least is not None and value is not None and not value >= least:
            yield f"{one.name}={value} is less than {least}"
        if one.name in POSITIVE and value is not None and not value > 0:
            yield f"{one.name}={value} is not a positive number"
        if isinstance(value, float) and math.isinf(value):
            yield f"{one.name}={value} is not finite"
    for name, known in (("when_infeasible", get_args(WhenInfeasible)), ("order", get_args(Order))):
        if getattr(options, name) not in known:
            yield f"{name}={getattr(options, name)!r} is unknown; choose from {', '.join(known)}"
    if options.price is not None and not 0 <= options.price < math.inf:
        yield f"price={options.price} is not a number of 0 or more"
    if options.price is not None and options.mean_budget_ms is not None:
        yield "mean_budget_ms says which price is paid, and price gives another"
    for name in ("explore", "shadow", "trial"):
        if not 0 <= getattr(options, name) <= 1:
            yield f"{name}={getattr(options, name)} is no share of requests; give a number from 0 to 1"
    if options.explore + options.trial > 1:
        yield f"explore={options.explore} and trial={options.trial} are more than all requests"
    for name in ("store_questions", "explore", "shadow", "update_every"):
        if getattr(options, name) and not options.log_requests:
            yield f"{name} is for learning from what log_requests keeps; give that too"
    if options.update_every and options.checkpoint is None:
        yield "update_every changes the controller, and the one that comes with a model stays; copy it, for checkpoint"
    if options.update_every and options.checkpoint is not None and Path(options.checkpoint).is_file():
        yield f"update_every keeps versions in the controller's directory; give {Path(options.checkpoint).parent}"
    if options.update_data is not None and not Path(options.update_data).is_file():
        yield f"update_data={options.update_data} is no file; `budgetvlm prepare --output_data_path` makes it"
    if options.update_data and not options.update_every:
        yield "update_data is for updates; say with update_every how often"
    if options.max_new_tokens > options.max_tokens:
        yield f"max_new_tokens={options.max_new_tokens} is more than max_tokens={options.max_tokens}"
    if options.api_key is not None and options.api_key_file is not None:
        yield "api_key and api_key_file exclude each other"
    if options.api_key is not None and not options.api_key.strip():
        yield "api_key is empty, and would let everybody in"
    if options.engine is not None and not options.has_engines:
        yield f"engine={options.engine!r} is no file such as engines.yaml and no address; --model_path serves a model"
    if options.engine is not None and options.model_path != ServeOptions.model_path:
        yield "engine and model_path exclude each other: the fleet's file names the model's directory (model_path)"
    if options.has_engines and options.replicas != 1:
        yield f"replicas={options.replicas} hold a model here; those of engines stand in the fleet's file"
    if not options.host:
        yield "host is empty; give 0.0.0.0 to listen on all addresses"
    for host in options.allow_hosts:
        if not HOST.fullmatch(host):
            yield f"allow_hosts={host!r} is no host; give HOST or HOST:PORT, without http:// and paths"
