"""Count what keeps the package easy to walk through: modules, imports that run in circles, lengths, names.

    python benchmarks/house.py            # a table with each limit
    python benchmarks/house.py --json     # the same as one JSON document

Only the sources are read (with `ast`), nothing of the package is imported. The exit code is 1 when a limit is broken.
`tests/test_house.py` holds the limits; ARCHITECTURE.md says which arrows are allowed.

Imports count wherever they stand: at the top of a file, inside a function, under ``TYPE_CHECKING``. An import of a
name from a package counts as an import of the package's ``__init__``; the ``__init__`` files that Python runs on the
way to a submodule do not count.
"""

import argparse
import ast
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "budgetvlm"
LINES_BEFORE = 28_982  # lines of src/**/*.py before the package was rebuilt
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Graph = Mapping[str, set[str]]


@dataclass(frozen=True)
class Measure:
    """One figure, the limit it has to keep, and what exceeds the limit."""

    name: str
    value: int
    limit: int
    offenders: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return self.value <= self.limit


# ---- files and modules


def source_files(package: Path = PACKAGE) -> list[Path]:
    """All Python files of the package, sorted."""
    return sorted(path for path in package.rglob("*.py") if "__pycache__" not in path.parts)


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """The dotted name of a file: ``budgetvlm.vlm.adapter``, or ``budgetvlm.vlm.__init__`` of a folder's own file."""
    return ".".join([package.name, *path.relative_to(package).with_suffix("").parts])


def line_count(path: Path) -> int:
    """The number of lines of a file, empty ones and comments included."""
    return len(path.read_text(encoding="utf-8").splitlines())


# ---- imports


def imports(path: Path, package: Path = PACKAGE) -> Iterator[tuple[str, str | None]]:
    """Every import of the file, wherever in it: ``import a.b`` as ("a.b", None), ``from a import b`` as ("a", "b")."""
    folder = [package.name, *path.relative_to(package).parts[:-1]] if path.is_relative_to(package) else []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def top_level_names(path: Path, package: Path = PACKAGE) -> set[str]:
    """The packages that the file imports, by their first name: ``numpy``, ``budgetvlm``."""
    return {module.split(".")[0] for module, _ in imports(path, package)}


def module_of(name: str, modules: set[str]) -> str | None:
    """The module of the package that an imported name belongs to, or None if it is none of ours."""
    if name in modules:
        return name
    return f"{name}.__init__" if f"{name}.__init__" in modules else None


def import_graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Which module imports which: ``{module: modules it imports}``.

    ``from a import b`` is an import of the module ``a.b`` where there is one, otherwise of ``a`` itself.
    """
    files = {module_name(path, package): path for path in source_files(package)}
    graph = {}
    for module, path in files.items():
        targets = {
            (module_of(f"{origin}.{name}", set(files)) if name else None) or module_of(origin, set(files))
            for origin, name in imports(path, package)
        }
        graph[module] = {target for target in targets if target is not None} - {module}
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """The groups of nodes that reach each other (strongly connected components of more than one node), by Tarjan."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in order:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], order[target])
        if lowest[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return sorted(found)


def folder_graph(graph: Graph, folder: str) -> dict[str, set[str]]:
    """Which child of a folder imports which other child; a child is a subfolder or a single module.

    Args:
        graph: imports between modules, by dotted name.
        folder: dotted name of the folder, e.g. ``budgetvlm`` or ``budgetvlm.profiling``.
    """

    def child(module: str) -> str | None:
        if not module.startswith(f"{folder}."):
            return None
        return module.removeprefix(f"{folder}.").split(".")[0]

    result: dict[str, set[str]] = {}
    for module, targets in graph.items():
        source = child(module)
        if source is not None:
            result.setdefault(source, set()).update(c for c in map(child, targets) if c is not None and c != source)
    return result


def folders(package: Path = PACKAGE) -> list[Path]:
    """The package and every folder in it that holds Python files."""
    return sorted({path.parent for path in source_files(package)})


def package_circles(graph: Graph, package: Path = PACKAGE) -> list[list[str]]:
    """Circles between the rooms of the house, and within a room between its folders.

    Directly below the package a module counts as a room. Further down a circle of files alone is left to `circles`.
    """
    found = []
    for folder in folders(package):
        name = ".".join([package.name, *folder.relative_to(package).parts])
        for circle in circles(folder_graph(graph, name)):
            if folder == package or any((folder / child).is_dir() for child in circle):
                found.append([f"{name}.{child}" for child in circle])
    return found


# ---- functions, classes, names


@dataclass(frozen=True)
class Function:
    """Where a function stands, how many lines it has (signature and docstring included) and how many parameters."""

    where: str
    lines: int
    parameters: int


def functions(package: Path = PACKAGE) -> list[Function]:
    """Every function and method, nested ones too."""
    return [
        _function(path, node, package)
        for path in source_files(package)
        for node in ast.walk(parse(path))
        if isinstance(node, FunctionNode)
    ]


def _function(path: Path, node: FunctionNode, package: Path) -> Function:
    a = node.args
    parameters = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) + (a.vararg is not None) + (a.kwarg is not None)
    where = f"{path.relative_to(package)}:{node.lineno} {node.name}"
    return Function(where, (node.end_lineno or node.lineno) - node.lineno + 1, parameters)


def quantile(values: Iterable[int], share: float) -> int:
    """The smallest value that at least this share of the values do not exceed (0 of none)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else 0


def public_classes(package: Path = PACKAGE) -> Iterator[tuple[str, str]]:
    """Name and place of every class at the top of a module whose name has no leading underscore."""
    for path in source_files(package):
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, f"{path.relative_to(package)}:{node.lineno}"


def repeated(named: Iterable[tuple[str, str]]) -> list[str]:
    """The names that stand at more than one place, with the places."""
    places: dict[str, list[str]] = {}
    for name, place in named:
        places.setdefault(name, []).append(place)
    return [f"{name}: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]


def repeated_files(package: Path = PACKAGE) -> list[str]:
    """File names, without ``__init__``, that stand in more than one folder."""
    files = [path for path in source_files(package) if path.name != "__init__.py"]
    return repeated((path.stem, str(path.relative_to(package))) for path in files)


def folders_without_purpose(package: Path = PACKAGE) -> list[str]:
    """Folders whose ``__init__`` does not begin with one line that ends as a sentence."""
    return [str(f.relative_to(package)) for f in folders(package) if not _has_purpose(f / "__init__.py")]


def _has_purpose(init: Path) -> bool:
    text = ast.get_docstring(parse(init)) if init.is_file() else None
    first = (text or "").split("\n\n")[0].strip()
    return bool(first) and "\n" not in first and first.endswith((".", "`"))


# ---- the count


def measures(package: Path = PACKAGE) -> list[Measure]:
    """All figures with their limits, in the order in which they are printed."""
    files, graph = source_files(package), import_graph(package)
    return [
        _counted("modules in the hall", 14, [p.name for p in sorted(package.glob("*.py")) if p.name != "__init__.py"]),
        _counted("circles of files", 0, map(" <> ".join, circles(graph))),
        _counted("circles of packages", 0, map(" <> ".join, package_circles(graph, package))),
        _longest("lines of the longest file", 350, {str(p.relative_to(package)): line_count(p) for p in files}),
        *_function_measures(functions(package)),
        _counted("file names that stand twice", 0, repeated_files(package)),
        _counted("public class names that stand twice", 0, repeated(public_classes(package))),
        _counted("folders without a one-line purpose", 0, folders_without_purpose(package)),
        Measure("lines of src/**/*.py", sum(map(line_count, files)), LINES_BEFORE - 4_000),
    ]


def _function_measures(all_functions: list[Function]) -> list[Measure]:
    lines = [function.lines for function in all_functions]
    return [
        Measure("lines of a function, median", quantile(lines, 0.5), 8),
        Measure("lines of a function, 90th percentile", quantile(lines, 0.9), 25),
        _longest("lines of the longest function", 60, {f.where: f.lines for f in all_functions}),
        _longest("most parameters of a function", 10, {f.where: f.parameters for f in all_functions}),
    ]


def _counted(name: str, limit: int, found: Iterable[str]) -> Measure:
    offenders = list(found)
    return Measure(name, len(offenders), limit, offenders if len(offenders) > limit else [])


def _longest(name: str, limit: int, sizes: Mapping[str, int]) -> Measure:
    above = [f"{size} {where}" for where, size in sorted(sizes.items(), key=lambda x: -x[1]) if size > limit]
    return Measure(name, max(sizes.values(), default=0), limit, above)


def context(package: Path = PACKAGE) -> dict[str, int]:
    """Figures without a limit that help to read the others."""
    by_folder = Counter(p.relative_to(package).parts[0] for p in source_files(package) if p.parent != package)
    return {
        "files": len(source_files(package)),
        "folders in the hall": len(by_folder),
        "functions": len(functions(package)),
        "lines before": LINES_BEFORE,
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; return 1 if one of them exceeds its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    options = parser.parse_args(arguments)
    found = measures()
    if options.json:
        print(json.dumps({"context": context(), "measures": [asdict(m) | {"holds": m.holds} for m in found]}, indent=2))
    else:
        for measure in found:
            print(f"{'ok  ' if measure.holds else 'MISS'} {measure.name:<40} {measure.value:>6}  limit {measure.limit}")
            print("".join(f"       {line}\n" for line in measure.offenders), end="")
        print(", ".join(f"{name}: {value}" for name, value in context().items()))
    return 0 if all(measure.holds for measure in found) else 1


if __name__ == "__main__":
    sys.exit(main())
