"""Which data set, read from where, asked how: what the commands' flags say, and what profiles remember of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from budgetvlm.errors import ConfigError
from budgetvlm.tasks.layouts import CAPTION, LAYOUTS, OWN, ROLES, DatasetLayout
from budgetvlm.tasks.task import Task

if TYPE_CHECKING:
    from budgetvlm.tasks.sources import Source

BUNDLED = "signs"
SIGNS = {"data_files": ":", "columns": ":", "metric": ":", "prompt": ":", "repository": "="}  # behind a data set's name
OF_ALL = ("metric", "prompt")  # what may be said once for several data sets
PLACES = ("data_files", "repository")  # where the data lies; the other options say what it is


@dataclass(frozen=True)
class TaskOptions:
    """A data set, or several.

    Attributes:
        dataset_name: data set, or several with commas: text_vqa,pope. With local files any name will do.
        data_files: local files in place of the hub: a file, several, a folder, or train=FILE,test=FILE; with several
            data sets "name:split=FILE,...".
        columns: columns that have other names: question=query,answers=label.
        metric: metric that scores an answer, in place of the data set's own; with several data sets of all, or
            "name:METRIC,...".
        prompt: how the question is asked, with {question} and {options}, in place of the data set's own; with several
            data sets of all, or "name:PROMPT,...".
        repository: repository on the hub, in place of the data set's own; with several data sets "name=ID,...".
    """

    dataset_name: str = BUNDLED
    data_files: str | None = None
    columns: str | None = None
    metric: str | None = None
    prompt: str | None = None
    repository: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The data sets' names."""
        return tuple(name.strip() for name in self.dataset_name.replace("+", ",").split(","))

    @property
    def name(self) -> str:
        """The name of the task, also in the names of result files."""
        return "+".join(self.names)

    def only(self, name: str) -> TaskOptions:
        """Return what is said of one data set. Raises ConfigError: an option does not say of which it speaks."""
        given = self.to_dict()
        return TaskOptions(name, **{option: _part(given[option], name, self.names, option) for option in given})

    @classmethod
    def joined(cls, parts: Sequence[TaskOptions]) -> TaskOptions:
        """Return the options of several data sets as one, the opposite of `only`."""
        found = {}
        for option, sign in SIGNS.items():
            said = {part.name: getattr(part, option) for part in parts}
            alike = option in OF_ALL and len(set(said.values())) == 1
            texts = [f"{name}{sign}{text}" for name, text in said.items() if text is not None]
            found[option] = next(iter(said.values())) if alike else ",".join(texts) or None
        return cls(",".join(part.dataset_name for part in parts), **found)

    def to_dict(self) -> dict[str, str]:
        """Return what profiles remember; empty for a task that needs no options."""
        given = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: value for name, value in given.items() if value is not None}

    def remembered(self, stored: Mapping[str, Any]) -> TaskOptions:
        """Return the options of a profile, with the places where the data lies now.

        Raises:
            ConfigError: an option that says another thing than the profile's.
        """
        known = {field.name for field in fields(self)[1:]}
        stored = {name: str(value) for name, value in stored.items() if name in known}
        differing = {
            name: value for name, value in self.to_dict().items() if name not in PLACES and stored.get(name) != value
        }
        if differing:
            raise ConfigError(
                "; ".join(f"--{n} {v!r}, but the profiles have {stored.get(n)!r}" for n, v in differing.items())
                + ". Leave it out, or profile again with it."
            )
        return replace(TaskOptions(self.dataset_name, **stored), **self.to_dict())


def load_task(options: str | TaskOptions) -> Task:
    """Open a task by name or by its options. Raises ConfigError: there is no such task, or an option cannot work."""
    options = options if isinstance(options, TaskOptions) else TaskOptions(options)
    names = options.names
    if "" in names or len(set(names)) < len(names):
        raise ConfigError(f"dataset_name={options.dataset_name!r} has to name each data set once")
    tasks = [_open(options.only(name)) for name in names]
    if len(tasks) == 1:
        return tasks[0]
    from budgetvlm.tasks.combined import CombinedTask

    return CombinedTask(tasks)


def _open(options: TaskOptions) -> Task:
    """Open one data set."""
    name, files, columns = options.name, options.data_files, parse_columns(options.columns)
    if name == BUNDLED:
        if options.to_dict():
            raise ConfigError(
                f"the task {BUNDLED} is drawn, not read: {', '.join(f'--{name}' for name in options.to_dict())} cannot "
                "be used with it. Give another --dataset_name, or leave them out."
            )
        from budgetvlm.tasks.signs_task import SignsTask

        return SignsTask()
    if name not in LAYOUTS and files is None:
        raise ConfigError(
            f"there is no task {name!r}; this version has: {', '.join((BUNDLED, *LAYOUTS))}. For a data set of your "
            "own give its files with --data_files."
        )
    from budgetvlm.tasks.dataset import DataSetTask

    layout = _layout(name, options.metric)
    prompt = options.prompt.replace("\\n", "\n") if options.prompt else None
    splits, open_split = _local(files) if files is not None else _on_the_hub(layout, options.repository)
    return DataSetTask(name, layout, open_split, splits, columns=columns, prompt=prompt)


def _layout(name: str, metric: str | None) -> DatasetLayout:
    layout = LAYOUTS.get(name, OWN)
    if metric == "cider" and name not in LAYOUTS:
        layout = replace(layout, prompt=CAPTION, max_new_tokens=LAYOUTS["coco_caption"].max_new_tokens)
    return layout if metric is None else replace(layout, metric=metric)


def _local(files: str) -> tuple[tuple[str, ...], Callable[[str], Source]]:
    """Return the splits of local files, and what opens one."""
    from budgetvlm.tasks.sources import find_files, open_source

    found = find_files(files)
    return tuple(found), lambda split: open_source(found[split])


def _on_the_hub(layout: DatasetLayout, repository: str | None) -> tuple[tuple[str, ...], Callable[[str], Source]]:
    from budgetvlm.tasks.hub import HubSource

    where = repository or layout.repository
    return tuple(layout.splits), lambda split: HubSource(where, layout.splits[split], layout.folder)


def _part(text: str, name: str, names: tuple[str, ...], option: str) -> str | None:
    """Return what an option says of one data set: all of it or, with several data sets, what follows "name:"."""
    sign = SIGNS[option]
    if len(names) == 1:
        return text if option in OF_ALL else text.removeprefix(f"{name}{sign}") or None
    own: list[str] = []
    current = None
    for part in text.split(","):
        before, found, rest = part.partition(sign)
        current, part = (before.strip(), rest) if found and before.strip() in names else (current, part)
        if current is None and option in OF_ALL:
            return text
        if current is None:
            raise ConfigError(f"{option}={text!r} has to say of which data set it speaks: {names[0]}{sign}...")
        own += [part] if current == name else []
    return ",".join(own) or None


def parse_columns(text: str | None) -> dict[str, str]:
    """Read "question=query,answers=label". Raises ConfigError: an unknown or repeated role, or one without a column."""
    pairs = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    wrong = [a.strip() for a, _, b in pairs if a.strip() not in ROLES or not b.strip()]
    if wrong:
        raise ConfigError(
            f"columns={text!r}: {', '.join(wrong)} cannot be used. Give ROLE=COLUMN with a role of {', '.join(ROLES)}."
        )
    return named_once(f"columns={text!r}", ((role.strip(), column.strip()) for role, _, column in pairs))


def named_once(given: str, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return pairs as a dictionary. Raises ConfigError where a name has two values, of which only one can count."""
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"{given}: {name} is given twice, {found[name]} and {value}. Give it once.")
        found[name] = value
    return found
