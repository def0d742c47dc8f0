"""The exception tree. Every message says what was given, why it cannot work and what to do.

BudgetVLMError
├── ConfigError        an option or argument that cannot work
│   └── MissingExtraError   a package that is not installed because it belongs to an optional part
├── KnobSpaceError     a knob, value or setting outside the knob space; two spaces that differ
├── InputError         an image, question or budget that cannot be used
│   └── InfeasibleError     a budget that nothing keeps, where that is to be refused
├── DataError          a file that is missing, truncated, foreign or inconsistent
├── CheckpointError    a checkpoint that does not fit or cannot be read
├── EngineError        an engine that serves a model refuses or fails
│   ├── EngineDownError     it cannot be reached, broke off, or is too busy: another may answer
│   │   └── EngineFailedError   it answered this request with an error of its own
│   └── EngineChangedError  it is not what it was
├── OutputError        a result that cannot be written, or that already exists
└── WorkerError        workers on other machines or processes that cannot be had, or die again and again

The command line turns any of them into exit code 2 and one message without a traceback.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class BudgetVLMError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code = 2


class ConfigError(BudgetVLMError, ValueError):
    """An option or argument that cannot work."""


class MissingExtraError(ConfigError):
    """A package that is not installed because it belongs to an optional part."""


class KnobSpaceError(BudgetVLMError, ValueError):
    """A knob, value or setting outside the knob space, or two knob spaces that differ."""


class InputError(BudgetVLMError, ValueError):
    """An image, question or budget that cannot be used."""


class InfeasibleError(InputError):
    """A budget that nothing is sure to keep, where the caller wants no answer then."""


class DataError(BudgetVLMError, ValueError):
    """A data file that is missing, truncated, foreign or inconsistent."""


class CheckpointError(BudgetVLMError, ValueError):
    """A checkpoint that cannot be read or does not fit."""


class EngineError(BudgetVLMError):
    """An engine that serves a model refuses or fails."""


class EngineDownError(EngineError):
    """An engine that cannot be reached, broke off, or is too busy; another one may answer."""


class EngineFailedError(EngineDownError):
    """An engine that answers this request with an error of its own, and perhaps no other."""


class EngineChangedError(EngineError):
    """An engine that shows images in another way than it did: restarted with other flags, or another model."""


class OutputError(BudgetVLMError, OSError):
    """A result that cannot be written, or that already exists."""


class WorkerError(BudgetVLMError, RuntimeError):
    """Workers in other processes that cannot be had, or die again and again."""


class BudgetVLMWarning(UserWarning):
    """Something that may be wrong and cannot be checked; the command line prints it as a note."""


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print our warnings to standard error as notes, without the place in the code, for a ``with`` block."""
    with warnings.catch_warnings():
        shown = warnings.showwarning
        warnings.showwarning = lambda text, kind, *rest: (
            print(f"note: {text}", file=sys.stderr) if issubclass(kind, BudgetVLMWarning) else shown(text, kind, *rest)
        )
        yield
