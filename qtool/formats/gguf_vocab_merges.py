"""The merges of a BPE tokenizer, as tokenizer.json spells them and as a GGUF file does."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from qtool.checkpoint.untrusted import GET_AGAIN, printable
from qtool.errors import DamagedError
from qtool.formats.gguf_vocab_files import token_text


@dataclass(frozen=True)
class Merges:
    """Pairs of tokens that become one, the earlier ones first."""

    pairs: tuple[tuple[str, str], ...]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The place of the first pair that makes a token."""
        found: dict[str, int] = {}
        for rank, (left, right) in enumerate(self.pairs):
            found.setdefault(left + right, rank)
        return found

    def joined(self) -> Iterable[str]:
        """Return the pairs as "left right", without those that no such line can hold."""
        return (f"{left} {right}" for left, right in self.pairs if " " not in left + right)

    def never_made(self, tokens: Iterable[str], *, outside: Collection[str]) -> list[str]:
        """Return the tokens of several characters, not `outside`, that no pair makes."""
        return [
            token
            for token in tokens
            if len(token) > 1 and token not in self.ranks and token not in outside
        ]

    def incomplete(self, tokens: Collection[str]) -> int:
        """Return how many tokens could also be made from a pair of tokens that is no merge."""
        known, pairs = set(tokens), set(self.pairs)
        return sum(
            any(
                token[:cut] in known
                and token[cut:] in known
                and (token[:cut], token[cut:]) not in pairs
                for cut in range(1, len(token))
            )
            for token in known
        )


def read_merges(value: object, where: str) -> Merges:
    """Read `model.merges` of a tokenizer.json: strings "left right", or pairs.

    Raises:
        DamagedError: neither.
    """
    if not isinstance(value, list):
        raise DamagedError(f"{where} has no list 'model.merges'", GET_AGAIN)
    return Merges(tuple(_pair(item, where) for item in value))


def _pair(item: object, where: str) -> tuple[str, str]:
    parts = item.split(" ") if isinstance(item, str) else item
    if not isinstance(parts, list) or len(parts) != 2:
        raise DamagedError(f"{where}: '{printable(item)}' is not a merge of two tokens", GET_AGAIN)
    return token_text(parts[0], where), token_text(parts[1], where)
