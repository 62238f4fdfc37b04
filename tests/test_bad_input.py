"""What users get wrong and machines do wrong, through the command line: what, where, how to fix it, the exit code."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import tiny
from conftest import REPOSITORY
from forks import Process

from pipeline import cli

ON_A_SMALL_DISK = """\
import sys
from pathlib import Path
from pipeline import cli, store

begin = store.begin

def begin_and_fill(run, name):
    directory = begin(run, name)
    with (run.root / "ballast").open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            pass
    return directory

store.RESERVE = 0
store.begin = begin_and_fill
sys.exit(cli.execute(cli.app, sys.argv[1:]))
"""


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


def edit(old: str, new: str) -> Callable[[Path], None]:
    """A change to the configuration."""

    def change(config: Path) -> None:
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """Another content of a data file."""

    def change(config: Path) -> None:
        (config.parent / name).write_bytes(content)

    return change


def rename(old: str, new: str) -> Callable[[Path], None]:
    """Another name of a data file."""

    def change(config: Path) -> None:
        (config.parent / old).rename(config.parent / new)

    return change


PAIR = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (edit("beta: 0.1", "betta: 0.1"), 2, ["config.yaml:19: stages.dpo.betta: unknown setting", "mean `beta`?"]),
        (edit("beta: 0.1", "beta: strong"), 2, ["config.yaml:19: stages.dpo.beta: ", "valid number", "'strong'"]),
        (edit("beta: 0.1", "beta: -1"), 2, ["config.yaml:19: stages.dpo.beta: ", "greater than 0", "-1"]),
        (edit("beta: 0.1", "lora: {rank: 1.5}"), 2, ["config.yaml:19: stages.dpo.lora.rank: ", "integer", "1.5"]),
        (edit("kind: reward", "kind: rewards"), 2, ["config.yaml:14: ", "unknown kind `rewards`", "mean `reward`?"]),
        (edit("policy: base", "policy: tok"), 2, ["config.yaml:12: ", "`tok` makes a tokenizer", "needs a model"]),
        (edit("policy: base", "policy: bsae"), 2, ["config.yaml:12: ", "no stage and no path `bsae`", "mean `base`?"]),
        (edit("data: chats", "data: chat"), 2, ["config.yaml:13: ", "no data source `chat`", "mean `chats`?"]),
        (edit("seed: 1", "seed: 1\nseed: 2"), 2, ["config.yaml:3: duplicate key `seed`"]),
        (rename("pairs.jsonl", "other.jsonl"), 3, ["pairs.jsonl: ", "fix: "]),
        (write("pairs.jsonl", b""), 3, ["pairs.jsonl: ", "no "]),
        (write("pairs.jsonl", PAIR * 3 + b'{"prompt": "a", "chosen": "b"}\n'), 3, ["pairs.jsonl:4", "rejected"]),
        (write("pairs.jsonl", PAIR + b"{'prompt': 'a'}\n"), 3, ["pairs.jsonl:2", "JSON"]),
        (write("chats.jsonl", PAIR.replace(b"a", b"\xff")), 3, ["chats.jsonl:1", "UTF-8"]),
        (write("pairs.jsonl", b'{"text": "Words."}\n' * 8), 3, ["pairs.jsonl", "text", "preference"]),
        (write("pairs.jsonl", gzip.compress(PAIR)), 3, ["pairs.jsonl"]),
    ],
)
def test_a_mistake_is_placed_and_explained_before_anything_runs(
    config: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], code: int, said: list[str]
) -> None:
    change(config)
    assert baton("run", config) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert [part for part in said if part not in message] == []
    assert not (config.parent / "run" / "stages").exists()


def test_a_foreign_model_that_cannot_be_used_says_what_to_do(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = config.parent / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    (foreign / "pytorch_model.bin").write_bytes(b"pickle")
    assert baton("run", config, f"stages.sft.policy={foreign}", "--only", "sft") == 5
    said = capsys.readouterr().err
    assert f"{foreign}: only pickled weights (pytorch_model.bin): safetensors needed" in said
    assert "fix: save it with" in said


def test_too_little_space_is_refused_before_a_stage_starts(
    config: Path, fake_stages: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert baton("run", config) == 6
    said = capsys.readouterr().err
    assert f"{config.parent}/run: 104,857,600 bytes needed, 1,000 free" in said
    assert "fix: free some space" in said
    assert not (config.parent / "run" / "stages").exists()


def _mount_is_permitted() -> bool:
    probe = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.chain
@pytest.mark.skipif(not _mount_is_permitted(), reason="no small file system can be mounted here")
def test_a_disk_that_fills_up_while_a_stage_writes_ends_6_and_publishes_nothing(tmp_path: Path) -> None:
    config = tiny.write_chain(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "small.py").write_text(ON_A_SMALL_DISK)
    command = (
        'mount -t tmpfs -o size=256k none "$1/run" && '
        '{ "$2" "$1/small.py" run "$1/chain.yaml" --until tokenizer; code=$?; '
        'find "$1/run/stages" -mindepth 1; exit $code; }'
    )
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", command, "sh", str(tmp_path), sys.executable],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 6, done.stderr
    assert "no space left: " in done.stderr
    assert "fix: free some space and run the same command again: finished stages are kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert str(tmp_path) not in done.stdout
    assert config.exists()


@pytest.mark.chain
@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["stages.base.architecture.hiden_size=32"], 2, ["`hiden_size` is not known", "mean `hidden_size`?"]),
        (["stages.base.architecture.model_type=lama"], 2, ["`lama` is not known", "mean `llama`?"]),
        (["stages.base.architecture={model_typ: llama}"], 2, ["`model_type` is missing", "fix: "]),
        (["stages.base.architecture.hidden_size=abc"], 2, ["transformers cannot build it", "hidden_size"]),
        (["stages.base.architecture.num_attention_heads=5"], 2, ["architecture: transformers cannot build it"]),
        (
            ["stages.base.architecture.vocab_size=500"],
            2,
            ["`vocab_size` comes from the tokenizer", "fix: leave it out"],
        ),
        (["stages.base.max_length=600"], 2, ["blocks of 600 tokens do not fit 512 positions", "fix: lower"]),
        (["stages.base.max_length=500", "data.corpus.rows=2"], 3, ["less than 500 tokens", "world:corpus", "fix: "]),
        (["stages.base.optimizer.learning_rate=1e30"], 4, ["step ", "fix: lower the learning rate"]),
    ],
)
def test_what_only_a_stage_can_see_ends_it_and_keeps_what_was_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], code: int, said: list[str]
) -> None:
    config = tiny.write_chain(tmp_path)
    assert baton("run", config, *overrides, "--until", "base") == code
    message = capsys.readouterr().err
    assert [part for part in said if part not in message] == []
    assert [path.name for path in (tmp_path / "run" / "stages").iterdir()] == ["tokenizer"]
    assert list((tmp_path / "run" / ".failed" / "base").glob("*.safetensors")) == []
    assert baton("verify", tmp_path / "run") == 0


@pytest.mark.chain
def test_a_device_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert baton("run", tiny.write_chain(tmp_path), "device=cuda", "--until", "base") == 2
    said = capsys.readouterr().err
    assert "device: device `cuda` is not available" in said
    assert "fix: use device=auto or device=cpu" in said


@pytest.mark.slow
@pytest.mark.chain
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_training_stops_it_and_keeps_what_was_published(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    config = tiny.write_chain(tmp_path)
    long = ["stages.base.steps=10", "stages.base.examples_per_step=1000", "--until", "base"]
    with Process(forks.COMMAND, "run", config, *long, cwd=REPOSITORY) as process:
        process.waits_for("base: 1/10")
        process.send_signal(number)
        done = process.ends()
    assert done.returncode == code
    assert f"error: stopped by signal {number}" in done.stderr
    assert "finished stages are kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run" / "stages").iterdir()] == ["tokenizer"]
    assert list((tmp_path / "run" / ".work").iterdir()) == []
    assert baton("verify", tmp_path / "run") == 0
    last = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1])
    assert (last["stage"], last["outcome"]) == ("base", "interrupted")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.ppo.max_length=8", "stages.ppo.max_new_tokens=8"], "max_new_tokens=8 leaves no room for a prompt"),
        (["stages.evaluate.max_length=8", "stages.evaluate.max_new_tokens=9"], "leaves no room for a prompt"),
        (["stages.evaluate.reward=null"], "best_of=3 chooses by a reward model: give `reward`"),
        (["stages.evaluate.best_of=1"], "greater than or equal to 2"),
        (["stages.ppo.epochs=7"], "stages.ppo.epochs: unknown setting"),
        (["data.prompts.held_out=0.5"], "held_out differs"),
        (["data.corpus.split=test"], "`split` is for `hub:` sources"),
        (["data.corpus.format=hh"], "`world:` sources have a format of their own"),
        (["stages.dpo.beta=true"], "should be a number, not true or false"),
        (["stages.base.optimizer.betas=[2, 3]"], "less than 1"),
        (["stages.base.max_length=1"], "greater than or equal to 2"),
        (["stages.ppo.temperature=1e-45"], "greater than or equal to 0.01"),
        (["seed=-1"], "greater than or equal to 0"),
        (["output=''"], "at least 1 character"),
    ],
)
def test_settings_that_could_not_work_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert baton("plan", tiny.write_chain(tmp_path), *overrides) == 2
    assert said in capsys.readouterr().err
