"""Score a person's own questions: which choice is likeliest, and whether the answer comes out.

Whether greedy decoding gives an accepted answer is found out without generating token by token: the
model reads prompt and answer at once and says in every place what it would have gone on with. As
far as it agrees, that is what it would have written; where it does not, the text it has written by
then either is still the beginning of an accepted answer, and is tried again from there, or the
question is lost. So a few runs through the model tell, one block's weights at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from qtool.errors import UsageError
from qtool.evaluation.continuations import Answer, Request, TaskRunner, Tokens
from qtool.evaluation.task_files import ChoiceItem, ExactItem, TaskFile
from qtool.evaluation.task_tokens import TaskTokenizer, shortened

ACC, ACC_NORM, EXACT = "acc", "acc_norm", "exact_match"
SPARE = 8  # tokens that a model may take beyond those that an answer needs
# Right or wrong, for each metric, question by question.
Samples = dict[str, list[float]]


@dataclass
class Shortened:
    """How many texts were too long for a model and lost their beginning."""

    texts: int = 0


def score_files(
    files: Sequence[TaskFile],
    runner: TaskRunner,
    tokenizer: TaskTokenizer,
    cut: Shortened,
    *,
    chat: bool = False,
) -> list[Samples]:
    """Answer the questions of all files together.

    Args:
        files: as read.
        runner: the model.
        tokenizer: of the model or of its original.
        cut: told how many prompts were too long.
        chat: whether prompts are laid out as a user's message by the chat template.

    Returns:
        For each file, 1 or 0 for each question by `acc` and `acc_norm`, or by `exact_match`.

    Raises:
        UsageError: a choice or answer alone is longer than what the model can read.
    """
    prompts = _Prompts(tokenizer, runner.longest, cut, chat)
    choices = [item for file in files for item in file.choices]
    requests = [prompts.request(item, choice) for item in choices for choice in item.choices]
    drafts = [_Draft(item, prompts) for file in files for item in file.exact]
    tries = _tries(drafts)
    answers = runner.score([*requests, *(request for _, request in tries)])
    found = iter(answers[: len(requests)])
    judged = {id(item): _judged(item, found) for item in choices}
    _take(tries, answers[len(requests) :])
    while tries := _tries(drafts):
        _take(tries, runner.score([request for _, request in tries]))
    exact = {id(draft.item): float(bool(draft.right)) for draft in drafts}
    results: list[Samples] = []
    for file in files:
        if file.exact:
            results.append({EXACT: [exact[id(item)] for item in file.exact]})
        else:
            pairs = [judged[id(item)] for item in file.choices]
            results.append({ACC: [p[0] for p in pairs], ACC_NORM: [p[1] for p in pairs]})
    return results


def _judged(item: ChoiceItem, answers: Iterator[Answer]) -> tuple[float, float]:
    """Return whether the right choice is the likeliest, and whether it is per character."""
    likelihoods = [next(answers).log_probability for _ in item.choices]
    per_character = [
        value / len(text) for value, text in zip(likelihoods, item.choices, strict=True)
    ]
    # Of two alike the first counts, whichever is right.
    return tuple(
        float(values.index(max(values)) == item.answer) for values in (likelihoods, per_character)
    )  # type: ignore[return-value]


@dataclass(frozen=True)
class _Prompts:
    """Makes requests of questions."""

    tokenizer: TaskTokenizer
    longest: int
    cut: Shortened
    chat: bool

    def request(self, item: ChoiceItem, choice: str) -> Request:
        """Return the request for one choice behind a question's prompt.

        Raises:
            UsageError: it alone is longer than what the model can read.
        """
        prompt = self._laid_out(item.prompt)
        delimited = self.chat or not prompt or prompt[-1].isspace() or choice[0].isspace()
        request = self.tokenizer.request(prompt, choice if delimited else f" {choice}")
        self._check(item, len(request.continuation))
        short = shortened(request, self.longest)
        self.cut.texts += short is not request
        return short

    def opened(self, item: ExactItem) -> tuple[Tokens, list[Tokens]]:
        """Return the ids of a question's prompt, and those with which its answers follow.

        Spaces at the end of a prompt do not count: the model is left to write them.

        Raises:
            UsageError: an answer is longer than what the model can read.
        """
        prompt = self._laid_out(item.prompt).rstrip(" \t")
        context = self.tokenizer.encode(prompt) or (self.tokenizer.prefix,)
        space = "" if not prompt or prompt[-1].isspace() else " "
        wholes = [self.tokenizer.encode(f"{prompt}{space}{answer}") for answer in item.answers]
        answers = [ids[len(context) :] for ids in wholes if ids[: len(context)] == context]
        room = SPARE + max(len(ids) - len(context) for ids in wholes)
        self._check(item, room)
        kept = context[max(0, len(context) + room - self.longest) :] or context[-1:]
        self.cut.texts += len(kept) < len(context)
        return kept, [ids for ids in answers if ids]

    def _laid_out(self, prompt: str) -> str:
        if not self.chat:
            return prompt
        return self.tokenizer.conversation([{"role": "user", "content": prompt}])

    def _check(self, item: ChoiceItem | ExactItem, tokens: int) -> None:
        if tokens > self.longest:
            raise UsageError(
                f"{item.place}: an answer takes {tokens} tokens, and the model reads "
                f"{self.longest}",
                "shorten it",
            )


@dataclass
class _Draft:
    """One question to be answered to the letter: what the model is known to have written so far."""

    item: ExactItem
    prompts: _Prompts
    right: bool | None = None
    written: Tokens = ()
    context: Tokens = ()
    answers: list[Tokens] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context, self.answers = self.prompts.opened(self.item)

    def tries(self) -> list[Tokens]:
        """Return what is worth reading behind the context: ways in which the text may go on."""
        ahead = [a for a in self.answers if a[: len(self.written)] == self.written]
        if ahead:
            return ahead
        # The same text in other tokens: what is missing of an answer follows in some of its own.
        item, tokenizer = self.item, self.prompts.tokenizer
        begun = item.folded(tokenizer.decode(self.written))
        rest = (a[len(begun) :] for a in item.answers if item.folded(a).startswith(begun))
        return [(*self.written, *tokenizer.pieces(text)) for text in rest] or [self.written]

    def take(self, tried: Tokens, greedy: Tokens) -> None:
        """Learn what the model would have written along one try, and decide if that is enough."""
        known = len(self.written)
        if self.right is not None or tried[:known] != self.written:
            return  # another try of the same question has led elsewhere
        agreed = known
        while agreed < len(tried) and greedy[agreed] == tried[agreed]:
            agreed += 1
        for count in range(known, agreed + 1):
            self.written = (*tried[:count], greedy[count])
            self._decide()
            if self.right is not None:
                return

    def _decide(self) -> None:
        """Decide by what has been written, if it can be decided."""
        item, tokenizer, written = self.item, self.prompts.tokenizer, self.written
        ended = written[-1] == tokenizer.eos
        text = tokenizer.decode(written[:-1] if ended else written)
        stops = [place for mark in item.stop if (place := text.find(mark)) >= 0]
        wanted = [item.folded(answer) for answer in item.answers]
        if ended or stops:
            self.right = item.folded(text[: min(stops, default=len(text))]) in wanted
            return
        begun = item.folded(text).rstrip("\ufffd")  # half a character is not decoded yet
        most = SPARE + max(len(answer.encode()) for answer in item.answers)
        if len(written) > most or not any(answer.startswith(begun) for answer in wanted):
            self.right = False


def _tries(drafts: Sequence[_Draft]) -> list[tuple[_Draft, Request]]:
    """Return what is to be read of every question that is still open.

    One token more is asked for than is read, whichever it may be: what the model puts in its place
    is what comes next.
    """
    return [
        (draft, Request(draft.context, (*tried, 0)))
        for draft in drafts
        if draft.right is None
        for tried in draft.tries()
    ]


def _take(tries: Sequence[tuple[_Draft, Request]], answers: Sequence[Answer]) -> None:
    """Tell every question what its tries came to."""
    for (draft, request), answer in zip(tries, answers, strict=True):
        draft.take(request.continuation[:-1], answer.greedy)
