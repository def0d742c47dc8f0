"""Serve a model to any OpenAI client, each request within its budget.

The budget comes from the request: field `latency_budget_ms`, header `X-Latency-Budget-Ms`, or the model's name
(`reference@300ms`). It counts from the request's arrival to the last token.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from budgetvlm._extras import require
from budgetvlm.commands.flags import OptionFlags
from budgetvlm.serving.serve_options import ServeOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm serve`."""
    _FLAGS.add(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve", "server")
    from budgetvlm.serving.server import serve

    serve(ServeOptions(**_FLAGS.read(args)))
    return 0


_FLAGS = OptionFlags(ServeOptions, *(field.name for field in fields(ServeOptions)))
