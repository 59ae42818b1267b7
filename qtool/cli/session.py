"""What every command does around its work: errors in two lines or as JSON, and exit codes."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from qtool.console import Terminal
from qtool.errors import (
    CapacityError,
    InterruptionError,
    QtoolError,
    UsageError,
    is_out_of_memory,
)

COMMANDS = frozenset({"inspect", "estimate-memory", "quantize", "calibrate", "export", "eval"})
ISSUES = "this is a bug in qtool: run again with -v and report the traceback"


class _Command:
    """The command of this process, as far as its last words go."""

    terminal: Terminal | None = None
    told = False  # why it failed


@contextmanager
def session(
    command: str,
    *,
    as_json: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    no_progress: bool = False,
) -> Iterator[Terminal]:
    """Yield the terminal of one command, and turn what escapes into the contract's exit codes."""
    _quieten_libraries()
    terminal = Terminal(
        as_json=as_json, quiet=quiet, verbose=verbose, show_progress=not no_progress
    )
    _Command.terminal = terminal
    try:
        try:
            _refuse_lost_directory()
            yield terminal
        finally:
            terminal.close()  # before anything else is said
    except QtoolError as error:
        _fail(terminal, command, error)
    except KeyboardInterrupt:
        interruption = InterruptionError(
            "interrupted, nothing half-written was left behind",
            "run the same command to start again",
        )
        _fail(terminal, command, interruption)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:  # noqa: BLE001 - the one place where bugs become exit code 1
        if is_out_of_memory(error):
            advice = "use fewer or shorter windows, or a smaller --max-ram budget"
            _fail(terminal, command, CapacityError("out of memory", advice))
        # What the system refuses is no bug wherever it comes up, in a library's files included.
        from qtool.checkpoint.disk_errors import system_error

        if (refusal := system_error(error)) is not None:
            _fail(terminal, command, refusal)
        if verbose:
            terminal.err.print(traceback.format_exc(), markup=False)
        _fail(terminal, command, QtoolError(f"{type(error).__name__}: {error}", ISSUES))


def _refuse_lost_directory() -> None:
    """Refuse to start where no relative path leads anywhere and libraries fail to load."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(
            f"the working directory cannot be used: {error.strerror}", "change to one that is there"
        ) from error


def _fail(terminal: Terminal, command: str, error: QtoolError) -> None:
    _show(terminal, command, error)
    raise typer.Exit(error.exit_code)


def _show(terminal: Terminal, command: str, error: QtoolError) -> None:
    terminal.error(error)
    if terminal.as_json and not terminal.answered:  # stdout has one object and no more
        with suppress(QtoolError):  # a full disk under stdout; stderr has the first error already
            terminal.result(error_object(command, error), "")
    _Command.told = True


def show_failure(command: str, error: QtoolError, *, as_json: bool) -> None:
    """Print an error that came up before a command had a session of its own."""
    known = command if command in COMMANDS else "error"
    _show(Terminal(as_json=as_json), known, error)


def begin_command() -> None:
    """Forget what was said of the command before."""
    _Command.terminal, _Command.told = None, False


def say_interrupted(arguments: Sequence[str]) -> None:
    """Answer a request to end that no session heard: before its work, or while it gave up."""
    if _Command.told:
        return
    named = next((word for word in arguments if word in COMMANDS), "error")
    terminal = _Command.terminal or Terminal(as_json="--json" in arguments)
    _show(terminal, named, InterruptionError("interrupted", "run the same command again"))


def error_object(command: str, error: QtoolError) -> dict[str, Any]:
    """Return the JSON object of a failed command."""
    return {
        "schema": f"qtool.{command}/1",
        "ok": False,
        "exit_code": error.exit_code,
        "error": error.as_json(),
    }


def _quieten_libraries() -> None:
    """Keep other libraries' bars and advice off the terminal; ours say what matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
