"""Write the report of an evaluation: a page, the same as Markdown, its plots and its figures."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.output import OutputDirectory, check_output
from qtool.checkpoint.untrusted import shown_path
from qtool.errors import QtoolError, UsageError
from qtool.evaluation.report_markdown import markdown
from qtool.evaluation.report_page import PLOTS, image_of, page, plot_files, plot_images
from qtool.evaluation.report_reading import facts_of
from qtool.json_text import json_text

PAGE, TEXT, FIGURES = "index.html", "REPORT.md", "report.json"
_DRAWN = [name for plot in PLOTS for name in (plot.file, image_of(plot.file))]
OUR_FILES = frozenset({PAGE, TEXT, FIGURES, *_DRAWN})


def report_files(result: Mapping[str, Any], images: Collection[str] = ()) -> dict[str, str]:
    """Return file name -> content of a report, but for its PNG files.

    Args:
        result: the object that `qtool eval --json` prints; what it lacks is left out.
        images: PNG files that will lie beside.
    """
    facts = facts_of(result)
    plots = plot_files(facts)
    return {
        PAGE: page(facts, images),
        TEXT: markdown(facts, list(plots)),
        **plots,
        FIGURES: f"{json_text(result, indent=1)}\n",
    }


def write_report(result: Mapping[str, Any], directory: Path) -> tuple[Path, ...]:
    """Write a report, complete or not at all, and return its files, the page first.

    An older report in the directory is replaced. PNG files are left out without the extra.

    Args:
        result: the object that `qtool eval --json` prints.
        directory: absent, empty, or with an older report and nothing else in it.

    Raises:
        UsageError: something else is in the way.
        CapacityError: the disk is full.
    """
    images = plot_images(facts_of(result))
    files = {name: text.encode() for name, text in report_files(result, images).items()} | images
    try:
        place = _ReportDirectory(directory)
        with place as partial:
            for name, content in files.items():
                try:
                    (partial / name).write_bytes(content)
                except OSError as error:
                    raise write_error(partial / name, error) from error
            final = place.commit()
    except QtoolError as error:
        raise _about_report(error) from error
    return tuple(final / name for name in files)


def check_report(directory: Path, models: Sequence[Path] = ()) -> Path:
    """Return the absolute path of a report, or refuse it before hours of evaluation.

    Args:
        directory: where it shall be.
        models: directories that are only read, which it may not lie in.

    Raises:
        UsageError: a file, a link, a directory with something else than a report in it, or a
            place where none can be made.
    """
    try:
        final = _ReportDirectory(directory).final
    except QtoolError as error:
        raise _about_report(error) from error
    above = next(path for path in final.parents if path.exists())
    why = "" if above.is_dir() else f"{shown_path(above)} is not a directory"
    if not why and not os.access(above, os.W_OK):
        why = f"{shown_path(above)} may not be written to"
    inside = next((m for m in models if m.resolve() in final.parents), None)
    why = why if inside is None else f"it lies inside the model {shown_path(inside)}"
    if why:
        raise UsageError(
            f"the report {shown_path(directory)} cannot be written: {why}",
            "choose another directory for --report",
        )
    return final


class _ReportDirectory(OutputDirectory):
    """A directory of which only an older report may be replaced."""

    def _checked(self, final: Path) -> Path:
        return _checked(final)


def _checked(final: Path) -> Path:
    if final.is_symlink() or not final.is_dir():
        return check_output(final)
    try:
        names = {path.name for path in final.iterdir()}
    except OSError as error:
        raise write_error(final, error) from error
    strange = sorted(names - OUR_FILES)
    if not names or (not strange and FIGURES in names and final.resolve() != Path.cwd()):
        return final.parent.resolve() / final.name
    raise UsageError(
        f"{shown_path(final)} holds other files than a report: {_listed(strange)}"
        if strange
        else f"{shown_path(final)} cannot be replaced by a report",
        "choose another directory for --report",
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown_path(Path(name)) for name in names[:3]) + more


def _about_report(error: QtoolError) -> QtoolError:
    """Return an error that speaks of the flag with which a report was asked for."""
    hint = error.hint.replace("--output", "--report")
    return type(error)(error.message, hint, resumable=error.resumable)
