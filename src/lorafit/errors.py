"""The errors of lorafit, each one line for the user: where, what with the value, what to do.

LorafitError            exit code 2   the root; never raised itself
├── ConfigError         (ValueError)  an option, a configuration file, a run's folder
├── DataError           (ValueError)  one fault of a data file, at file:line
├── ModelError          (ValueError)  a model file or folder: header, key, tensor, tokenizer, template
├── AdapterError        (ValueError)  an adapter's folder: configuration, tensors, the wrong base
├── ResumeError         (ValueError)  a run that cannot go on as it was
├── NonFiniteError      (ArithmeticError)  NaN or infinity in training, with the tensor's name
├── MemoryLimitError    exit code 3 (MemoryError)  does not fit the memory given
├── Interrupted         exit code 130 or 143  stopped by a signal, after a checkpoint
└── Faults              several faults of the same kind at once
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 20  # faults printed before "and N more"


class LorafitError(Exception):
    """What went wrong, where, and what to do; `str()` of it is one line.

    place: `file:line`, an option, a field or a tensor's name. what: the fault with the offending value.
    remedy: what the user can do; may be empty where `what` says it.
    """

    exit_code = 2

    def __init__(self, place: str, what: str, remedy: str = "") -> None:
        self.place, self.what, self.remedy = place, what, remedy
        super().__init__(place, what, remedy)

    def __str__(self) -> str:
        text = f"{self.place}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")
        return " ".join(text.split())  # a value from a file may hold newlines; an error is one line

    def lines(self) -> list[str]:
        """The lines to print, without the leading `error: `."""
        return [str(self)]


class ConfigError(LorafitError, ValueError):
    """An option, a configuration file or a run's folder is wrong."""


class DataError(LorafitError, ValueError):
    """One fault of a data file; `place` is file:line."""


class ModelError(LorafitError, ValueError):
    """A model file or folder cannot be used; `place` is the file and the key or tensor."""


class AdapterError(LorafitError, ValueError):
    """An adapter's folder cannot be used with this base."""


class ResumeError(LorafitError, ValueError):
    """A run cannot go on: its files, data, base or settings are not what they were."""


class NonFiniteError(LorafitError, ArithmeticError):
    """A NaN or an infinity appeared; `place` names the tensor."""


class MemoryLimitError(LorafitError, MemoryError):
    """The work does not fit the memory given."""

    exit_code = 3


class Interrupted(LorafitError):
    """A signal stopped the run after a checkpoint was written; signal_number: 2 or 15."""

    def __init__(self, place: str, what: str, remedy: str, signal_number: int) -> None:
        super().__init__(place, what, remedy)
        self.exit_code = 128 + signal_number


class Faults(LorafitError, ValueError):
    """Several faults at once; prints the first 20 and counts the rest."""

    def __init__(self, faults: Sequence[LorafitError]) -> None:
        assert faults, "Faults needs at least one fault"
        super().__init__(faults[0].place, faults[0].what, faults[0].remedy)
        self.faults = list(faults)

    def lines(self) -> list[str]:
        shown = [str(fault) for fault in self.faults[:SHOWN]]
        more = len(self.faults) - SHOWN
        return [*shown, f"{self.faults[0].place.split(':')[0]}: and {more} more"] if more > 0 else shown
