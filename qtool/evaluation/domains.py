"""What is lost by domain: prose, code, digits, and scripts other than Latin.

A text that is mostly English prose says little about the others, and those degrade differently.
Prose and code are the builtin set's evaluation text, which calibration never sees.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.calibration.builtin import SOURCE_OF, builtin_pieces
from qtool.evaluation.divergence import compared
from qtool.evaluation.domain_texts import OTHER_SCRIPTS, digit_text
from qtool.evaluation.perplexity import Estimate, perplexity
from qtool.evaluation.scores import AgainstReference, Scores

LONGEST_CALL = 60_000  # characters of a domain that are tokenized; more than a window needs
PROBE = 200  # characters that tell which module a piece is from


@dataclass(frozen=True)
class DomainWindows:
    """One window for each domain.

    Args:
        names: of the domains.
        ids: [domains, length] int64; a text that is too short is followed by filling.
        lengths: tokens of each that are text. What follows cannot change their scores.
    """

    names: tuple[str, ...]
    ids: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class DomainScores:
    """One domain's figures; `None` where there is no reference."""

    perplexity: Estimate
    reference_perplexity: Estimate | None = None
    divergence: Estimate | None = None
    top1: Estimate | None = None


def domain_texts() -> dict[str, str]:
    """Return name -> text of every domain."""
    pieces = builtin_pieces("evaluation", None)
    sources = [source for source in map(_source, SOURCE_OF) if source]
    code = [piece for piece in pieces if any(piece[:PROBE] in source for source in sources)]
    prose = [piece for piece in pieces if piece not in set(code)]
    return {
        "prose": "\n\n".join(prose),
        "code": "\n\n".join(code),
        "digits": digit_text(),
        "non-latin": "\n\n".join(OTHER_SCRIPTS),
    }


def _source(module: str) -> str:
    """Return the source of a module of the standard library, empty where there is none."""
    found = importlib.util.find_spec(module)
    read = getattr(found.loader if found else None, "get_source", None)
    return (read(module) if read else None) or ""


def domain_windows(tokenizer: Any, length: int) -> DomainWindows:
    """Tokenize every domain into one window of `length` tokens.

    Args:
        tokenizer: a transformers tokenizer, or one with its face.
        length: of the evaluation's windows.
    """
    begin = tokenizer.bos_token_id
    if begin is not None and tokenizer("a")["input_ids"][:1] != [begin]:
        begin = None
    names, rows, lengths = [], [], []
    for name, text in domain_texts().items():
        found = tokenizer(text[:LONGEST_CALL], add_special_tokens=False)["input_ids"]
        ids = ([begin] if begin is not None else []) + list(found)
        if len(ids) < 2:  # this Python carries no such text
            continue
        ids = ids[:length]
        names.append(name)
        lengths.append(len(ids))
        rows.append(ids + ids[:1] * (length - len(ids)))
    return DomainWindows(tuple(names), torch.tensor(rows, dtype=torch.int64), tuple(lengths))


def by_domain(scores: Sequence[Scores], windows: DomainWindows) -> dict[str, DomainScores]:
    """Return name -> figures from one window of scores for each domain."""
    found = {}
    for name, window, length in zip(windows.names, scores, windows.lengths, strict=True):
        # One window has no error of its own: its quarters stand in for several.
        parts = [_part(window, start, stop) for start, stop in _quarters(length)]
        comparison = compared(parts)
        found[name] = (
            DomainScores(perplexity([part.losses for part in parts]))
            if comparison is None
            else DomainScores(
                comparison.perplexity,
                comparison.reference_perplexity,
                comparison.divergence,
                comparison.top1,
            )
        )
    return found


def _quarters(length: int) -> list[tuple[int, int]]:
    """Split `length` tokens in four parts that have a loss each, or in as many as there can be."""
    count = max(1, min(4, (length - 1) // 2))
    ends = [(length - 1) * index // count for index in range(count + 1)]
    return list(itertools.pairwise(ends))


def _part(window: Scores, start: int, stop: int) -> Scores:
    """Return the scores of some positions of a window."""
    part, other = slice(start, stop), window.reference
    against = None
    if other is not None:
        against = AgainstReference(
            other.losses[part],
            other.right[part],
            other.divergences[part],
            other.same_top[part],
            torch.empty(0, dtype=torch.float64),
        )
    return Scores(window.losses[part], window.right[part], against)


def domain_json(domains: Mapping[str, DomainScores]) -> dict[str, Any]:
    """Return the breakdown in the terms of the JSON contract."""
    found = {}
    for name, scores in domains.items():
        row: dict[str, Any] = {"ppl": scores.perplexity.value, "tokens": scores.perplexity.tokens}
        if scores.divergence is not None and scores.reference_perplexity is not None:
            row["ppl_reference"] = scores.reference_perplexity.value
            row["kld"] = scores.divergence.value
            row["kld_se"] = scores.divergence.standard_error
        if scores.top1 is not None:
            row["top1"] = scores.top1.value
        found[name] = row
    return found
