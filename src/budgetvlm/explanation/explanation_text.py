"""An explanation, and the tree that imitates a controller, as text for people."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from budgetvlm._io import time_text
from budgetvlm.explanation.explanation_records import Explanation
from budgetvlm.explanation.surrogate import Surrogate


def explanation_text(found: Explanation) -> str:
    """The explanation of a request."""
    return _render("explanation.txt.j2", found)


def tree_text(tree: Surrogate) -> str:
    """The tree, and how faithful it is."""
    return _render("tree.txt.j2", tree)


def _render(template: str, found: Explanation | Surrogate) -> str:
    loader = PackageLoader("budgetvlm.explanation")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["time"] = time_text
    return environment.get_template(template).render(found=found).rstrip("\n")
