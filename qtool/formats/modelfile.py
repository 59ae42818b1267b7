"""A Modelfile for Ollama, its Go template derived from the model's Jinja chat template.

The Jinja template is not translated but observed: it renders conversations whose messages are
unique markers, and what stands around the markers is the text of each role. The derived parts are
put together again and compared with what Jinja says about longer conversations; a template that
does not follow the pattern gets no TEMPLATE line and a warning, never a wrong one.

Source for Ollama's rules: template/template.go and parser/parser.go of github.com/ollama/ollama.
What is lost: tools, and filters on contents such as `trim`, for which Ollama has no functions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qtool.checkpoint.chat_sandbox import Conversation, Message, Rendering, render_all
from qtool.errors import UsageError

TURN_ENDS = ("eos_token", "eot_token")
TRIPLE = '"""'
# What Go's template syntax or Ollama's parser would read differently: opening braces (one before
# an action would become part of it) and triple quotes.
ESCAPED = re.compile(r'\{+|"{3,}')
TOKEN = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
NO_TEMPLATE = "chat template not translated for Ollama, which will guess one"


@dataclass(frozen=True)
class Modelfile:
    """The file's text, and what it could not say."""

    text: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Turns:
    """The texts around messages, without the beginning-of-text token, which engines add.

    Args:
        start: before the first user message where there is no system prompt.
        system_start: before the system prompt; None if the template takes none.
        system_end: between the system prompt and the first user message.
        user_start: before every further user message.
        user_end: after a user message.
        assistant_start: before an earlier answer.
        assistant_end: after an earlier answer.
        generation: after the last user message's `user_end`: opens the answer to come.
    """

    start: str
    system_start: str | None
    system_end: str
    user_start: str
    user_end: str
    assistant_start: str
    assistant_end: str
    generation: str

    @property
    def separable(self) -> bool:
        """Whether the first user message is like any other, so that a system prompt precedes it."""
        ends = self.system_end if self.system_start is not None else self.start
        return ends.endswith(self.user_start) and self.start.endswith(self.user_start)

    def render(self, messages: Sequence[Message]) -> str:
        """Return what the Go template makes of a conversation."""
        text = ""
        system = next((content for role, content in messages if role == "system"), "")
        opening = self.start
        if system and self.system_start is not None:
            opening = self.system_start + system + self.system_end
        for role, content in messages:
            if role == "user":
                text += opening + content + self.user_end
                opening = self.user_start
            elif role == "assistant":
                text += self.assistant_start + content + self.assistant_end
        return text + self.generation


class _NoPattern(Exception):  # noqa: N818
    """The template does not follow the pattern; the message says how."""


def ollama_modelfile(
    *,
    weights: str,
    chat_template: str | None,
    special: Mapping[str, str],
    stop: Sequence[str] = (),
    parameters: Mapping[str, str | int | float | bool] | None = None,
    system: str | None = None,
    license: str | None = None,  # noqa: A002 - named as in the file
    adds_bos: bool | None = None,
) -> Modelfile:
    """Return the Modelfile of a GGUF file.

    Args:
        weights: name of the GGUF file (its first part), which lies beside the Modelfile.
        chat_template: Jinja source, not trusted; None for a model without one.
        special: `bos_token`, `eos_token`, `eot_token`, ...
        stop: texts that end an answer; the ends of turns are added.
        parameters: Ollama's, such as `temperature` and `num_ctx`.
        system: default system prompt.
        license: in full.
        adds_bos: whether the engine puts `bos_token` before every text (`add_bos_token` of the GGUF
            file), so that the template must not; None to judge by the chat template.

    Raises:
        UsageError: a file name or parameter that a Modelfile cannot hold.
    """
    weights = weights.removeprefix("./")
    if not weights.isprintable() or '"' in weights or weights != weights.strip():
        raise UsageError(
            f"{weights!r}: not a file name that a Modelfile can hold", "rename the file"
        )
    warnings: list[str] = []
    lines = [f"FROM ./{weights}"]
    turns = None
    if chat_template:
        try:
            turns, warnings = derive_turns(chat_template, special, adds_bos)
        except _NoPattern as reason:
            warnings = [f"{NO_TEMPLATE}: {reason}"]
            lines.append(f"# {' '.join(warnings[0].split())}")
    if turns is not None:
        lines.append(f"TEMPLATE {TRIPLE}{go_template(turns)}{TRIPLE}")
        if system and turns.system_start is None:
            warnings.append("the system prompt has no effect: the chat template takes none")
    lines += _text("SYSTEM", system, warnings)
    ends = [special[key] for key in TURN_ENDS if special.get(key)]
    for text in dict.fromkeys([*stop, *_turn_end(turns), *ends]):
        lines.append(f"PARAMETER stop {_quoted(text)}")
    for name, value in (parameters or {}).items():
        lines.append(f"PARAMETER {_parameter_name(name)} {_value(value)}")
    lines += _text("LICENSE", license, warnings)
    return Modelfile("\n".join(lines) + "\n", tuple(warnings))


def derive_turns(
    template: str, special: Mapping[str, str], adds_bos: bool | None = None
) -> tuple[Turns, list[str]]:
    """Return the texts around messages, and warnings on what they cannot express.

    Raises:
        _NoPattern: they depend on more than the roles, or the template fails.
    """
    seed = hashlib.sha256(template.encode(errors="replace")).hexdigest()[:8]
    date = f"date{seed}"
    plain = _probe(seed, "u"), _probe(seed, "uau"), _probe(seed, "uauau")
    led = _probe(seed, "su"), _probe(seed, "suau"), _probe(seed, "suauau")
    open_ended = _probe(seed, "u", generation=False), _probe(seed, "ua", generation=False)
    probes = [*plain, *led, *open_ended]
    found = render_all(template, special, probes, date=date)
    warnings = []
    if any(date in (rendering.text or "") for rendering in found):
        found = render_all(template, special, probes, date=None)
        if all(rendering.text is None for rendering in found):
            raise _NoPattern("it writes the current date, which a Go template cannot know")
        warnings.append("the chat template names the current date; its default date stands instead")
    bos = special.get("bos_token") or ""
    if adds_bos is None:  # where the token opens every turn, it is the template's business
        adds_bos = "bos_token" in template or template.count(bos) == 1
    bos = bos if adds_bos else ""
    texts = [
        Rendering(rendering.text and rendering.text.removeprefix(bos), rendering.reason)
        for rendering in found
    ]
    by_probe = dict(zip(probes, texts, strict=True))
    turns = _assembled(by_probe, plain[1], led[0], open_ended)
    for probe in (*plain, *(led if turns.system_start is not None else ())):
        if turns.render(probe.messages) != by_probe[probe].text:
            raise _NoPattern("what it writes around a message depends on more than its role")
    if turns.system_start is None:
        warnings.append("the chat template takes no system prompt; Ollama will leave it out")
    return turns, warnings


def go_template(turns: Turns) -> str:
    """Return the Go template that writes these turns; Ollama's `.System` is the system prompt."""
    user_start = _go(turns.user_start)
    opening, first = "", user_start
    if turns.separable:
        length = len(turns.user_start)
        opening = _go(turns.start[: len(turns.start) - length])
        if turns.system_start is not None:
            end = _go(turns.system_end[: len(turns.system_end) - length])
            opening = _alternative(_go(turns.system_start), end, opening)
    else:
        opening = "{{ $first := true }}"
        begin = _go(turns.start)
        if turns.system_start is not None:
            begin = _alternative(_go(turns.system_start), _go(turns.system_end), begin, "$")
        first = f"{{{{ if $first }}}}{begin}{{{{ $first = false }}}}{{{{ else }}}}{user_start}"
        first += "{{ end }}"
    return (
        f'{opening}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{first}{{{{ .Content }}}}'
        f'{_go(turns.user_end)}{{{{ else if eq .Role "assistant" }}}}{_go(turns.assistant_start)}'
        f"{{{{ .Content }}}}{_go(turns.assistant_end)}{{{{ end }}}}{{{{ end }}}}"
        f"{_go(turns.generation)}"
    )


def _alternative(before: str, after: str, otherwise: str, scope: str = "") -> str:
    """Return Go syntax for a system prompt between two texts, or a third where there is none."""
    other = f"{{{{ else }}}}{otherwise}" if otherwise else ""
    value = f"{{{{ {scope}.System }}}}"
    return f"{{{{ if {scope}.System }}}}{before}{value}{after}{other}{{{{ end }}}}"


def _probe(seed: str, roles: str, *, generation: bool = True) -> Conversation:
    """Return a conversation of marked messages; `s`, `u` and `a` name their roles."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return Conversation(
        tuple((names[role], f"probe{seed}{place}") for place, role in enumerate(roles)),
        generation,
    )


def _assembled(
    found: Mapping[Conversation, Rendering],
    dialogue: Conversation,
    led: Conversation,
    open_ended: tuple[Conversation, Conversation],
) -> Turns:
    """Cut the texts of each role out of what a template writes around markers."""
    start, answer, question, end = _gaps(dialogue, found[dialogue])
    _, user_end = _gaps(open_ended[0], found[open_ended[0]])
    if not (answer.startswith(user_end) and end.startswith(user_end)):
        user_end = ""
    # A conversation that ends with an answer shows where that answer's text ends; templates that
    # treat a last answer differently show it by what first and further questions share.
    closed = found[open_ended[1]]
    last = _gaps(open_ended[1], closed)[-1] if closed.text is not None else None
    if last is not None and question.startswith(last):
        assistant_end = last
    else:
        assistant_end = question[: len(question) - _shared_end(start, question)]
    system_start, system_end = None, ""
    if found[led].text is not None and led.messages[0][1] in (found[led].text or ""):
        system_start, system_end, _ = _gaps(led, found[led])
    return Turns(
        start=start,
        system_start=system_start,
        system_end=system_end,
        user_start=question.removeprefix(assistant_end),
        user_end=user_end,
        assistant_start=answer.removeprefix(user_end),
        assistant_end=assistant_end,
        generation=end.removeprefix(user_end),
    )


def _gaps(probe: Conversation, rendering: Rendering) -> list[str]:
    """Return the texts before, between and after the markers of a rendered probe.

    Raises:
        _NoPattern: it could not be rendered, or a marker is missing, repeated or out of place.
    """
    if rendering.text is None:
        raise _NoPattern(rendering.reason)
    marks = [content for _, content in probe.messages]
    places = [rendering.text.find(mark) for mark in marks]
    once = all(rendering.text.count(mark) == 1 for mark in marks)
    if not once or places != sorted(places):
        raise _NoPattern("it does not write every message once and in order")
    ends = [0, *(place + len(mark) for place, mark in zip(places, marks, strict=True))]
    return [
        rendering.text[end:place]
        for end, place in zip(ends, [*places, len(rendering.text)], strict=True)
    ]


def _shared_end(left: str, right: str) -> int:
    """Return the length of the longest common suffix."""
    length = 0
    while length < min(len(left), len(right)) and left[-1 - length] == right[-1 - length]:
        length += 1
    return length


def _go(text: str) -> str:
    """Return literal text as Go's template syntax and Ollama's parser read it back."""
    places = [0, *(edge for found in ESCAPED.finditer(text) for edge in found.span()), len(text)]
    pieces = [text[start:stop] for start, stop in pairwise(places)]
    return "".join(
        f"{{{{ {_go_string(piece)} }}}}" if number % 2 else _visible(piece)
        for number, piece in enumerate(pieces)
    )


def _visible(text: str) -> str:
    """Write characters that Ollama's parser would drop as Go strings."""
    return "".join(
        c if c.isprintable() or c in "\n\t\r" else f"{{{{ {_go_string(c)} }}}}" for c in text
    )


def _go_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


def _turn_end(turns: Turns | None) -> list[str]:
    """Return the token that ends an answer, if what follows answers begins with one."""
    ends = turns.assistant_end.strip() if turns is not None else ""
    token = TOKEN.match(ends)
    return [token[0]] if token else []


def _text(command: str, text: str | None, warnings: list[str]) -> list[str]:
    if not text:
        return []
    if TRIPLE in text:
        warnings.append(f"{command} left out of the Modelfile: it contains {TRIPLE}")
        return []
    return [f"{command} {TRIPLE}{text}{TRIPLE}"]


def _quoted(text: str) -> str:
    if TRIPLE in text:
        raise UsageError(f"{text!r}: a Modelfile cannot hold {TRIPLE}", "leave out this stop text")
    return f"{TRIPLE}{text}{TRIPLE}" if '"' in text else f'"{text}"'


def _parameter_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise UsageError(f"{name!r}: not the name of an Ollama parameter", "such as temperature")
    return name


def _value(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value) if isinstance(value, str) else str(value)
