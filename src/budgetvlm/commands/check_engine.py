"""What `budgetvlm check-model --engine` finds: what each engine of a fleet does, and a fleet's file for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from budgetvlm.errors import EngineDownError

if TYPE_CHECKING:
    from budgetvlm.engines.endpoint import Endpoint
    from budgetvlm.engines.engine_probe import EngineProbe

OTHER_EXPERTS = "another number is another engine, such as vLLM with --hf-overrides"
OTHER_DEPTH = "another depth is another engine, with what `budgetvlm export` writes"


def check_fleet(
    source: str, model_path: str | None, say: Callable[[str], None], *, repeats: int, trust_remote_code: bool
) -> dict[str, Any]:  # fmt: skip
    """Check each engine of a fleet and return everything as plain values.

    Raises:
        ConfigError, EngineError: they cannot be checked.
    """
    from budgetvlm.engines.engine_probe import EngineProbe
    from budgetvlm.engines.fleet_file import read_fleet
    from budgetvlm.engines.fleet_opening import reach

    endpoints = reach(read_fleet(source, model_path), trust_remote_code=trust_remote_code)
    if down := [endpoint.client.spec.url for endpoint in endpoints if not endpoint.healthy]:
        raise EngineDownError(f"there is no engine at {', '.join(down)}; start it, or take it out of {source}")
    probes = [EngineProbe(endpoint) for endpoint in endpoints]
    pages = [_checked(probe, say, repeats) for probe in probes]
    passed = all(one["passed"] for one in pages)
    return {"schema_version": 1, "engine": source, "passed": passed, "engines": pages, "fleet": _fleet(probes)}


def _checked(probe: EngineProbe, say: Callable[[str], None], repeats: int) -> dict[str, Any]:
    from budgetvlm.engines.verification import check_engine

    say(f"{probe.endpoint.client.spec.url}: one request after another; it should serve nobody else meanwhile")
    checks = check_engine(probe, say)
    passed = all(one.passed is not False for one in checks)
    times = _times(probe, repeats) if passed else []
    return {**_document(probe), "passed": passed, "checks": [asdict(one) for one in checks], "times_ms": times}


def _document(probe: EngineProbe) -> dict[str, Any]:
    endpoint = probe.endpoint
    return {
        "model": endpoint.model,
        "url": endpoint.client.spec.url,
        "kind": endpoint.dialect.name,
        "family": endpoint.sketch.vlm.family.name,
        "model_path": endpoint.sketch.vlm.name,
        "steer": endpoint.steer,
        "knob_space": {name: list(values) for name, values in endpoint.values.items()},
        "not_offered": {f"{value:g}": why for value, why in probe.why_not.items()},
        "found": _found(endpoint),
        "tokens": {f"{value:g}": tokens for value, tokens in probe.tokens.items()},
        "answers_per_s": {str(number): rate for number, rate in probe.throughput.items()},
    }


def _found(endpoint: Endpoint) -> dict[str, str]:
    """Say of each knob how an engine is told it."""
    if endpoint.dialect.takes_setting:
        return dict.fromkeys(endpoint.values, "told with each request (setting)")
    how = {
        "kwargs": "mm_processor_kwargs of each request",
        "pixels": "images are scaled before they are sent",
        "none": "not steered",
    }
    vlm = endpoint.sketch.vlm
    experts = OTHER_EXPERTS if vlm.dials else "none: the language model is dense"
    return {
        "max_crops": f"{how[endpoint.steer]}; {vlm.family.crop_meaning}",
        "top_k": experts,
        "num_active_blocks": OTHER_DEPTH,
    }


def _replica(probe: EngineProbe) -> dict[str, Any]:
    """The engine as a fleet's file has it, with what was found."""
    from budgetvlm.engines.verification import best_in_flight

    endpoint, spec = probe.endpoint, probe.endpoint.client.spec
    named = {"knobs": dict(spec.knobs), "api_key_env": spec.api_key_env, "cost": None if spec.cost == 1 else spec.cost}
    return {
        "url": spec.url, "engine": endpoint.dialect.name, "model": endpoint.model,
        "model_path": endpoint.sketch.vlm.name,
        **{name: value for name, value in named.items() if value},
        "concurrency": best_in_flight(probe.throughput),
    }  # fmt: skip


def _times(probe: EngineProbe, repeats: int) -> list[dict[str, Any]]:
    """The quickest of a few requests at each value of `max_crops`, of images that no cache knows."""
    from budgetvlm.engines.engine_probe import SOME_TOKENS, picture
    from budgetvlm.engines.payload import fresh_data_url
    from budgetvlm.engines.token_counts import PROBE_SIZES

    rows, image = [], picture(PROBE_SIZES[0])
    for value in probe.endpoint.values["max_crops"] if repeats else ():
        heard = [probe.ask(image, value, most=SOME_TOKENS, write=fresh_data_url) for _ in range(repeats)]
        quickest = min(heard, key=lambda one: one.total_ms)
        tokens = probe.endpoint.sketch.num_image_tokens(image.size, value)
        stages = {"first_token": round(quickest.first_ms, 3), "total": round(quickest.total_ms, 3)}
        rows.append({"max_crops": value, "visual_tokens": tokens, **stages})
    return rows


def _fleet(probes: Sequence[EngineProbe]) -> dict[str, Any]:
    """The fleet's file that the findings suggest."""
    endpoints = [probe.endpoint for probe in probes]
    steers = {one.steer for one in endpoints if not one.dialect.takes_setting}
    offered = sorted({value for one in endpoints for value in one.values["max_crops"]})
    return {
        "replicas": [_replica(probe) for probe in probes],
        **({"steer": steers.pop()} if len(steers) == 1 else {}),
        **({"knobs": {"max_crops": offered}} if any(probe.why_not for probe in probes) else {}),
    }


def fleet_text(fleet: dict[str, Any]) -> str:
    """A fleet as its file."""
    import yaml

    return str(yaml.safe_dump(fleet, sort_keys=False))
