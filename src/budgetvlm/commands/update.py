"""Improve a controller from the scores of the requests that it served, and let it serve only once that is proven.

One look at the store of `budgetvlm serve --log_requests`: a candidate is trained from what the scores say that the
controller did not expect. While it is on trial the server answers a share of the requests at its choice (`serve
--trial`), and the next looks judge it by their scores alone. It takes over when a bound on its gain says that it is
better, and is refused when the bound says that it is not; looking often does not spoil either. Each is kept as a
version, and `budgetvlm versions rollback` takes a promotion back.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.flags import add_json_flag, seed_number
from budgetvlm.commands.manage_versions import READ_ANEW, interval

if TYPE_CHECKING:
    from budgetvlm.controller.network import GRPOController
    from budgetvlm.controller.versions import Version
    from budgetvlm.features import Features
    from budgetvlm.feedback.improvement import Look
    from budgetvlm.feedback.served_log import ServedLog
    from budgetvlm.table import ProfileTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm update`."""
    add = parser.add_argument
    add("--requests", type=Path, required=True, metavar="FILE", help="store of `budgetvlm serve --log_requests`")
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="the controller that serves")
    add("--data", type=Path, metavar="FILE",
        help="controller_training_data.json: its training samples are learnt again beside the requests, so that what "
        "no longer comes is not forgotten, and prices for mean budgets are measured anew")  # fmt: skip
    add("--scores", default="feedback", choices=["feedback", "shadow"],
        help="what clients said (default), or shadow answers: how far settings agree with the full one")  # fmt: skip
    add("--seed", type=seed_number, default=0, metavar="N", help="of the training (default: 0)")
    add("--dry_run", action="store_true", help="say what would be done, and change nothing")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Read, look, keep what came of it, and say so."""
    from budgetvlm.controller.checkpoint import load_controller
    from budgetvlm.controller.versions import candidate_of, require_directory, standing, version_path
    from budgetvlm.errors import CheckpointError
    from budgetvlm.feedback.drift import drift_of
    from budgetvlm.feedback.improvement import OnTrial, look
    from budgetvlm.feedback.served_log import ServedLog

    require_directory(args.checkpoint)
    present = load_controller(args.checkpoint)
    if not (present.latency_ms > 0).any():
        raise CheckpointError(
            f"the controller in {args.checkpoint} knows no setting's latency, so it was not made by a training and "
            "cannot be trained on; train one (`budgetvlm train`)"
        )
    log = ServedLog.read(args.requests, present, args.scores, lambda text: print(text, file=sys.stderr))
    profile = _profile(args.data, present)
    version = candidate_of(args.checkpoint)
    trial = None
    if version is not None:
        candidate = load_controller(version_path(args.checkpoint, version.number))
        trial = OnTrial(candidate, _tested(args.checkpoint, version) + 1, _since_s(version))
    print(f"looking at {len(log)} requests", file=sys.stderr)
    found = look(log, present, trial, profile, args.seed)
    kept = None if args.dry_run else _keep(args, found, version, log, profile)
    drift = drift_of(log, present)
    document = {
        "action": _action(found), "why": _why(found), "requests": len(log), "scores": int(log.is_scored.sum()),
        "drift": asdict(drift), "on_trial": version and version.number,
        "verdict": found.verdict and asdict(found.verdict), "new_candidate": kept, "expected_gain": found.expected,
        "versions": standing(args.checkpoint), "dry_run": args.dry_run,
    }  # fmt: skip
    print(json.dumps(document) if args.json else "\n".join([*drift.said, *_said(document, found)]))
    return 0


def _action(found: Look) -> str:
    """In one word what was done."""
    decision = found.verdict.decision if found.verdict else "wait"
    if decision == "promote":
        return "promoted"
    if found.fresh is not None:
        return "candidate"
    return "refused" if decision == "refuse" else "trial" if found.verdict else "nothing"


def _why(found: Look) -> str:
    return f"{found.verdict.why}; {found.why}" if found.verdict else found.why


def _profile(data: Path | None, present: GRPOController) -> tuple[ProfileTable, Features] | None:
    if data is None:
        return None
    from budgetvlm.controller.training import with_splits
    from budgetvlm.policies.unmeasured import with_predictions
    from budgetvlm.profiling.prepare.prepared_data import load_prepared

    prepared = load_prepared(data)
    present.knob_space.require_equal(prepared.table.knob_space, str(data))
    return with_predictions(with_splits(prepared.table), prepared.features), prepared.features


def _keep(
    args: argparse.Namespace, found: Look, version: Version | None, log: ServedLog,
    profile: tuple[ProfileTable, Features] | None,
) -> int | None:  # fmt: skip
    """Note the verdict and act on it; keep a new candidate and return its number, if there is one."""
    from budgetvlm.controller.versions import keep_version, note_version, promote

    if version is not None and found.verdict is not None:
        verdict = found.verdict
        refused = {"status": "refused", "why": verdict.why} if verdict.decision == "refuse" else {}
        note_version(args.checkpoint, version.number, judged=asdict(verdict), **refused)
        if verdict.decision == "promote":
            promote(args.checkpoint, version.number, verdict.why)
    if found.fresh is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        _write(Path(directory), found.fresh, args.checkpoint, profile)
        return keep_version(args.checkpoint, Path(directory), {"trained_on": _origin(args, log), "why": found.why})


def _write(made: Path, candidate: GRPOController, present: Path, profile: tuple[ProfileTable, Features] | None) -> None:
    """Write the candidate as a controller's directory, with what of the present one's checkpoint stays true."""
    import shutil

    from budgetvlm.controller.checkpoint import BEST, PRICES, controller_document
    from budgetvlm.controller.checkpoint_files import read_checkpoint, write_checkpoint
    from budgetvlm.controller.price_sweep import price_curve_of

    known = read_checkpoint(present / BEST) if (present / BEST).exists() else {}
    stays: dict[str, Any] = {name: known[name] for name in ("guard", "training") if name in known}
    write_checkpoint(made / BEST, {**stays, **controller_document(candidate)})
    candidate.save_pretrained(made)
    if profile is not None:
        price_curve_of(candidate, *profile).save(made)
    elif (present / PRICES).exists():
        shutil.copyfile(present / PRICES, made / PRICES)


def _tested(directory: Path, but: Version | None = None) -> int:
    """How many candidates were ever tested, ``but`` for one; the newest version knows of those that are not kept."""
    from budgetvlm.controller.versions import versions_of
    from budgetvlm.feedback.judge import FEWEST

    others = [version for version in versions_of(directory) if but is None or version.number != but.number]
    counts = (one.trained_on.get("tested", 0) + ((one.judged or {}).get("scores", 0) >= FEWEST) for one in others)
    return max(counts, default=0)


def _since_s(version: Version) -> float:
    """When a candidate's trial began: after all that it learnt from, also where a clock was set back meanwhile."""
    return max(version.made_at, version.trained_on.get("last_at_s", 0.0))


def _origin(args: argparse.Namespace, log: ServedLog) -> dict[str, Any]:
    """What a candidate learnt from, for its version, and how many were tested before it."""
    scored = log.scored
    return {
        "store": str(args.requests), "requests": len(log), "scores": len(scored), "source": args.scores,
        "first_at_s": float(scored.at_s.min()), "last_at_s": float(scored.at_s.max()),
        "profile": args.data and str(args.data), "tested": _tested(args.checkpoint),
    }  # fmt: skip


def _said(document: dict[str, Any], found: Look) -> list[str]:
    """The lines of a look."""
    lines = [f"{document['requests']} requests, {document['scores']} scores"]
    if found.verdict is not None:
        verdict = found.verdict
        done = {"promote": "promoted", "refuse": "refused", "wait": "stays on trial"}[verdict.decision]
        lines.append(f"version {document['on_trial']} {done}: {verdict.why}")
        if verdict.scores:
            lines.append(
                f"of {verdict.scores} scores of its trial, where it chooses otherwise in {verdict.differ:.0%}: gain "
                f"{interval(asdict(verdict))}, each bound {1 - verdict.alpha:.1%} sure"
            )
        if verdict.decision == "promote":
            lines.append(READ_ANEW)
    lines.append(found.why)
    if document["new_candidate"] is not None:
        lines.append(
            f"version {document['new_candidate']} is a candidate, which `budgetvlm serve --trial` tries; {READ_ANEW}"
        )
    if document["dry_run"]:
        lines.append("nothing was changed (--dry_run)")
    return lines
