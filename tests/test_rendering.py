"""Chat templates are data: rendered as `transformers` does, and bounded whatever a stranger wrote into them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from data import rendering
from data.rendering import Rendered, render
from data.schema import Message
from data.template import TEMPLATE
from pipeline.errors import ArtifactError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ASKED = [Message("user", " Where is Ann?\n"), Message("assistant", "In <b>Rome</b> & 'there'.")]
CHATS = {
    "one turn": ASKED,
    "system": [Message("system", "Be brief. "), *ASKED],
    "two turns": [*ASKED, Message("user", "And Ben\u2028\u4e16?"), Message("assistant", "{{ messages }} {% raw %}")],
    "question": [*ASKED, Message("user", "Why?")],
    "out of order": [Message("assistant", "First."), *ASKED],
}
TEMPLATES = {
    "baton": TEMPLATE,
    "chatml": """\
{% for message in messages %}
    {%- if loop.first and message.role != 'system' -%}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' ~ '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    "llama 2": """\
{% if messages[0]['role'] == 'system' %}
  {% set turns = messages[1:] %}{% set system = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}
{% else %}
  {% set turns = messages %}{% set system = '' %}
{% endif %}
{% for turn in turns %}
  {% if (turn['role'] == 'user') != (loop.index0 is even) %}
    {{ raise_exception('roles must alternate user/assistant/user/assistant') }}
  {% endif %}
  {% if turn['role'] == 'user' %}
{{ bos_token }}[INST] {{ (system if loop.first else '') + turn['content'].strip() }} [/INST]
  {%- else %} {{ turn['content'] | trim }} {{ eos_token }}{% endif %}
{% endfor %}
""",
    "llama 3": """\
{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "mistral": """\
{%- set ns = namespace(index=0, system=none) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.system = message.content %}{% continue %}{% endif %}
    {%- if message.role == 'user' and ns.index % 2 == 1 %}{{ raise_exception('Roles alternate.') }}{% endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {%- if loop.last and ns.system %}{{- '[INST]' + ns.system + '\\n\\n' + message.content + '[/INST]' }}
        {%- else %}{{- '[INST]' + message['content'] + '[/INST]' }}{%- endif %}
    {%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "gemma": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
""",
    "zephyr": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "qwen 3": """\
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    "phi": """\
{% for message in messages %}{% if message['role'] in ['system', 'user'] and message['content'] %}\
{{'<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>' + '\\n'}}\
{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "json": """\
{{ messages | tojson }}
{{ messages | tojson(indent=2) }}{{ dict(a=1, b='\u00e9') | tojson(ensure_ascii=true, sort_keys=true) }}
{{ {'b': '<>', 'a': [1, none, true]} | tojson(separators=(',', ':')) }}
""",
    "macros": """\
{%- macro turn(message, end='<end>') -%}
    <{{ message.role | upper }}>{{ caller() if caller else '' }}
    {{ message.content.replace('\\n', ' ') | default('-') }}{{ end }}
{%- endmacro -%}
{% for role, group in messages | groupby('role') %}{% call turn(group[0]) %}{{ role }}: {% endcall %}{% endfor %}
{% set block %}
{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ m.content | length }},{% endfor %}
{% endset %}
{{ block | trim }} {{ range(3) | join('-') }} {{ cycler('a', 'b').next() }} {{ dict.fromkeys(['x'], 0) }}
""",
    "variables": """\
{{ tools is none }} {{ documents is none }} {{ unk_token }} {{ pad_token is defined }} {{ strftime_now is defined }}
  {{ add_generation_prompt }} {{ namespace(**{'a': 1}).a }} {# a comment #}
""",
    "generation": """\
{% for message in messages %}
    {% if message.role == 'assistant' %}
    {% generation %}
{{ message.content }}</s>
    {% endgeneration %}
    {% else %}
{{ message.content }}
    {% endif %}
{% endfor %}""",
    "syntax": "a\n{% for %}",
    "raises": "{{ raise_exception('never ' ~ messages[0].role) }}",
    "undefined": "{{ nothing.at.all }}",
    "private": "{% set ns = namespace() %}{% set ns._hidden = 1 %}",
    "changes": "{{ messages.append(1) }}",
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.add_special_tokens(list(SPECIAL.values()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[rendering._Sandbox]:
    """A process of the test's own."""
    sandbox = rendering._Sandbox()
    monkeypatch.setattr(rendering, "_sandbox", sandbox)
    yield sandbox
    sandbox.end()


def by_transformers(tokenizer: PreTrainedTokenizerFast, template: str, chat: list[Message], prompt: bool) -> str | None:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                [vars(message) for message in chat],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=False,
            )
        )
    except (TemplateError, TypeError, ValueError, LookupError):
        return None


def by_us(template: str, chat: list[Message], prompt: bool) -> str | None:
    try:
        return render(template, chat, SPECIAL, prompt=prompt).text
    except ArtifactError:
        return None


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_text_is_that_of_transformers(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in (False, True):
        for chat in CHATS.values():
            expected = by_transformers(tokenizer, TEMPLATES[name], chat, prompt)
            assert by_us(TEMPLATES[name], chat, prompt) == expected


def test_most_templates_of_the_comparison_write_something() -> None:
    failing = [name for name, text in TEMPLATES.items() if by_us(text, ASKED, False) is None]
    assert failing == ["syntax", "raises", "undefined", "private", "changes"]


def test_spans_are_the_generation_blocks() -> None:
    text = "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    rendered = render(text, CHATS["two turns"], SPECIAL)
    assert rendered.spans is not None
    assert [rendered.text[start:end] for start, end in rendered.spans] == [m.content for m in CHATS["two turns"]]
    assert render("{% if false %}{% generation %}{% endgeneration %}{% endif %}", ASKED, SPECIAL) == Rendered("", ())
    assert render("{# {% generation %} #}", ASKED, SPECIAL) == Rendered("", None)


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('touch CANARY') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
    "format method": "{{ (['{0.__class__}'] | map('format', messages)) | list }}{{ '{0.__class__}' | attr('format') }}",
    "attr": "{{ messages | attr('__class__') | attr('__base__') }}",
    "import": "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "include": "{% include '/etc/passwd' %}",
    "self": "{{ self._TemplateReference__context.environment.loader }}",
    "frames": "{{ (messages | map('upper')).gi_frame.f_back.f_globals }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns.__init__.__globals__ }}",
    "dict": "{{ dict.__call__.__globals__ }}{{ dict.mro() }}",
    "undefined": "{{ nothing.__class__.__init__.__globals__ }}",
    "code": "{{ raise_exception.__code__.co_consts }}",
    "change": "{{ messages.clear() }}",
}


@pytest.mark.parametrize("name", list(ESCAPES))
def test_no_template_reaches_what_lies_outside_it(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    try:
        text = render(ESCAPES[name].replace("CANARY", str(canary)), ASKED, SPECIAL).text
    except ArtifactError as error:
        text = error.what
    for word in ("<class", "<module", "__builtins__", "<code", "<frame", "root:", "posix"):
        assert word not in text
    assert not canary.exists()
    assert render("{{ messages | length }}", ASKED, SPECIAL).text == "2"


BOMBS = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 0.5 s"),
    "power": ("{{ (7 ** 9999999) % 10 }}{{ (7 ** 99999999) % 10 }}", "more than 0.5 s"),
    "memory": ("{{ 'x' * 10 ** 9 }}", "512 MB of memory"),
    "doubling": (
        "{% set n = namespace(s='x' * 99) %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "512 MB of memory",
    ),
    "output": ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "more than 1 MB"),
    "range": ("{{ range(10 ** 9) | list }}", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "nesting": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "recursion"),
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_bomb_is_bounded_and_the_next_template_renders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, words = BOMBS[name]
    if words == "more than 0.5 s":  # what never ends need not be waited for that long
        monkeypatch.setattr(rendering, "SECONDS", 0.5)
    with pytest.raises(ArtifactError) as caught:
        render(template, ASKED, SPECIAL)
    assert words in caught.value.what
    assert caught.value.hint
    assert render("{{ messages[1].role }}", ASKED, SPECIAL).text == "assistant"


@pytest.mark.parametrize("ask", ["strftime_now('%d %b %Y')", "[1, 2] | random", "lipsum()"])
def test_what_changes_from_call_to_call_is_refused_only_when_asked_for(ask: str) -> None:
    with pytest.raises(ArtifactError, match="depends on ") as caught:
        render("{{ " + ask + " }}", ASKED, SPECIAL)
    assert "`chat_template` of the sft stage" in caught.value.hint
    assert render("{% if tools %}{{ " + ask + " }}{% endif %}-", ASKED, SPECIAL).text == "-"


@pytest.mark.parametrize(
    "value",
    [
        "raise_exception",
        "range",
        "range(3)",
        "cycler('a')",
        "dict",
        "namespace(a=1)",
        "messages[0].keys",
        "messages[0].items()",
        "messages | map('upper')",
        "'a'.upper",
        "['a', [range]]",
        "{'a': {'b': range}}",
        "range | string",
        "'' ~ range",
        "'%s' % range",
        "'{}'.format(range)",
        "[range] | join",
        "range | upper",
        "range | e",
    ],
)
def test_what_is_written_otherwise_in_another_process_is_refused(value: str) -> None:
    with pytest.raises(ArtifactError, match="depends on where it lies in memory") as caught:
        render("{{ " + value + " }}", ASKED, SPECIAL)
    assert caught.value.hint
    assert render("{% set a = " + value + " %}-", ASKED, SPECIAL).text == "-"


def test_texts_numbers_and_what_consists_of_them_are_written() -> None:
    values = ["'a'", "1", "1.5", "true", "none", "nothing", "[1, 'a', none]", "(1, ('a',))", "{'a': [{}]}", "'<' | e"]
    written = render("".join("{{ " + value + " }};" for value in values), ASKED, SPECIAL).text
    assert written == "a;1;1.5;True;None;;[1, 'a', None];(1, ('a',));{'a': [{}]};&lt;;"


def test_a_message_of_a_template_is_printed_harmless_and_short() -> None:
    with pytest.raises(ArtifactError) as caught:
        render("{{ raise_exception('\x1b[2J\u202e' ~ 'x' * 9999) }}", ASKED, SPECIAL)
    assert r"\x1b[2J\u202e" in caught.value.what
    assert len(caught.value.what) < 160


def test_one_process_serves_all_threads(fresh: rendering._Sandbox) -> None:
    found: list[tuple[int, str]] = []

    def ask(number: int) -> None:
        for _ in range(20):
            found.append((number, render("{{ messages[0].content }}", [Message("user", str(number))], {}).text))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(text == str(number) for number, text in found)


def test_an_interrupted_request_does_not_answer_the_next(
    fresh: rendering._Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = rendering._write

    def interrupted(process: subprocess.Popen[bytes], line: bytes) -> None:
        original(process, line)
        raise KeyboardInterrupt

    monkeypatch.setattr(rendering, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render("{{ 'first' }}", ASKED, SPECIAL)
    monkeypatch.setattr(rendering, "_write", original)
    assert render("{{ 'second' }}", ASKED, SPECIAL).text == "second"


def test_a_process_that_dies_while_it_is_asked_is_reported_and_replaced(
    fresh: rendering._Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = rendering._write

    def fatal(process: subprocess.Popen[bytes], line: bytes) -> None:
        process.kill()
        process.wait()
        original(process, line)

    assert render("{{ 1 }}", ASKED, SPECIAL).text == "1"
    monkeypatch.setattr(rendering, "_write", fatal)
    with pytest.raises(ArtifactError, match="ended the process"):
        render("{{ 2 }}", ASKED, SPECIAL)
    monkeypatch.setattr(rendering, "_write", original)
    assert render("{{ 3 }}", ASKED, SPECIAL).text == "3"


def test_a_process_that_somebody_ended_between_requests_is_replaced_without_a_word(fresh: rendering._Sandbox) -> None:
    assert render("{{ 1 }}", ASKED, SPECIAL).text == "1"
    first = fresh._process
    assert first is not None
    first.terminate()
    first.wait()
    assert render("{{ 2 }}", ASKED, SPECIAL).text == "2"
    assert fresh._process is not first


def test_a_process_that_does_not_start_is_reported(fresh: rendering._Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ArtifactError, match="does not start") as caught:
        render("{{ 1 }}", ASKED, SPECIAL)
    assert "jinja2" in caught.value.hint


START = """
import json, os, signal, sys
from data import rendering
from data.schema import Message

def ask(text):
    return rendering.render("{{ messages[0].content }}", [Message("user", text)], {}).text

assert ask("Hi") == "Hi"
own = rendering._sandbox._process
print(own.pid, flush=True)
"""
ENDINGS = {
    "by itself": "",
    "exception": "raise SystemExit(0)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "killed while it renders": """
endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
rendering._write(own, json.dumps({"template": endless, "variables": {}, "seconds": 0.1}).encode() + b"\\n")
os.kill(os.getpid(), signal.SIGKILL)
""",
    "after a fork": """
child = os.fork()
if child == 0:
    same = ask("there") == "there"
    other = rendering._sandbox._process.pid != own.pid
    rendering._sandbox.end()
    os._exit(0 if same and other else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert ask("again") == "again"
assert rendering._sandbox._process is own
""",
    "light": """assert not {"torch", "transformers", "datasets", "jinja2"} & set(sys.modules)""",
}


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_the_process_ends_with_the_one_that_started_it(ending: str) -> None:
    command = [sys.executable, "-W", "error", "-c", START + ENDINGS[ending]]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stderr, done.returncode) == ("", -signal.SIGKILL if "killed" in ending else 0)
    try:
        process = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(process, select.POLLIN)  # which is its end
    assert poll.poll(30_000)
    os.close(process)


def test_the_process_is_given_no_secrets(monkeypatch: pytest.MonkeyPatch, fresh: rendering._Sandbox) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    render("{{ 1 }}", ASKED, SPECIAL)
    assert fresh._process is not None
    environment = Path(f"/proc/{fresh._process.pid}/environ").read_bytes()
    assert b"canary" not in environment
    assert b"PYTHONPATH=" in environment
