"""Errors a user can act on: what happened, where, what to do, and the exit code of the contract.

Every refusal in qtool is a `QtoolError`. The command line prints its two lines and exits with its
code; anything else that escapes is a bug (exit code 1).
"""

from __future__ import annotations

from typing import ClassVar

MAX_QUOTED = 200  # characters of a value that a message repeats


def shortened(text: str) -> str:
    """Return a text as a message may quote it: its beginning, if it is long."""
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED - 3]}..."


class QtoolError(Exception):
    """Say what went wrong and where, and what to do about it.

    Args:
        message: one line, what and where (file, tensor, key, value).
        hint: one line, what to do next; empty if there is nothing sensible to say.
        resumable: whether running the same command again continues the work.
    """

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "", *, resumable: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.resumable = resumable

    def as_json(self) -> dict[str, str | bool]:
        """Return the error in the terms of the JSON contract."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "resumable": self.resumable,
        }


class InterruptionError(QtoolError):
    """Ctrl-C, or a request to end."""

    code = "interrupted"
    exit_code = 130


class UsageError(QtoolError):
    """A flag, argument or recipe that cannot be carried out as written."""

    code = "usage"
    exit_code = 2


class GateError(QtoolError):
    """A quality gate failed; the output is kept."""

    code = "gate"
    exit_code = 3


class CapacityError(QtoolError):
    """Not enough memory or disk."""

    code = "does_not_fit"
    exit_code = 4


# How torch words it; its own error type would have to be imported.
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "failed to map segment",  # of a library that is being loaded
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of Python or PyTorch, for host or device, means that memory is out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower() if isinstance(error, RuntimeError | OSError | ImportError) else ""
    return any(words in said for words in NO_MEMORY)


class UnsupportedError(QtoolError):
    """A model, format or engine combination that qtool does not do."""

    code = "unsupported"
    exit_code = 5


class DamagedError(QtoolError):
    """Input that is missing, truncated or malformed, or output that failed its verification."""

    code = "damaged"
    exit_code = 6


class HubError(QtoolError):
    """The hub, the network or authentication."""

    code = "hub"
    exit_code = 7


class NumericalError(QtoolError):
    """NaN, infinity or a matrix that cannot be factored."""

    code = "numerical"
    exit_code = 8
