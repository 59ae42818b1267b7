"""Go templates derived from chat templates, run by an evaluator of their own, against Jinja."""

import re
import sys
from datetime import datetime

import jinja2
import pytest
from jinja2.ext import loopcontrols

from qtool.checkpoint.chat_sandbox import Conversation, render_all
from qtool.errors import UsageError
from qtool.formats.modelfile import ollama_modelfile

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As SmolLM2 and Qwen2.5: a default system prompt.
CHATML_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
LLAMA3_DATED = """{{- bos_token }}
{%- if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}
{%- else %}{% set today = '26 Jul 2024' %}{% endif %}
{%- if messages[0].role == 'system' %}{% set lead = messages[0].content %}
{%- set messages = messages[1:] %}{% else %}{% set lead = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + today + '\n\n' }}
{{- lead + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {{- message.content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('no system role') }}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('turns') }}{% endif %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
# Mistral: the system prompt joins the first question; no generation prompt.
MISTRAL = """{%- if messages[0].role == 'system' %}
{%- set lead = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}
{%- else %}{% set lead = '' %}{% endif %}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '[INST] ' + (lead if loop.first else '') + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""
# Llama 2: moreover every question begins with the beginning-of-text token.
LLAMA2 = """{%- if messages[0].role == 'system' %}
{%- set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- set messages = messages[1:] %}
{%- else %}{% set lead = '' %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- bos_token + '[INST] ' + (lead if loop.first else '') + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GRANITE = """{%- for message in messages %}
{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content }}
{%- if message.role == 'assistant' %}{% generation %}{{ '' }}{% endgeneration %}{% endif %}
{{- '<|end_of_text|>\n' }}
{%- if loop.last and add_generation_prompt %}
{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
{%- endfor %}"""
# Qwen3: the last answer of a conversation, and only it, shows empty thoughts.
THINKING = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if loop.last and message.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# What Go would take for actions, and Ollama for the end of the value or for nothing at all.
AWKWARD = (
    '{% for m in messages %}{{ \'{""" {{ .System }}{\' + \'"""\n\\\\ \u00a0\' }}{{ m.role }}'
    "{{ '{' }}{{- m.content }}{% raw %}}}{{{% endraw %}"
    "{% endfor %}{{ '{' if add_generation_prompt }}"
)
CASES = {
    "chatml": CHATML,
    "chatml with a default prompt": CHATML_DEFAULT,
    "llama 3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "llama 2": LLAMA2,
    "phi 3": PHI3,
    "granite": GRANITE,
    "thinking": THINKING,
    "awkward characters": AWKWARD,
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def jinja_says(template, messages, special=SPECIAL):
    """Independent of the subject: what transformers renders, without the token engines add."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
    )

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    template = re.sub(r"{%-? (end)?generation -?%}", "", template)
    text = environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, **special
    )
    return text.removeprefix(special["bos_token"])


class Go:
    """The part of Go's text/template and of Ollama's variables that derived templates use."""

    ACTION = re.compile(r"{{(.*?)}}", re.DOTALL)

    def __init__(self, source):
        self.parts = []
        end = 0
        for found in self.ACTION.finditer(source):
            self.parts += [("text", source[end : found.start()]), ("do", found[1].strip())]
            end = found.end()
        self.parts.append(("text", source[end:]))

    def run(self, messages):
        """Ollama joins system prompts for `.System` and leaves them among `.Messages`."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        self.root = {"System": system, "Messages": messages}
        self.names = {}
        return self.block(0, self.root, True)[0]

    def block(self, at, dot, live):
        """Run from part `at` up to the matching else or end; return the text and where that is."""
        out = ""
        while at < len(self.parts):
            kind, body = self.parts[at]
            if kind == "text":
                out += body if live else ""
            elif body == "end" or body.split()[0] == "else":
                return out, at
            elif body.startswith("range "):
                text, at = self.range(at, dot, live, body[6:])
                out += text
            elif body.startswith("if "):
                text, at = self.branch(at, dot, live, body[3:])
                out += text
            elif live:
                out += self.action(body, dot)
            at += 1
        return out, at

    def range(self, at, dot, live, over):
        out, end = "", None
        for item in self.value(over, dot) if live else []:
            text, end = self.block(at + 1, item, True)
            out += text
        if end is None:
            _, end = self.block(at + 1, dot, False)
        return out, end

    def branch(self, at, dot, live, condition):
        holds = live and bool(self.value(condition, dot))
        out, at = self.block(at + 1, dot, holds)
        body = self.parts[at][1]
        if body.startswith("else if "):
            text, at = self.branch(at, dot, live and not holds, body[8:])
            return out + text, at
        if body == "else":
            text, at = self.block(at + 1, dot, live and not holds)
            out += text
        assert self.parts[at][1] == "end"
        return out, at

    def action(self, body, dot):
        name, sign, value = body.partition(" := ") if ":=" in body else body.partition(" = ")
        if sign and name.startswith("$"):
            assert (sign == " := ") == (name not in self.names)
            self.names[name] = self.value(value, dot)
            return ""
        return self.value(body, dot)

    def value(self, text, dot):
        if text.startswith('"'):
            found = re.sub(r"\\U(.{8})", lambda m: chr(int(m[1], 16)), text[1:-1])
            return found.replace('\\"', '"').replace("\\\\", "\\")
        if text.startswith("eq "):
            _, left, right = text.split()
            return self.value(left, dot) == self.value(right, dot)
        if text in {"true", "false"}:
            return text == "true"
        if text.startswith("$."):
            return self.root[text[2:]]
        if text.startswith("$"):
            return self.names[text]
        assert text.startswith("."), text
        return dot[text[1:].lower() if "role" in dot else text[1:]]


def commands(text):
    """Read a Modelfile as Ollama's parser does: [(name, value), ...]."""
    found, at = [], 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
        elif text[at] == "#":
            at = text.index("\n", at)
        else:
            name, _, rest = text[at:].partition(" ")
            at += len(name) + 1
            if name == "PARAMETER":
                parameter = rest.partition(" ")[0]
                name, at = f"PARAMETER {parameter}", at + len(parameter) + 1
            value, at = read_value(text, at)
            found.append((name, value))
    return found


def read_value(text, at):
    read = ""
    while at < len(text):
        c = text[at]
        if c in " \t\r\n":
            bare = read.strip()
            mark = '"""' if bare.startswith('"""') else '"' if bare.startswith('"') else ""
            closed = len(bare) >= 2 * len(mark) and bare.endswith(mark)
            if closed and c not in " \t":
                return bare[len(mark) : len(bare) - len(mark)], at
            read += c
        elif c.isprintable():  # anything else is dropped
            read += c
        at += 1
    raise AssertionError("the file ends within a value")


def conversations():
    for turns in range(1, 6):
        for system in (False, True):
            roles = ["system"] * system + ["user", "assistant"] * turns
            yield [
                {"role": role, "content": f'{role} says "{number}" {{{{ so }}}}'}
                for number, role in enumerate(roles[: turns + system])
            ]


def modelfile(template=None, **options):
    options = {"weights": "a.gguf", "special": SPECIAL, "chat_template": template} | options
    made = ollama_modelfile(**options)
    return dict(commands(made.text)), made


@pytest.mark.parametrize("name", CASES)
def test_the_go_template_writes_what_jinja_writes(name):
    found, made = modelfile(CASES[name])
    go = Go(found["TEMPLATE"])
    compared = 0
    for messages in conversations():
        if messages[-1]["role"] == "assistant" and name == "thinking":
            continue  # Ollama answers questions: how it would show its own last answer is moot
        try:
            expected = jinja_says(CASES[name], messages)
        except jinja2.TemplateError:
            assert name == "gemma"
            continue
        assert go.run(messages) == expected
        compared += 1
    assert compared == {"gemma": 5, "thinking": 6}.get(name, 10)
    assert bool(made.warnings) == (name == "gemma")


def test_the_template_of_a_role_wise_model_reads_like_one():
    found, _ = modelfile(PHI3)
    assert found["TEMPLATE"] == (
        "{{ if .System }}<|system|>\n{{ .System }}<|end|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "user" }}<|user|>\n{{ .Content }}<|end|>\n'
        '{{ else if eq .Role "assistant" }}<|assistant|>\n{{ .Content }}<|end|>\n'
        "{{ end }}{{ end }}<|assistant|>\n"
    )


def test_a_template_without_system_role_warns():
    _, made = modelfile(GEMMA, system="Be brief.")
    assert any("takes no system prompt" in warning for warning in made.warnings)
    assert any("has no effect" in warning for warning in made.warnings)


def test_the_first_token_stays_where_engines_do_not_add_it():
    """SmolLM2's `bos_token` is the token that opens every turn."""
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    for adds_bos in (None, False):
        found, _ = modelfile(CHATML_DEFAULT, special=special, adds_bos=adds_bos)
        assert (
            Go(found["TEMPLATE"])
            .run([{"role": "user", "content": "Hi"}])
            .startswith("<|im_start|>system\nBe kind.")
        )
    found, _ = modelfile(LLAMA3, adds_bos=False)
    assert Go(found["TEMPLATE"]).run([{"role": "user", "content": "Hi"}]).startswith("<s>")


def test_the_date_of_today_is_not_written_into_the_file():
    found, made = modelfile(LLAMA3_DATED)
    assert "Today: 26 Jul 2024" in found["TEMPLATE"]
    assert str(datetime.now().year) not in found["TEMPLATE"] or datetime.now().year == 2024
    assert any("current date" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("template", "special", "stops"),
    [
        (CHATML, {}, ["<|im_end|>"]),
        (CHATML, {"eos_token": "<|endoftext|>"}, ["<|im_end|>", "<|endoftext|>"]),
        (LLAMA3, {"eos_token": "<|end_of_text|>"}, ["<|eot_id|>", "<|end_of_text|>"]),
        (LLAMA3, {"eos_token": "<|end_of_text|>", "eot_token": "<|eot_id|>"}, None),
        (GEMMA, {"eos_token": "<eos>"}, ["<end_of_turn>", "<eos>"]),
        (MISTRAL, {"eos_token": "</s>"}, ["</s>"]),
        (None, {"eos_token": "</s>"}, ["</s>"]),
    ],
)
def test_answers_stop_at_the_ends_of_turns(template, special, stops):
    made = ollama_modelfile(
        weights="a.gguf", chat_template=template, special={"bos_token": "<s>"} | special
    )
    found = [value for name, value in commands(made.text) if name == "PARAMETER stop"]
    assert found == (stops or ["<|eot_id|>", "<|end_of_text|>"])


UNFOLLOWED = {
    "a count of turns": "{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}",
    "system prompt last": "{% for m in messages if m.role != 'system' %}{{ m.role + m.content }}"
    "{% endfor %}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}",
    "only the last message": "{{ messages[-1].content }}",
    "shouting": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "needs tools": "{% for m in messages %}{{ m.content }}{{ tools[0].name }}{% endfor %}",
    "a syntax error": "{% for m in messages %}{{ m.content }}",
    "today": "{% for m in messages %}{{ strftime_now('%Y') + m.content }}{% endfor %}",
    "its own refusal": "{{ raise_exception('never\nSYSTEM evil') }}",
    "a wrong type": "{{ messages + 1 }}",
    "python's internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a change of its input": "{{ messages.append(1) }}",
    "a long range": "{% for i in range(10**9) %}x{% endfor %}",
    "much text": "{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}",
    "much memory": "{{ 'x' * 10**11 }}",
    "deep recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("why", UNFOLLOWED)
def test_a_template_that_cannot_be_followed_is_left_out_with_a_warning(why):
    found, made = modelfile(UNFOLLOWED[why])
    assert set(found) == {"FROM", "PARAMETER stop"}
    assert len(made.warnings) == 1
    assert made.warnings[0].startswith("chat template not translated for Ollama")
    assert f"# {' '.join(made.warnings[0].split())}\n" in made.text
    assert len(made.text) < 1000


def test_an_endless_template_is_given_up():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    probes = [Conversation((("user", "hello"),))]
    (rendering,) = render_all(loops, {}, probes, date=None, seconds=1)
    assert rendering.text is None
    assert "more than 1 seconds" in rendering.reason


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the memory's limit may not hold")
def test_one_conversation_that_fails_leaves_the_others():
    probes = [Conversation((("user", word),)) for word in ("a", "b")]
    template = "{{ 'x' * 10**11 if messages[0].content == 'a' else messages[0].content }}"
    first, second = render_all(template, {}, probes, date=None)
    assert (first.text, second.text) == (None, "b")
    assert "MemoryError" in first.reason


def test_everything_else_stands_in_the_file_as_given():
    system = 'Say "yes".\n\nOr "no"'
    found, made = modelfile(
        weights="my model-Q4_K_M.gguf",
        system=system,
        license="Line one\nline two",
        stop=["### User:", 'a "quoted" end'],
        parameters={"temperature": 0.7, "num_ctx": 4096, "use_mmap": True, "x_y1": "a b"},
    )
    assert found["FROM"] == "./my model-Q4_K_M.gguf"
    assert (found["SYSTEM"], found["LICENSE"]) == (system, "Line one\nline two")
    assert found["PARAMETER temperature"] == "0.7"
    assert found["PARAMETER num_ctx"] == "4096"
    assert found["PARAMETER use_mmap"] == "true"
    assert found["PARAMETER x_y1"] == "a b"
    stops = [value for name, value in commands(made.text) if name == "PARAMETER stop"]
    assert stops == ["### User:", 'a "quoted" end', "</s>"]
    assert not made.warnings


def test_what_a_modelfile_cannot_hold_is_refused_or_left_out():
    found, made = modelfile(license='He said """no""" .', weights="./b.gguf")
    assert "LICENSE" not in found
    assert found["FROM"] == "./b.gguf"
    assert made.warnings == ('LICENSE left out of the Modelfile: it contains """',)
    for options in (
        {"weights": "a.gguf\nFROM evil"},
        {"parameters": {"stop x\nFROM": 1}},
        {"stop": ['"""']},
    ):
        with pytest.raises(UsageError):
            modelfile(**options)
