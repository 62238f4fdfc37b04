"""What data holds is shown on a terminal and never obeyed, on every way to it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import hostile
import pytest
from rich.console import Console

from pipeline import cli, inspection, loader, terminal
from pipeline import manifest as manifests
from pipeline.errors import ArtifactError
from pipeline.progress import StageProgress
from pipeline.store import RunDirectory
from pipeline.terminal import printable

TEXTS = {
    "colour": "\x1b[31mred",
    "clear the screen": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "one-byte sequences": "\x9b31m\x9d0;owned\x9c",
    "device status": "\x1b[6n\x05",
    "back over the line": "done\rfail\x08\x08\x7f",
    "reversed": "\u202eexe.txt\u202c \u202a\u202b\u202d",
    "isolated": "\u2066x\u2067y\u2068z\u2069",
    "invisible": "a\u200bb\ufeffc\u00add\U000e0041",
    "lines of its own": "fine\nerror: all is lost\u2028or\u2029so\x85then\x0b\x0c",
}
OBEYED = {chr(code) for code in [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)]}
OBEYED |= set("\u200b\ufeff\u00ad\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\U000e0041")


def assert_harmless(printed: str, text: str) -> None:
    """Nothing in what was printed acts, and the text was printed at all, on one line."""
    assert OBEYED & set(printed) == set()
    shown = printable(text, None)
    assert shown[:20] in printed
    assert not any(line.startswith("error: all is lost") for line in printed.splitlines())


@pytest.fixture(params=list(TEXTS))
def text(request: pytest.FixtureRequest) -> str:
    return TEXTS[request.param]


@contextlib.contextmanager
def printed() -> Iterator[io.StringIO]:
    """All that reaches standard output and error."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield stream


def baton(*arguments: str | Path) -> str:
    """What a command prints."""
    with printed() as stream:
        cli.execute(cli.app, list(map(str, arguments)))
    return stream.getvalue()


def test_every_console_shows_text_and_keeps_its_lines() -> None:
    with printed() as stream:
        terminal.console().print("one\ntwo [red]\x1b[31m", "\u202e")
        terminal.console(stderr=True).print("three\x9b")
    assert stream.getvalue() == "one\ntwo [red]\\x1b[31m \\u202e\nthree\\x9b\n"


def test_progress_and_what_stages_say(text: str, tmp_path: Path) -> None:
    for console in (terminal.console(), Console(force_terminal=False, soft_wrap=True)):
        with printed() as stream, StageProgress("sft", tmp_path, console) as progress:
            progress.say(text)
            progress({"loss": text}, done=1, total=1)
        assert_harmless(stream.getvalue(), text)


def test_errors(text: str, config: Path, fake_stages: None) -> None:
    assert_harmless(baton("run", config, f"stages.sft.kind={json.dumps(text)}"), text)
    assert_harmless(baton("run", config, "--only", text), text)
    assert_harmless(baton("show", config.parent / text.replace("/", "-")), text.replace("/", "-"))


def test_warnings_and_traces(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(args: object) -> None:
        print(warnings.formatwarning(text, UserWarning, "file.py", 1))  # noqa: T201
        raise RuntimeError(text)

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with printed() as stream:
        assert cli.guarded(fails) == 1
    assert f"UserWarning: {printable(text, None)}" in stream.getvalue()
    assert f"RuntimeError: {printable(text.partition(chr(10))[0], None)}" in stream.getvalue()
    assert OBEYED & set(stream.getvalue()) == set()


def test_the_stages_of_somebody_else(text: str, config: Path, fake_stages: None) -> None:
    """Everything in a manifest that is printed is theirs: by `show`, `why`, `plan`, `diff`, `status` and `verify`."""
    baton("run", config)
    run = config.parent / "run"
    other = shutil.copytree(run, run.parent / "other")
    sft = run / "stages" / "sft"
    manifest = manifests.load(sft)
    card = manifest.data[0].model_copy(update={"source": text})
    settings = {**manifest.settings, text: text, "epochs": text}
    metrics = {**manifest.metrics, text: next(iter(manifest.metrics.values()))}
    changes = {"stage": text, "command": text, "warnings": [text], "data": [card], "settings": settings}
    hostile.write_manifest(sft, manifest.model_copy(update={**changes, "metrics": metrics}))
    assert_harmless(baton("show", sft), text)
    assert_harmless(baton("plan", config), text)
    assert_harmless(baton("run", config, "--dry-run"), text)
    assert_harmless(baton("diff", config, other), text)
    with (run / "history.jsonl").open("a") as stream:
        line = {"stage": "sft", "started": text, "reasons": [text], "outcome": text}
        stream.write(json.dumps(line) + "\n")
    assert_harmless(baton("why", run, "sft"), text)
    if "/" not in text:
        (sft / text).write_text("")
        assert_harmless(baton("verify", run), text)
        assert_harmless(baton("run", config, "--dry-run"), text)


def test_data_in_the_doctor(text: str, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": text, "chosen": 5, "rejected": text, text: 1}) + "\n")
    assert_harmless(baton("doctor", data), text)


def test_a_manifest_that_is_wrong_is_quoted_harmless(text: str, tmp_path: Path) -> None:
    for content in ({"schema_version": text}, {"schema_version": 1, text: 1}):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ArtifactError) as caught:
            manifests.load(tmp_path)
        assert OBEYED & set(str(caught.value)) == set()


def test_a_history_of_anything_else_is_passed_over(config: Path, fake_stages: None) -> None:
    baton("run", config)
    directory = RunDirectory.of(loader.load(config))
    before = inspection.history(directory, "sft")
    with directory.history.open("a") as stream:
        stream.write('5\n[]\n{"stage": "sft"}\n' + "[" * 100_000 + "\n")
    assert inspection.history(directory, "sft") == before
    assert before is not None
    assert before["outcome"] == "published"
