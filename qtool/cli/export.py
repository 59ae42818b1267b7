"""`qtool export`: from one format to another, without calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from qtool.cli import options
from qtool.cli.session import session
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.recipe.schema import Export


def export(
    model: options.Model,
    output_format: Annotated[
        str,
        typer.Option(
            "-f",
            "--format",
            help="gguf:TYPE such as gguf:Q8_0, or safetensors[:BF16|F16|F32].",
            show_default=False,
        ),
    ],
    output: options.Output = None,
    statistics: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--statistics", help="From qtool calibrate or llama-imatrix: what matters."),
    ] = None,
    override: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--override", metavar="PATTERN=TYPE", help="Another type for some. Repeatable."
        ),
    ] = None,
    output_type: options.OutputType = None,
    embed_type: options.EmbedType = None,
    pre: options.Pre = None,
    strict: options.Strict = False,
    split_max_size: options.SplitMaxSize = None,
    modelfile: options.Modelfile = False,
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="Round a second time what was quantized before."),
    ] = False,
    revision: options.Revision = None,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read no weights, write nothing.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert a model, or a quantized file, to GGUF or float safetensors, without calibration."""
    with session(
        "export", as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress
    ) as terminal:
        from qtool.cli.admission import admitted
        from qtool.cli.recipe_flags import GGUF_KEYS, is_gguf
        from qtool.pipeline.admission import check_conversion
        from qtool.pipeline.gguf_admission import check_restorable
        from qtool.recipe.load import validated
        from qtool.recipe.rules import parse_override
        from qtool.recipe.schema import Export as Section

        keys = {
            "format": output_format,
            "output_type": output_type,
            "embed_type": embed_type,
            "pre": pre,
            "strict": strict,
            "split_max_size": split_max_size,
            "modelfile": modelfile,
        }
        given = next((key for key in GGUF_KEYS if keys[key]), None)
        if given is not None and not is_gguf(output_format):
            raise UsageError(
                f"--{given.replace('_', '-')} is for GGUF, but the output is {output_format}",
                "leave it away, or choose -f gguf:TYPE",
            )
        section = validated(Section, keys, "command line")
        rules = tuple(parse_override(text) for text in override or [])
        checkpoint = admitted(
            model,
            terminal,
            revision=revision,
            offline=offline,
            gguf=True,
            trust_remote_code=trust_remote_code,
            statistics=[] if statistics is None else [statistics],
        )
        if section.gguf_type is not None:
            check_conversion(checkpoint, pre=section.pre)
        elif checkpoint.gguf:
            check_restorable(checkpoint.gguf)
        from qtool.checkpoint.output import output_place
        from qtool.cli.export_report import export_result, export_table
        from qtool.cli.quantize_report import typed
        from qtool.pipeline.export import plan_export, run_export

        plan = plan_export(
            checkpoint,
            section,
            rules,
            importance=statistics is not None,
            allow_requantize=allow_requantize,
        )
        path = destination(output, checkpoint.name, section)
        sources = [part.path for part in checkpoint.gguf] or [checkpoint.path]
        sources += [] if statistics is None else [statistics]
        output_place(path, overwrite=overwrite, sources=sources)
        progress = terminal.progress()
        for code, message in plan.notes:
            progress.warn(code, message)
        extra = {} if statistics is None else _statistics(statistics, plan, progress)
        result = None
        if not dry_run:
            result = run_export(plan, path, progress, overwrite=overwrite, **extra)
        flags = {
            **keys,
            "statistics": statistics,
            "override": override,
            "allow_requantize": allow_requantize,
            "revision": revision,
            "output": typed(path),
        }
        arguments = f"{checkpoint.source} {options.written(flags)}"
        terminal.result(
            export_result(plan, path, progress.warnings, result),
            export_table(plan, path, arguments, result),
        )


def destination(output: Path | None, name: str, section: Export) -> Path:
    """Return where the result goes: -o, or ./NAME-TYPE.gguf, or ./NAME-safetensors."""
    if output is not None:
        if output.suffix == ".gguf" and section.gguf_type is None:
            raise UsageError(
                f"the output {output} ends in .gguf, but {section.format} is a directory",
                "choose another --output, or -f gguf:Q8_0",
            )
        return output
    if section.gguf_type is None:
        return Path(f"{name}-{section.format.replace(':', '-').lower()}")
    return Path(f"{name}-{section.gguf_type}.gguf")


def _statistics(path: Path, plan: Any, progress: Any) -> dict[str, Any]:
    """Return the importance of every matrix that a statistics file knows, for `run_export`."""
    from qtool.pipeline.calibrate import importance_for
    from qtool.pipeline.outputs import CalibrationNote

    wanted = {
        x.converted.name: x.converted.shape[-1]
        for x in plan.output.tensors
        # A tied head's statistics would weigh errors of the embeddings, which they say nothing of.
        if len(x.converted.shape) > 1 and x.converted.name != "token_embd.weight"
    }
    importance, found = importance_for(path, wanted)
    for warning in found.warnings:
        progress.warn("statistics", warning)
    note = CalibrationNote(path.name, found.datasets, found.windows, len(importance))
    return {"importance": importance, "note": note}
