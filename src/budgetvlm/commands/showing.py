"""How a command shows a report: one JSON document, rich tables on a terminal, plain text elsewhere; and its files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.errors import OutputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from budgetvlm.evaluation.records import HeldOutReport
    from budgetvlm.html_report.report_chart import ReportChart


def check_output(directory: Path | None, names: list[str], remedy: str) -> None:
    """Raise OutputError where a directory already holds one of the files; ``remedy`` says what to do instead."""
    present = [name for name in names if directory is not None and (directory / name).exists()]
    if present:
        raise OutputError(f"{directory} already holds {' and '.join(present)}; {remedy}")


def write_report(
    report: Any, charts: Callable[[Any], Sequence[ReportChart]], directory: Path | None, document: str, picture: str
) -> list[Path]:
    """Write a report's document and its charts as one picture into a directory; their paths."""
    if directory is None:
        return []
    from budgetvlm._io import write_json
    from budgetvlm.html_report.picture_files import save_side_by_side

    write_json(directory / document, report.to_dict())
    save_side_by_side(charts(report), directory / picture)
    return [directory / document, directory / picture]


def show_report(report: HeldOutReport, tables: RenderableType, as_json: bool, written: list[Path]) -> None:
    """Print a report, as one JSON document or as tables, and the paths that were written."""
    if as_json:
        print(json.dumps(report.to_dict(), allow_nan=False, ensure_ascii=False))
        return
    from rich.console import Console

    from budgetvlm.evaluation.text_tables import plain_text, width_of

    if sys.stdout.isatty():
        console = Console()
        console.width = max(console.width, width_of(tables))
        console.print(tables)
    else:
        sys.stdout.write(plain_text(tables))
    for path in written:
        print(path)
