"""The command line: options in, exit codes out. Heavy libraries are imported inside commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import typer

from qtool import __version__
from qtool.cli import options
from qtool.cli.calibrate import calibrate
from qtool.cli.estimate_memory import estimate_memory
from qtool.cli.evaluate import evaluate
from qtool.cli.export import export
from qtool.cli.quantize import quantize
from qtool.cli.session import begin_command, session, show_failure
from qtool.console import finish_stdout
from qtool.errors import InterruptionError, QtoolError, UsageError

# The lines at the end of every --help; tests run each of them.
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "inspect": (
        "qtool inspect ./model",
        "qtool inspect ./model --tensors --json",
        "qtool inspect ./model-awq-w4g128 --diff ./model",
    ),
    "estimate-memory": (
        "qtool estimate-memory 8b",
        "qtool estimate-memory 70b --gpu 2x24GB --ram 64GB --ctx 16384",
        "qtool estimate-memory ./model --gpu rtx4090 --explain gguf:Q8_0",
        "qtool estimate-memory 8b --gpu 24GB --phase qlora --ctx 1024",
    ),
    "quantize": (
        "qtool quantize ./model --dry-run",
        "qtool quantize ./model --method awq --bits 4",
        "qtool quantize ./model -m gptq -b 4 -g 64 -n 64 -l 512 -o ./small",
        "qtool quantize ./model -m rtn -b 8 -f compressed-tensors --ignore down_proj",
        "qtool quantize ./model -f gguf:Q4_K_M -n 64 -l 512 --modelfile",
    ),
    "calibrate": (
        "qtool calibrate ./model -o stats.gguf -n 32 -l 512",
        "qtool calibrate ./model -o code.gguf -d builtin -n 8 -l 256 --seed 7",
    ),
    "export": (
        "qtool export ./model -f gguf:Q8_0",
        "qtool export ./model -f gguf:Q4_K_M --statistics stats.gguf -o small.gguf",
        "qtool export ./model-awq-w4g128 -f safetensors:BF16 -o ./float",
    ),
    "eval": (
        "qtool eval ./model --ctx 512 -n 8",
        "qtool eval ./model-awq-w4g128 --ref ./model --ctx 512",
    ),
}


def _epilog(command: str) -> str:
    """Return the end of a --help, whose lines are not to be wrapped."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in EXAMPLES[command])])


app = typer.Typer(
    name="qtool",
    help="Turn a Hugging Face language model into quantized files that people run.",
    epilog="Start with: qtool inspect MODEL",
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


@app.command(epilog=_epilog("inspect"))
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


_COMMANDS: Mapping[str, Callable[..., None]] = {
    "estimate-memory": estimate_memory,
    "quantize": quantize,
    "calibrate": calibrate,
    "export": export,
    "eval": evaluate,
}
for _name, _function in _COMMANDS.items():
    app.command(_name, epilog=_epilog(_name))(_function)


def run(arguments: list[str]) -> int:
    """Carry out a command line and return its exit code."""
    begin_command()
    given = [_dashed(argument) for argument in arguments] or ["--help"]
    try:
        command: Any = typer.main.get_command(app)
        returned: Any = command.main(args=given, prog_name="qtool", standalone_mode=False)
    except KeyboardInterrupt:
        returned = InterruptionError.exit_code
    except (OSError, SystemExit):  # a help text that stdout did not take
        finish_stdout()
        return 0
    except Exception as error:
        refusal = _usage_error(error)
        if refusal is None:
            raise
        show_failure(given[0], refusal, as_json="--json" in given)
        return UsageError.exit_code
    finish_stdout()
    return returned if isinstance(returned, int) else 0


def _dashed(argument: str) -> str:
    """Accept underscores in long flags, so that lines written for other tools port."""
    match = re.match(r"--[a-z][a-z_-]*", argument)
    return argument if match is None else match[0].replace("_", "-") + argument[match.end() :]


def _usage_error(error: Exception) -> QtoolError | None:
    """Return the parser's own usage errors as ours, None for anything else."""
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    context = getattr(error, "ctx", None)
    name = context.command_path if context is not None else "qtool"
    message = str(format_message()).rstrip(".")
    return UsageError(message[:1].lower() + message[1:], f"{name} --help")
