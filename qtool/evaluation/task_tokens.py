"""Texts of tasks as token ids: a prompt and what follows it are tokenized as one text.

Tokenized apart they would give ids that the model never sees in a row, where a token reaches over
the boundary; so the whole is tokenized, and what the prompt alone takes of it is the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qtool.errors import UsageError
from qtool.evaluation.continuations import Request, Tokens


class TaskTokenizer:
    """A tokenizer as tasks need it.

    Args:
        tokenizer: of transformers, or a `GgufTokenizer`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        started = tokenizer("a", add_special_tokens=True)["input_ids"]
        self._starts = self._bos is not None and started[:1] == [self._bos]

    def pieces(self, text: str) -> Tokens:
        """Return the ids of a part of a text."""
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode(self, text: str) -> Tokens:
        """Return the ids of a text, behind the token that starts texts if the model wants one."""
        ids = self.pieces(text)
        if self._starts and self._bos is not None and ids[:1] != (self._bos,):
            return (self._bos, *ids)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special ones."""
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    @property
    def prefix(self) -> int:
        """The token behind which a text starts that has nothing before it.

        Raises:
            UsageError: the tokenizer has none.
        """
        found = self.eos if self._bos is None else self._bos
        if found is None:
            raise UsageError(
                "a task has an empty prompt, and the tokenizer no token that starts a text",
                "give every question a prompt",
            )
        return found

    def request(self, prompt: str, continuation: str) -> Request:
        """Return the ids of a prompt and of what follows it; spaces between belong to the latter.

        Raises:
            UsageError: an empty prompt, and no token that starts a text.
        """
        bare = prompt.rstrip()
        continuation = prompt[len(bare) :] + continuation
        whole, context = self.encode(bare + continuation), self.encode(bare)
        if not context:
            return Request((self.prefix,), whole)
        count = len(context)
        if len(whole) <= count:  # the boundary lies inside the last token
            count = next(
                (i for i, (a, b) in enumerate(zip(whole, context, strict=False)) if a != b),
                len(whole) - 1,
            )
        if not count:
            return Request((self.prefix,), whole)
        return Request(whole[:count], whole[count:])

    @property
    def chat_template(self) -> str | None:
        """The template that lays conversations out, if there is one."""
        found = self._tokenizer.chat_template
        return found if isinstance(found, str) or found is None else str(found)

    def conversation(self, messages: Sequence[dict[str, str]], *, answer: bool = True) -> str:
        """Return a conversation as the chat template writes it, up to where the answer begins.

        Args:
            messages: each with `role` and `content`.
            answer: whether the model's turn is opened; else the last message is continued.

        Raises:
            UsageError: there is no template, or it refuses the messages.
        """
        from jinja2 import TemplateError

        if not self.chat_template:
            raise UsageError(
                "--apply-chat-template: the tokenizer has no chat template",
                "leave it out, or give the directory of the original as --ref",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=answer,
                continue_final_message=not answer,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise UsageError(
                f"--apply-chat-template: the template refuses a conversation: {error}",
                "leave it out for this model",
            ) from error
        return str(text)


def shortened(request: Request, longest: int) -> Request:
    """Return a request whose context lost what a model cannot read, from the beginning.

    Args:
        request: of any length.
        longest: tokens that a model can read, at least those of the continuation.
    """
    surplus = len(request.read) - longest
    if surplus <= 0:
        return request
    return Request(request.context[min(surplus, len(request.context) - 1) :], request.continuation)
