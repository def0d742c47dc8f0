"""How a command shows a report: one JSON document, rich tables on a terminal, plain text elsewhere; and its files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Report(Protocol):
    """What can be shown and written."""

    def to_dict(self) -> dict[str, Any]: ...

    def table(self) -> str: ...

    def plot(self, path: str | Path) -> None: ...


def write_report(report: Report, directory: Path | None, document: str, picture: str) -> list[Path]:
    """Write the document and the picture into a directory; their paths."""
    if directory is None:
        return []
    from budgetvlm._io import write_json

    write_json(directory / document, report.to_dict())
    report.plot(directory / picture)
    return [directory / document, directory / picture]


def show_report(report: Report, renderable: Callable[[], Any], width: int, as_json: bool, written: list[Path]) -> None:
    """Print a report and the paths that were written.

    Args:
        renderable: makes rich's form of it; called for a terminal only. width: that it needs there.
    """
    if as_json:
        print(json.dumps(report.to_dict(), allow_nan=False, ensure_ascii=False))
        return
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        console.width = max(console.width, width)
        console.print(renderable())
    else:
        sys.stdout.write(report.table())
    for path in written:
        print(path)
