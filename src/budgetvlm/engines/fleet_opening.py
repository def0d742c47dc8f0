"""Opening the model that a fleet serves: each engine shows that it takes each value that it is said to take."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from budgetvlm.engines.dialects import DIALECTS, STEERED_BY_KWARGS, Dialect, dialect_of
from budgetvlm.engines.endpoint import Endpoint
from budgetvlm.engines.engine_client import EngineClient
from budgetvlm.engines.engine_model import EngineVLM
from budgetvlm.engines.fleet_file import NEEDS_MODEL_PATH, Fleet, ReplicaSpec
from budgetvlm.engines.router import EngineRouter
from budgetvlm.engines.sketch import Sketch
from budgetvlm.engines.token_counts import verify
from budgetvlm.errors import BudgetVLMWarning, ConfigError, EngineDownError
from budgetvlm.knobs import KNOBS, MODEL, KnobSpace, Value
from budgetvlm.vlm.fingerprint import model_fingerprint
from budgetvlm.vlm.loading import BUNDLED, model_directory


class Met(NamedTuple):
    """An engine of a fleet: its client, and what it says that it serves; None where it is down."""

    client: EngineClient
    serves: dict[str, Any] | None


def open_fleet(fleet: Fleet, *, trust_remote_code: bool = False) -> EngineVLM:
    """Open the model that a fleet serves, after each engine has shown that it takes each value. See `open_model`."""
    endpoints = reach(fleet, trust_remote_code=trust_remote_code)
    for endpoint in endpoints:
        if endpoint.healthy:
            verify(endpoint, strict=fleet.steer is not None or "max_crops" in fleet.knobs)
    space = _knob_space(endpoints)
    models = {one.client.spec.knobs.get(MODEL): one.sketch for one in endpoints}
    return EngineVLM(fleet.name, space, EngineRouter(endpoints), models)


def reach(fleet: Fleet, *, trust_remote_code: bool = False) -> list[Endpoint]:
    """Ask the engines of a fleet what they serve; whether they take what they are to take is not known yet."""
    met = [_meet(spec) for spec in fleet.replicas]
    if all(one.serves is None for one in met):
        raise EngineDownError(f"no engine of {fleet.name} is up: {', '.join(spec.url for spec in fleet.replicas)}")
    paths = [one.client.spec.model_path or _said_by(one) for one in met]
    sketches = {path: Sketch(path, trust_remote_code=trust_remote_code) for path in dict.fromkeys(paths)}
    said = {path: one.serves for one, path in zip(met, paths, strict=True) if one.serves is not None}
    endpoints = [
        _endpoint(one.client, one.serves or said.get(path, {}), sketches[path], fleet)
        for one, path in zip(met, paths, strict=True)
    ]
    for endpoint, one in zip(endpoints, met, strict=True):
        endpoint.healthy = one.serves is not None
    return endpoints


def _meet(spec: ReplicaSpec) -> Met:
    """Ask an engine what it serves. Raises ConfigError: another model than the fleet's file says."""
    client = EngineClient(spec)
    try:
        models = client.models()
    except EngineDownError as error:
        warnings.warn(f"{error} It is left out for now.", BudgetVLMWarning, stacklevel=2)
        return Met(client, None)
    named = {str(one["id"]): one for one in models}
    if spec.model is not None and spec.model not in named:
        raise ConfigError(f"{spec.url} serves {', '.join(named) or 'no model'}, and not {spec.model!r} (model)")
    if spec.model is None and len(named) != 1:
        raise ConfigError(f"{spec.url} serves {', '.join(named) or 'no model'}; say which one is meant: model")
    return Met(client, named[spec.model] if spec.model is not None else models[0])


def _said_by(met: Met) -> str:
    """Return the path of the model that an engine of ours says it serves. Raises ConfigError: it is unknown here."""
    said = (met.serves or {}).get("fingerprint")
    if said is not None and said == model_fingerprint(model_directory(BUNDLED)):
        return BUNDLED
    raise ConfigError(f"{met.client.spec.url}: {NEEDS_MODEL_PATH}")


def _endpoint(client: EngineClient, serves: Mapping[str, Any], sketch: Sketch, fleet: Fleet) -> Endpoint:
    """Say how one engine is steered and what it may answer.

    Args:
        serves: what it says; of one that is down, what another one of that model says; empty: nothing is known.

    Raises:
        ConfigError: values that its model cannot take.
        EngineDownError: it is down, and neither the fleet's file nor another engine tells what it is.
    """
    spec = client.spec
    if not serves and not (spec.engine and spec.model):
        raise EngineDownError(f"{spec.url} is down, and nothing says what it is: give its engine and model in the file")
    dialect = DIALECTS[spec.engine] if spec.engine else dialect_of(serves)
    steer = _steer(fleet.steer, dialect, sketch, spec.url)
    endpoint = Endpoint(client, dialect, sketch, spec.model or str(serves["id"]), steer)
    endpoint.identity = str(serves.get("fingerprint", endpoint.model))
    started = {name: [value] for name, value in spec.knobs.items() if name != MODEL}
    if started:
        sketch.require(started, f"{spec.url}, knobs")
    told = serves.get("knob_space", {})
    if by_request := [name for name in started if name in told and list(told[name]) != started[name]]:
        raise ConfigError(
            f"{spec.url} takes {', '.join(by_request)} with each request, so it was started with no value of it: leave "
            "it out of this engine's knobs. To offer fewer values, give the fleet knobs (knobs: beside replicas:)"
        )
    offered = {name: values for name, values in fleet.knobs.items() if name != MODEL}
    if offered:
        sketch.require(offered, f"{fleet.name}, knobs")
    for name in (MODEL, *KNOBS):
        if name in spec.knobs:
            endpoint.values[name] = (spec.knobs[name],)
        elif endpoint.takes(name) and sketch.own_value(name) is not None:
            endpoint.values[name] = _choice(name, endpoint, fleet.knobs, serves.get("knob_space"))
        elif (own := sketch.own_value(name)) is not None:
            endpoint.values[name] = (own,)
    return endpoint


def _choice(
    name: str, endpoint: Endpoint, offered: Mapping[str, Sequence[Value]], said: Mapping[str, Sequence[Value]] | None
) -> tuple[Value, ...]:
    """Return the values of a knob that go with requests: those offered, or all. Raises ConfigError: it has others.

    Args:
        said: values of its knobs, as an engine of ours says.
    """
    own = endpoint.sketch.own_value(name)
    has = endpoint.sketch.values(name) if said is None else tuple(said.get(name, (own,) if own is not None else ()))
    if said is not None and (others := sorted(set(offered.get(name, ())) - set(has))):
        raise ConfigError(f"{endpoint.client.spec.url} has {name} in {list(has)}, and not {others} (knobs)")
    return tuple(offered.get(name, has))


def _steer(wanted: str | None, dialect: Dialect, sketch: Sketch, url: str) -> str:
    """Return how an engine is told how to show images. Raises ConfigError: not as the fleet's file wants."""
    scales = sketch.scales
    if dialect.takes_setting:
        return "kwargs"
    if wanted == "kwargs" and not dialect.takes_options:
        raise ConfigError(f"{url}: engines of the kind {dialect.name} take no options of the image processor; steer: "
                          f"{'pixels or ' if scales else ''}none")  # fmt: skip
    if wanted == "pixels" and not scales:
        raise ConfigError(f"{url}: {sketch.vlm.family.name} cuts every image into parts of its own, so that scaling it "
                          "changes nothing; steer: kwargs or none")  # fmt: skip
    if wanted is not None:
        return wanted
    if dialect.takes_options and sketch.model_type in STEERED_BY_KWARGS:
        return "kwargs"
    return "pixels" if scales else "none"


def _knob_space(endpoints: Sequence[Endpoint]) -> KnobSpace:
    """Return the values of all engines together, of knobs that have several. Raises ConfigError: there is no choice."""
    values: dict[str, list[Value]] = {}
    for name in (MODEL, *KNOBS):
        found = sorted({value for one in endpoints for value in one.values.get(name, ())})
        if len(found) > 1:
            values[name] = found
    if not values:
        raise ConfigError(
            "these engines leave no choice: images are shown at one size, and all were started alike. Start vLLM with "
            "--trust-request-mm-kwargs, or add an engine with other experts (docs/engines.md)"
        )
    for one in endpoints:
        for name, every in values.items():
            one.values.setdefault(name, (every[-1],))  # a knob that its model does not have
    return KnobSpace(values)
