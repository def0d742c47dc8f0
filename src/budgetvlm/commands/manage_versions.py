"""The versions of a controller: list them, compare two, let one serve, take it back.

A version is kept by `budgetvlm update`. A server begins to use another one when it reads the controller anew (POST
/admin/reload, or a hangup signal); no request is dropped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.flags import add_json_flag
from budgetvlm.errors import ConfigError

if TYPE_CHECKING:
    from budgetvlm.controller.versions import Version

READ_ANEW = (
    "a server that runs uses it once it reads the controller anew (kill -HUP, or POST /admin/reload); with "
    "--update_every it does so by itself"
)
ACTIONS = {
    "list": "all versions, what each was trained on and what came of it",
    "compare": "what is known of two versions, and how to measure both",
    "promote": "let a version serve",
    "rollback": "let the version serve again that the present one replaced",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a sub-command for each action."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
    for action, text in ACTIONS.items():
        one = actions.add_parser(action, help=text, description=text)
        one.add_argument(
            "--checkpoint", type=Path, required=True, metavar="DIR", help="directory of the controller that serves"
        )
        if action == "promote":
            one.add_argument("number", type=int, help="the version's number")
        if action == "compare":
            one.add_argument("numbers", type=int, nargs=2, metavar="number", help="the versions' numbers")
        if action in ("promote", "rollback"):
            one.add_argument("--why", default="", metavar="TEXT", help="kept with the version (default: by hand)")
        add_json_flag(one)


def run(args: argparse.Namespace) -> int:
    """Do it, and say which version serves."""
    from budgetvlm.controller import versions

    versions.require_directory(args.checkpoint)
    if args.action == "promote":
        versions.promote(args.checkpoint, args.number, args.why or "by hand")
    elif args.action == "rollback":
        versions.rollback(args.checkpoint, args.why)
    found = versions.versions_of(args.checkpoint)
    if args.action == "compare":
        found = [_one(found, number, args.checkpoint) for number in args.numbers]
    serving = versions.serving_version(args.checkpoint)
    if args.json:
        print(json.dumps({"serving": serving, "versions": [asdict(version) for version in found]}))
    else:
        print("\n".join(_lines(args.checkpoint, found, serving, measure=args.action == "compare")))
        if args.action in ("promote", "rollback"):
            print(READ_ANEW)
    return 0


def _one(found: list[Version], number: int, directory: Path) -> Version:
    for version in found:
        if version.number == number:
            return version
    raise ConfigError(f"{directory} keeps no version {number}; see `budgetvlm versions list`")


def _lines(directory: Path, found: list[Version], serving: int | None, measure: bool) -> Iterator[str]:
    from budgetvlm.controller.versions import version_path

    yield f"{directory}: " + (f"version {serving} serves" if serving else "what serves is no version")
    if not found:
        yield "no version is kept yet; `budgetvlm update` keeps what serves and each candidate"
    for version in found:
        made = _date(version.made_at)
        after = f", from version {version.parent}" if version.parent else ""
        yield f"{version.number:4d}  {version.status:<9}  {made}{after}" + (f": {version.why}" if version.why else "")
        if version.trained_on:
            yield f"      trained on {_trained_on(version.trained_on)}"
        if version.judged:
            yield f"      judged by {_judged(version.judged)}"
    for version in found if measure else ():
        place = version_path(directory, version.number)
        yield f"on held-out samples: budgetvlm evaluate --data FILE --checkpoint {place}"


def _trained_on(known: Mapping[str, Any]) -> str:
    """What a version learnt from, in words."""
    text = f"{known.get('scores', 0)} scores"
    text += f" ({known['source']})" if "source" in known else ""
    text += f" of {known['requests']} requests" if "requests" in known else ""
    if "first_at_s" in known:
        text += f", {_date(known['first_at_s'])} to {_date(known['last_at_s'])}"
    return text + (f", beside {known['profile']}" if known.get("profile") else "")


def _judged(known: Mapping[str, Any]) -> str:
    """A verdict, in words."""
    text = f"{known.get('scores', 0)} scores of its trial"
    return text + (f": gain {interval(known)}" if known.get("scores") and "low" in known else "")


def interval(verdict: Mapping[str, Any]) -> str:
    """A gain and its bounds, in points of accuracy."""
    gain, low, high = (100 * verdict[name] for name in ("gain", "low", "high"))
    return f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _date(at_s: float) -> str:
    return datetime.fromtimestamp(at_s).isoformat(" ", "minutes")
