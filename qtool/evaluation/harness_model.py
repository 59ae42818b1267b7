"""What lm_eval asks of a model, answered by qtool's own runners; nothing here imports lm_eval."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qtool.checkpoint.untrusted import printable
from qtool.errors import UnsupportedError, UsageError
from qtool.evaluation.continuations import Request, TaskRunner, Tokens
from qtool.evaluation.task_scoring import Shortened
from qtool.evaluation.task_tokens import TaskTokenizer, shortened

# Names under which tasks say how much may be generated; the first that is there counts.
MOST_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_MOST = 256
# Tokens at the end of a text in which a stop is looked for while it grows, beside the stop's own.
TAIL = 4


class HarnessModel:
    """A model with the three questions of lm_eval.

    Args:
        runner: the model.
        tokenizer: of the model or of its original.
        cut: told how many texts were too long for the model.
        warn: told what the user should know.
    """

    def __init__(
        self,
        runner: TaskRunner,
        tokenizer: TaskTokenizer,
        cut: Shortened,
        warn: Callable[[str, str], None],
    ) -> None:
        self._runner, self._tokenizer, self._cut, self._warn = runner, tokenizer, cut, warn

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return (log probability in nats, whether greedy decoding gives it) of continuations.

        Raises:
            UnsupportedError: a continuation is longer than what the model can read.
        """
        requests: dict[int, Request] = {}
        for index, (context, continuation) in enumerate(pairs):
            if not continuation:
                continue
            request = self._tokenizer.request(context, continuation)
            if len(request.continuation) > self._runner.longest:
                raise UnsupportedError(
                    f"a task has an answer of {len(request.continuation)} tokens, and the model "
                    f"reads {self._runner.longest}",
                    "leave that task out for this model",
                )
            short = shortened(request, self._runner.longest)
            self._cut.texts += short is not request
            requests[index] = short
        answers = self._runner.score([*requests.values()])
        found = [(0.0, True)] * len(pairs)  # an empty continuation is certain
        for (index, request), answer in zip(requests.items(), answers, strict=True):
            found[index] = answer.log_probability, answer.greedy == request.continuation
        return found

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log probability in nats of whole texts.

        Every token is predicted once; of a text longer than the model can read, each window is
        filled up with what comes before it.
        """
        requests, owners = [], []
        for owner, text in enumerate(texts):
            for request in rolling(
                self._tokenizer.pieces(text), self._tokenizer.prefix, self._runner.longest
            ):
                requests.append(request)
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, answer in zip(owners, self._runner.score(requests), strict=True):
            totals[owner] += answer.log_probability
        return totals

    def generate_until(self, pairs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Return what greedy decoding writes behind prompts, up to the first stop.

        Raises:
            UsageError: settings of generation that make no sense.
            CapacityError: the whole model does not fit in memory.
        """
        longest = self._runner.longest
        prompts: list[Tokens] = []
        most: list[int] = []
        stops: list[tuple[str, ...]] = []
        for text, settings in pairs:
            count = _most(settings)
            if settings.get("do_sample"):
                self._warn("sampling", "a task asks for sampled text, and got greedily decoded one")
            ids = self._tokenizer.encode(text) or (self._tokenizer.prefix,)
            count = max(1, min(count, longest - 1))
            self._cut.texts += len(ids) + count > longest
            prompts.append(ids[max(0, len(ids) + count - longest) :])
            most.append(count)
            stops.append(_stops(settings))
        eos = self._tokenizer.eos

        def ended(index: int, made: Tokens) -> bool:
            if made[-1] == eos:
                return True
            tail = made[-(TAIL + max(map(_bytes, stops[index]), default=0)) :]
            text = self._tokenizer.decode(tail)
            return any(stop in text for stop in stops[index])

        found = self._runner.generate(prompts, most, ended)
        texts = []
        for made, marks in zip(found, stops, strict=True):
            ids = made[:-1] if made and made[-1] == eos else made
            text = self._tokenizer.decode(ids)
            places = [place for mark in marks if (place := text.find(mark)) >= 0]
            texts.append(text[: min(places, default=len(text))])
        return texts

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the chat template writes it.

        Raises:
            UsageError: there is no template, or it refuses the conversation.
        """
        return self._tokenizer.conversation(messages, answer=add_generation_prompt)

    @property
    def template_name(self) -> str:
        """A name that differs where chat templates do."""
        return hashlib.sha256((self._tokenizer.chat_template or "").encode()).hexdigest()[:16]

    @property
    def template(self) -> str:
        """The chat template, empty if there is none."""
        return self._tokenizer.chat_template or ""


def rolling(ids: Tokens, prefix: int, longest: int) -> list[Request]:
    """Return requests that together predict every token of a text once.

    Args:
        ids: of the text.
        prefix: read before the first token.
        longest: tokens that the model can read.
    """
    text = (prefix, *ids)
    found = []
    for start in range(0, len(ids), longest):
        stop = min(start + longest, len(ids))
        # Tokens start to stop of `ids` are start + 1 to stop + 1 of `text`.
        begin = max(0, stop - longest)
        found.append(Request(text[begin : start + 1], text[start + 1 : stop + 1]))
    return found


def _most(settings: Mapping[str, Any]) -> int:
    value = next((settings[key] for key in MOST_KEYS if settings.get(key) is not None), None)
    if value is None:
        return DEFAULT_MOST
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(
            f"a task wants to generate {printable(value)} tokens", "correct its definition"
        )
    return value


def _stops(settings: Mapping[str, Any]) -> tuple[str, ...]:
    value = settings.get("until") or ()
    marks = (value,) if isinstance(value, str) else tuple(map(str, value))
    return tuple(mark for mark in marks if mark)


def _bytes(text: str) -> int:
    return len(text.encode())
