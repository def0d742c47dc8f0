"""Which columns of a table hold what: names that are given, those of a known layout, and the layout of VLMEvalKit."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from string import ascii_uppercase

from budgetvlm.errors import ConfigError, DataError

JOINED = ("sample_id", "image_id", "options")  # roles that "a+b" makes sense for
_NUMBERED_IMAGE = re.compile(r"(image|img|picture)[_ ]?\d+", re.IGNORECASE)

Columns = dict[str, tuple[str, ...]]


def find_columns(
    source: str, there: Sequence[str], wanted: Mapping[str, str], given: Mapping[str, str], required: Collection[str]
) -> Columns:
    """Find those of the columns ``there`` that each role takes.

    ``wanted`` are the names of each role, see `layouts`; those that the user has ``given`` have to be there, and so do
    ``required`` roles. Raises ConfigError: a role of one column that joins several; DataError: a missing column.
    """
    found: Columns = {}
    missing = []
    for role, names in wanted.items():
        columns = fitting(names, there)
        if columns and len(columns) > 1 and role not in JOINED:
            raise ConfigError(f"columns: {role}={names} joins columns, which only {', '.join(JOINED)} can. Name one.")
        if columns:
            found[role] = columns
        elif role in required or role in given:
            missing.append(f"{role} ({names.replace('|', ' or ')})")
    if missing:
        raise DataError(
            f"{source}: no column for {', '.join(missing)}. It has {', '.join(there) or 'none'}. Say which is which "
            f"with --columns {missing[0].split()[0]}=NAME."
        )
    if "options" in wanted and "options" not in found:
        letters = tuple(takewhile(lambda name: name in there, ascii_uppercase))
        found |= {"options": letters} if len(letters) > 1 else {}
    return found


def require_one_image(source: str, there: Sequence[str], found: Columns) -> None:
    """Raise DataError where other columns look as if they held further images of a question."""
    others = [name for name in there if _NUMBERED_IMAGE.fullmatch(name) and name not in found["image"]]
    if others:
        names = ", ".join([*found["image"], *others])
        raise DataError(
            f"{source}: a question is about one image, and {names} are columns of images. "
            f"Say which one counts, for example --columns image={found['image'][0]}; samples that need another one "
            "cannot be asked."
        )


def fitting(names: str, columns: Collection[str]) -> tuple[str, ...] | None:
    """Return the first of "a|b+c" whose columns are all there; None: none is."""
    options = ((option,) if option in columns else tuple(option.split("+")) for option in names.split("|"))
    return next((option for option in options if set(option) <= set(columns)), None)
