"""A chat template rendered where it can do no harm: a child process with limits.

Chat templates come with checkpoints and are programs. Jinja's sandbox keeps them from Python's
internals, but not from looping for ever or asking for terabytes; the child's limits do. This file
is also the child's program, so that it imports nothing of qtool and only jinja2 beyond the
standard library.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE = 1 << 20  # characters; the longest known ones have some 20,000
MAX_OUTPUT = 1 << 16  # characters of one conversation, whose messages are a few words
MAX_MEMORY = 1 << 30  # bytes of the child
MAX_SECONDS = 20.0
LONGEST_REASON = 200  # characters of a template's own message that are shown

Message = tuple[str, str]  # role, content


@dataclass(frozen=True)
class Conversation:
    """What a template is asked to render."""

    messages: tuple[Message, ...]
    generation: bool = True  # end with what opens the model's turn


@dataclass(frozen=True)
class Rendering:
    """What became of it: a text, or the reason why there is none."""

    text: str | None
    reason: str = ""


def render_all(
    template: str,
    special: Mapping[str, str],
    conversations: Sequence[Conversation],
    *,
    date: str | None,
    seconds: float = MAX_SECONDS,
    longest: int = MAX_OUTPUT,
) -> list[Rendering]:
    """Render conversations as transformers would.

    Args:
        template: Jinja source, not trusted.
        special: `bos_token`, `eos_token`, ...
        conversations: each is rendered on its own; one that fails does not keep others from it.
        date: what `strftime_now` returns; None to leave that function undefined.
        seconds: for all together.
        longest: characters of one rendered conversation.
    """
    if len(template) > MAX_TEMPLATE:
        return _nothing(conversations, f"it has more than {MAX_TEMPLATE} characters")
    task = {
        "template": template,
        "special": dict(special),
        "date": date,
        "longest": longest,
        "conversations": [[c.messages, c.generation] for c in conversations],
    }
    try:
        child = subprocess.run(
            [sys.executable, "-P", str(Path(__file__))],
            input=json.dumps(task).encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
        found = json.loads(child.stdout)
    except subprocess.TimeoutExpired:
        return _nothing(conversations, f"rendering takes more than {seconds:g} seconds")
    except ValueError:  # ended by a limit, in the middle of an answer or before
        return _nothing(conversations, f"rendering failed (exit code {child.returncode})")
    return [Rendering(text, reason) for text, reason in found]


def _nothing(conversations: Sequence[Conversation], reason: str) -> list[Rendering]:
    return [Rendering(None, reason)] * len(conversations)


def _environment(date: str | None) -> ImmutableSandboxedEnvironment:
    """Return the environment in which transformers compiles chat templates."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the model's words for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    if date is not None:
        environment.globals["strftime_now"] = lambda _format: date
    return environment


def _bounded(pieces: Iterator[str], longest: int) -> str:
    """Join pieces of text as they come.

    Raises:
        OverflowError: they are more than a conversation can need.
    """
    text = ""
    for piece in pieces:
        text += piece
        if len(text) > longest:
            raise OverflowError(f"it writes more than {longest} characters")
    return text


def _limit(seconds: int) -> None:
    """Bound this process's memory and time where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    except (ImportError, OSError, ValueError):  # no such limits: the parent's clock remains
        return


def _answer(task: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    """Return (text, reason) for every conversation of a task."""
    from jinja2 import TemplateError

    # What templates raise besides their own errors when they meet a value they did not expect.
    failures: tuple[type[Exception], ...] = (TemplateError, ArithmeticError, AttributeError)
    failures += (LookupError, MemoryError, RecursionError, TypeError, ValueError)
    conversations = task["conversations"]
    try:
        template = _environment(task["date"]).from_string(task["template"])
    except failures as error:
        return [(None, _reason(error))] * len(conversations)
    found: list[tuple[str | None, str]] = []
    for messages, generation in conversations:
        values = {
            "messages": [{"role": role, "content": content} for role, content in messages],
            "add_generation_prompt": generation,
            "tools": None,
            "documents": None,
            **task["special"],
        }
        try:
            found.append((_bounded(template.generate(values), task["longest"]), ""))
        except failures as error:
            found.append((None, _reason(error)))
    return found


def _reason(error: BaseException) -> str:
    words = " ".join(str(error).split())[:LONGEST_REASON]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


if __name__ == "__main__":
    _limit(int(MAX_SECONDS))
    json.dump(_answer(json.load(sys.stdin)), sys.stdout)
