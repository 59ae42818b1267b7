"""Open a statistics file far enough to know that it is one; nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

from qtool.calibration.legacy_imatrix import LONGEST_NAME, LegacyMatrix, looks_legacy, read_legacy
from qtool.checkpoint.gguf_header import MAGIC, GgufContents, read_gguf
from qtool.checkpoint.untrusted import printable, shown_path
from qtool.errors import DamagedError, UsageError

SUM_SQUARES, SUM_ABSOLUTE, COUNTS = ".in_sum2", ".in_abs", ".counts"
HINT = "make one with: qtool calibrate MODEL -o stats.gguf"


def open_statistics(path: Path) -> GgufContents | LegacyMatrix:
    """Return the headers of a statistics GGUF, or the whole of an older file.

    Raises:
        UsageError: no such file, or not statistics.
        DamagedError: truncated or malformed.
    """
    try:
        if not path.is_file():
            reason = "it is not a file" if path.exists() else "there is none"
            raise UsageError(f"cannot read statistics {shown_path(path)}: {reason}", HINT)
        with path.open("rb") as file:
            beginning = file.read(8 + LONGEST_NAME)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "not a valid path"
        raise UsageError(f"cannot read statistics {shown_path(path)}: {why}", HINT) from error
    if beginning.startswith(MAGIC):
        contents = read_gguf(path)
        _check_sums(contents)
        return contents
    if looks_legacy(beginning):
        return read_legacy(path)
    raise UsageError(f"{shown_path(path)} is not a statistics file", HINT)


def _check_sums(contents: GgufContents) -> None:
    """Check that every sum of squares has counts, and that all are plain numbers of one size."""
    where = shown_path(contents.path)
    refs = {ref.name: ref for ref in contents.tensors}
    names = [name.removesuffix(SUM_SQUARES) for name in refs if name.endswith(SUM_SQUARES)]
    if not names:
        raise UsageError(f"{where} holds no calibration statistics", HINT)
    for name in names:
        squares, counts = refs[name + SUM_SQUARES], refs.get(name + COUNTS)
        if counts is None:
            raise DamagedError(
                f"{where}: '{printable(name)}' has no token counts", "run qtool calibrate again"
            )
        absolute = refs.get(name + SUM_ABSOLUTE, squares)
        for ref in (squares, counts, absolute):
            if ref.dtype != "F32":
                raise DamagedError(
                    f"{where}: '{printable(ref.name)}' is {ref.dtype}, not F32",
                    "run qtool calibrate again",
                )
        if absolute.n_elements != squares.n_elements:
            raise DamagedError(
                f"{where}: '{printable(name)}' has {squares.n_elements} sums of squares but "
                f"{absolute.n_elements} of |x|",
                "run qtool calibrate again",
            )
        if squares.n_elements % counts.n_elements:
            raise DamagedError(
                f"{where}: '{printable(name)}' has {squares.n_elements} sums of squares for "
                f"{counts.n_elements} token counts",
                "run qtool calibrate again",
            )
