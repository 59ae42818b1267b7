"""Text that every Python installation carries: calibration data without a download.

Prose (about 60 % of the characters) is the language reference of `pydoc_data.topics` and the
docstrings of some standard-library modules, code (about 40 %) the source of others. The two lists
share no module and repeated paragraphs are dropped, so no sentence comes twice. One document in
eight is held out for evaluation: a model measured on the text it was calibrated on flatters.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import random
from collections.abc import Iterator
from typing import Literal

from qtool.errors import UsageError

Part = Literal["calibration", "evaluation"]

# Names split from text: as a list they would take seventy lines.
DOCSTRINGS_OF = """
    _pydecimal _pyio configparser difflib doctest email._header_value_parser email.message
    http.cookiejar http.server imaplib inspect ipaddress logging logging.handlers optparse pdb
    shutil smtplib socketserver ssl statistics subprocess threading tkinter traceback turtle typing
    unittest.case unittest.mock urllib.parse urllib.request xml.etree.ElementTree xml.sax.handler
""".split()  # noqa: SIM905
SOURCE_OF = """
    argparse ast asyncio.base_events asyncio.tasks bdb calendar collections contextlib copy csv
    dataclasses dis enum fractions functools gettext heapq http.client json.decoder mailbox
    multiprocessing.pool pickle platform plistlib pprint queue random selectors shlex socket
    tarfile tempfile textwrap tokenize uuid weakref zipfile
""".split()  # noqa: SIM905

LONGEST_SOURCE = 20_000  # characters of one module, so that no module is a tenth of the code
LONGEST_PIECE = 4_000  # characters: a window of 2048 tokens sees two or more subjects
SHORTEST_DOCSTRING = 120  # characters; shorter ones repeat the name of what they document
HELD_OUT = 8  # every eighth document is evaluation text


def builtin_pieces(part: Part, seed: int | None) -> list[str]:
    """Return the pieces of one part, shuffled by `seed`; None keeps their order.

    Raises:
        UsageError: this Python installation carries neither documentation nor sources.
    """
    pieces = [
        piece
        for index, document in enumerate(_documents())
        if (index % HELD_OUT == HELD_OUT - 1) == (part == "evaluation")
        for piece in _cut(document)
    ]
    if not pieces:
        raise UsageError(
            "this Python installation carries no text to calibrate on (pydoc_data and the "
            "standard library's sources are missing)",
            "give a file instead: -d calibration.txt",
        )
    if seed is not None:
        random.Random(seed).shuffle(pieces)  # noqa: S311 - a shuffle, not a secret
    return pieces


@functools.cache  # parsing takes a second, and the answer cannot change while Python runs
def _documents() -> tuple[str, ...]:
    """Return every topic and module as one text, in an order that never changes."""
    seen: set[str] = set()
    documents = []
    for text in _prose():
        paragraphs = [p.strip("\n") for p in text.split("\n\n")]
        # Topics quote each other at length: keep the first copy of each paragraph.
        fresh = [p for p in paragraphs if p.strip() and p not in seen]
        seen.update(fresh)
        if fresh:
            documents.append("\n\n".join(fresh))
    for module in SOURCE_OF:
        source = _source(module)
        if source:
            documents.append(source[:LONGEST_SOURCE])
    return tuple(documents)


def _prose() -> Iterator[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package the documentation apart
        topics = {}
    for name in sorted(topics):
        yield topics[name]
    for module in DOCSTRINGS_OF:
        yield "\n\n".join(_docstrings(_source(module)))


def _source(module: str) -> str:
    """Return a module's source without running it; empty if this Python does not carry it."""
    try:
        found = importlib.util.find_spec(module)
        loader = found.loader if found else None
        return getattr(loader, "get_source", lambda _: None)(module) or ""
    except (ImportError, OSError, ValueError, SyntaxError):
        # Missing, compiled only, or frozen: the rest of the list is enough.
        return ""


def _docstrings(source: str) -> list[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return [text for text in texts if len(text) >= SHORTEST_DOCSTRING]


def _cut(document: str) -> Iterator[str]:
    """Yield pieces of about LONGEST_PIECE characters that end at a blank line."""
    piece: list[str] = []
    size = 0
    for paragraph in document.split("\n\n"):
        if piece and size + len(paragraph) > LONGEST_PIECE:
            yield "\n\n".join(piece)
            piece, size = [], 0
        piece.append(paragraph)
        size += len(paragraph) + 2
    yield "\n\n".join(piece)
