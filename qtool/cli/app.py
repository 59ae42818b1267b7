"""The command line: options in, exit codes out. Heavy libraries are imported inside commands."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import typer

from qtool import __version__
from qtool.cli import options
from qtool.cli.calibrate import calibrate
from qtool.cli.evaluate import evaluate
from qtool.cli.quantize import quantize
from qtool.cli.session import session
from qtool.errors import QtoolError, UsageError

INTERRUPTED = 130

app = typer.Typer(
    name="qtool",
    help="Turn a Hugging Face language model into quantized files that people run.",
    epilog="Start with: qtool inspect MODEL",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"qtool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Show the version.", callback=_version, is_eager=True
    ),
) -> None:
    del version


@app.command(
    epilog="Examples:  qtool inspect ./model    qtool inspect ./model --tensors --json",
)
def inspect(
    model: options.Model,
    tensors: bool = typer.Option(False, "--tensors", help="List every tensor."),
    diff: str = typer.Option(None, "--diff", metavar="OTHER", help="Compare with another model."),
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Say what a model is, from its configuration and headers alone."""
    with session("inspect", as_json=as_json, quiet=quiet, verbose=verbose) as terminal:
        from qtool.cli.inspect_model import render_inspection, run_inspect

        result = run_inspect(model, tensors=tensors, diff=diff, revision=revision, offline=offline)
        envelope = {"schema": "qtool.inspect/1", "ok": True, "exit_code": 0, **result}
        terminal.result({**envelope, "error": None}, render_inspection(result))


_COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "quantize": (
        quantize,
        "Examples:  qtool quantize ./model --method awq --bits 4    "
        "qtool quantize ./model -m gptq -b 4 -g 64 --dry-run",
    ),
    "calibrate": (calibrate, "Examples:  qtool calibrate ./model -o stats.gguf -n 32 -l 512"),
    "eval": (evaluate, "Examples:  qtool eval ./model-gptq-w4g128 --ref ./model --ctx 512"),
}
for _name, (_function, _epilog) in _COMMANDS.items():
    app.command(_name, epilog=_epilog)(_function)


def run(arguments: list[str]) -> int:
    """Carry out a command line and return its exit code."""
    command: Any = typer.main.get_command(app)
    try:
        returned = command.main(
            args=[_dashed(argument) for argument in arguments],
            prog_name="qtool",
            standalone_mode=False,
        )
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted: nothing was written under the output's name\n")
        return INTERRUPTED
    except QtoolError as error:  # already shown by the session
        return error.exit_code
    except BrokenPipeError:
        # The reader of stdout left; closing it again at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        shown = _usage_message(error)
        if shown is None:
            raise
        sys.stderr.write(shown)
        return UsageError.exit_code
    return returned if isinstance(returned, int) else 0


def _dashed(argument: str) -> str:
    """Accept underscores in long flags, so that lines written for other tools port."""
    match = re.match(r"--[a-z][a-z_-]*", argument)
    return argument if match is None else match[0].replace("_", "-") + argument[match.end() :]


def _usage_message(error: Exception) -> str | None:
    """Return the text of the parser's own usage errors, None for anything else."""
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    context = getattr(error, "ctx", None)
    name = context.command_path if context is not None else "qtool"
    return f"error: {format_message()}\n  try: {name} --help\n"
