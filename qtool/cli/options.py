"""Options that several commands share, with their help texts and `QTOOL_*` variables."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qtool.recipe.sizes import MOST

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model directory or hub id.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks of bugs.")]
NoProgress = Annotated[
    bool, typer.Option("--no-progress", help="No progress display.", envvar="QTOOL_NO_PROGRESS")
]
Revision = Annotated[
    Optional[str],  # noqa: UP045 - typer reads this at run time
    typer.Option("--revision", help="Branch, tag or commit on the hub.", envvar="QTOOL_REVISION"),
]
Offline = Annotated[
    bool,
    typer.Option("--offline", help="Use only what is on this machine.", envvar="HF_HUB_OFFLINE"),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Take a model that names code of its own (auto_map) as a plain one of its family. "
        "The code itself is never run.",
    ),
]
TrustTaskCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Take a model that names code of its own (auto_map) as a plain one of its family; its "
        "code is never run. With --task-path: run the code of those definitions.",
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N.", envvar="QTOOL_DEVICE"),
]
Datasets = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "-d",
        "--dataset",
        help="builtin, FILE.txt|jsonl|parquet, or hf:ID[:split[:column]]; each with an optional "
        ":n=WINDOWS. Repeatable.",
        show_default="builtin",
    ),
]
Windows = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "-n", "--windows", help="Calibration windows.", show_default="128", min=1, max=MOST
    ),
]
SequenceLength = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "-l",
        "--seqlen",
        "--sequence-length",
        help="Tokens of a window.",
        show_default="2048",
        min=2,
        max=MOST,
    ),
]
Seed = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--seed", help="Chooses calibration windows.", show_default="42", envvar="QTOOL_SEED"
    ),
]
ChatTemplate = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--chat-template", help="auto, on or off.", show_default="auto"),
]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("-o", "--output", help="Where the result goes.", show_default=False),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output once the new one is complete.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume",
        help="Go on with what an interrupted run of the same command finished, or start over.",
    ),
]
MaxRam = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--max-ram",
        help="Budget for activations held inside a block, such as 4GB.",
        envvar="QTOOL_MAX_RAM",
    ),
]
OutputType = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--output-type", metavar="TYPE", help="gguf: type of the output projection."),
]
EmbedType = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--embed-type", metavar="TYPE", help="gguf: type of the token embeddings."),
]
Pre = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--pre", metavar="NAME", help="gguf: the pre-tokenizer, if it is unknown."),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="gguf: refuse rows that the type's blocks do not divide.")
]
SplitMaxSize = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--split-max-size", metavar="SIZE", help="gguf: several files of at most that."),
]
Modelfile = Annotated[
    bool, typer.Option("--modelfile", help="gguf: write a Modelfile for Ollama beside it.")
]


def written(flags: Mapping[str, Any]) -> str:
    """Return the flags that were given, as one types them."""
    words: list[str] = []
    for key, value in flags.items():
        name = f"--{key.replace('_', '-')}"
        if isinstance(value, list):
            words += [word for one in value for word in (name, shlex.quote(one))]
        elif value is True:
            words.append(name)
        elif value:
            words += [name, shlex.quote(str(value))]
    return " ".join(words)
