"""Tokens of the environment are in no byte that a run leaves and in no line that it prints, and settings hold none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import tiny
from conftest import REPOSITORY, Baton
from forks import Process
from reward_servers import lengths, says, serving

from pipeline import loader
from pipeline.errors import ConfigError
from pipeline.redaction import is_secret, redacted
from pipeline.terminal import printable

SECRETS = {
    "HF_TOKEN": "hf_" + "cAnArYoNe" * 4,
    "WANDB_API_KEY": "canarytwo" * 4,
    "REWARD_SERVER_KEY": "canary-three/+%22&<x>=",
    "DATABASE_PASSWORD": 'canary "four" \\ \u00e9\ttab',
}
RULES = "rules: [{{rule: server, url: {url}, hosts: [127.0.0.1], token_variable: REWARD_SERVER_KEY, retries: 0}}]"
TELLS = """
import os

def tell(row):
    if row["text"] != "the last":  # the first ones are looked at before anything runs
        return row
    raise RuntimeError(" and ".join(os.environ[name] for name in {names}))
"""


def started(root: Path, *arguments: str | Path) -> Process:
    """`baton ARGUMENTS` with the secrets in its environment."""
    environment = {**os.environ, **SECRETS, "PYTHONPATH": str(root)}
    return Process(forks.COMMAND, *arguments, cwd=root, environment=environment)


def baton(root: Path, *arguments: str | Path) -> tuple[int, bytes]:
    """The exit code and all that is printed."""
    with started(root, *arguments) as process:
        return printed_by(process)


def in_an_interpreter(root: Path, *arguments: str | Path) -> tuple[int, bytes]:
    """The same in a new interpreter, whose libraries find the secrets when they are imported."""
    environment = {**os.environ, **SECRETS, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", forks.COMMAND, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, check=False
    )
    return done.returncode, done.stdout


def printed_by(process: Process) -> tuple[int, bytes]:
    """The exit code of a process and all that it has printed, at its end."""
    done = process.ends(300)
    return done.returncode, (done.stdout + done.stderr).encode()


def told(content: bytes) -> list[str]:
    """Names of the variables whose values are in some bytes, as they are or as JSON, HTML or Python write them."""
    found = []
    for name, value in SECRETS.items():
        written = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]}
        written.add(value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
        if any(each.encode() in content for each in written):
            found.append(name)
    return found


def with_server(config: Path, url: str) -> str:
    """The configuration with PPO's reward from a server that is given a key."""
    return config.read_text().replace("reward: reward, data: prompts", "data: prompts, " + RULES.format(url=url))


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def assert_nothing_told(directory: Path, printed: bytes) -> None:
    assert told(printed) == []
    assert {path: names for path in files(directory) if (names := told(path.read_bytes()))} == {}


@pytest.mark.slow
@pytest.mark.chain
@pytest.mark.usefixtures("fork_server")
def test_no_byte_of_a_run_holds_a_secret(tmp_path: Path) -> None:
    """The whole chain with a reward server that is given its key, the report, and a trainer of TRL."""
    with serving(lengths) as server:
        config = tiny.write_chain(tmp_path)
        text = with_server(config, server.url)
        size = "steps: 1, examples_per_step: 4, examples_per_batch: 4, max_length: 256, lora: {rank: 2}"
        config.write_text(text + f"  t_dpo: {{kind: trl, trainer: DPO, policy: sft, data: preferences, {size}}}\n")
        code, printed = in_an_interpreter(tmp_path, "run", config)
        sent = {each["authorization"] for each in server.headers}
    assert code == 0, printed.decode()
    assert sent == {f"Bearer {SECRETS['REWARD_SERVER_KEY']}"}
    run = tmp_path / "run"
    assert {path.name for path in (run / "stages").iterdir()} >= {"ppo", "evaluate", "t_dpo"}
    assert len(files(run)) > 50
    assert_nothing_told(run, printed)
    for command in ("status", "verify", "report"):
        assert told(baton(tmp_path, command, run)[1]) == []


@pytest.mark.chain
@pytest.mark.usefixtures("fork_server")
def test_what_a_stopped_run_leaves_holds_no_secret_either(tmp_path: Path) -> None:
    """A checkpoint and the records of the attempt; then an attempt that ends in an error of a server's."""
    config = tiny.write_chain(tmp_path)
    place = tmp_path / "run" / ".checkpoints" / "base"
    long = ["stages.base.steps=100000", "checkpoint_minutes=0"]
    with started(tmp_path, "run", config, "--until", "base", *long) as process:
        while process.runs and not list(place.glob("step-*")):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code, printed = printed_by(process)
    assert code == 143, printed.decode()
    assert len(files(place)) > 2
    assert files(tmp_path / "run" / ".failed")
    assert_nothing_told(tmp_path / "run", printed)


@pytest.mark.usefixtures("fork_server")
def test_an_error_that_repeats_secrets_is_printed_and_recorded_without_them(tmp_path: Path) -> None:
    config = tiny.write_chain(tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n' * 5_000 + '{"text": "the last"}\n')
    (tmp_path / "teller.py").write_text(TELLS.format(names=sorted(SECRETS)))
    source = [f"data.corpus.source={tmp_path}/corpus.jsonl", "data.corpus.rows=null", "data.corpus.format=teller:tell"]
    code, printed = baton(tmp_path, "run", config, *source, "--adapter", "teller:tell", "--until", "tokenizer")
    assert code == 3, printed.decode()
    assert b"[value of HF_TOKEN]" in printed
    assert "[value of HF_TOKEN]" in (tmp_path / "run" / "history.jsonl").read_text()
    assert_nothing_told(tmp_path / "run", printed)


def test_neither_does_the_trace_of_an_error_that_nobody_expected(config: Path, baton: Baton) -> None:
    done = baton("run", config, FAKE_STAGE="sft:tell", **SECRETS)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: [value of HF_TOKEN]" in done.stderr
    assert_nothing_told(config.parent / "run", (done.stdout + done.stderr).encode())
    assert "[value of HF_TOKEN]" in (config.parent / "run" / "history.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
def test_an_answer_that_repeats_the_key_is_told_to_nobody(tmp_path: Path) -> None:
    with serving(says(SECRETS["REWARD_SERVER_KEY"], 400)) as server:
        config = tiny.write_chain(tmp_path)
        config.write_text(with_server(config, server.url))
        code, printed = baton(tmp_path, "run", config, "--until", "ppo")
    assert code == 69, printed.decode()
    assert_nothing_told(tmp_path / "run", printed)


def refusal(config: Path, *overrides: str) -> str:
    """What is said of settings that are refused."""
    with pytest.raises(ConfigError) as caught:
        loader.load(config, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", list(SECRETS))
@pytest.mark.parametrize("way", ["override", "value", "key"])
def test_a_setting_with_a_secret_is_refused_and_not_repeated(
    name: str, way: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, secret in SECRETS.items():
        monkeypatch.setenv(variable, secret)
    value = json.dumps(f"x{SECRETS[name]}y")
    given = [f"data.text.source={value}"] if way == "override" else []
    if way != "override":
        columns = f"{{text: {value}}}" if way == "value" else f"{{{value}: text}}"
        config.write_text(config.read_text().replace("text.jsonl}", f"text.jsonl, columns: {columns}}}"))
    said = refusal(config, *given)
    assert f"holds the value of the environment variable {name}" in said
    assert told(said.encode()) == []


def test_a_token_on_the_command_line_is_in_nothing_that_is_printed_or_written(config: Path, baton: Baton) -> None:
    done = baton("run", config, f"stages.sft.chat_template={SECRETS['HF_TOKEN']}")
    assert done.returncode == 2
    assert "stages.sft.chat_template: holds what looks like a token" in done.stderr
    assert told((done.stdout + done.stderr).encode()) == []
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    "token",
    [
        "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
        "sk-proj-abcdefghijklmnopqrstuvwx",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "AKIAABCDEFGHIJKLMNOP",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlYWJj",
    ],
)
def test_what_looks_like_a_token_is_refused_wherever_it_stands(token: str, config: Path) -> None:
    for assignment in (f"stages.sft.chat_template={token}", f"stages.{token}=1", f"{token}", f"nonsense={token}"):
        assert token not in refusal(config, assignment)


@pytest.mark.parametrize("setting", ["token", "hub_token", "stages.sft.api_key", "data.text.password", "aws_secret"])
def test_a_setting_that_is_named_like_a_secret_is_refused_whatever_it_holds(setting: str, config: Path) -> None:
    with pytest.raises(ConfigError, match="holds a secret, by its name") as caught:
        loader.load(config, [f"{setting}=opensesame"])
    assert "opensesame" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        loader.load(config, [f"{setting}=[opensesame"])
    assert "opensesame" not in str(caught.value)


def test_ordinary_settings_are_no_secrets() -> None:
    names = [
        "max_new_tokens",
        "tokenizer",
        "pad_token",
        "eos_token_id",
        "token_variable",
        "keep",
        "key",
        "tokens_per_batch",
    ]
    assert [name for name in names if is_secret(name)] == []


def test_short_values_and_paths_of_files_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SSH_KEY_FILE", str(tmp_path))
    assert redacted(f"false {tmp_path}/x") == f"false {tmp_path}/x"


def test_only_a_whole_word_of_a_name_says_that_the_variable_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKENIZER", "NUM_TOKENS", "KEYMAP", "MONKEY", "SECRETARY"):
        monkeypatch.setenv(name, "demonstrations")
    assert redacted("demonstrations") == "demonstrations"
    for name in ("TOKEN", "hf_token", "KEY_OF_SERVER", "AWS_CREDENTIALS", "DB_PASSWORD_2"):
        monkeypatch.setenv(name, f"canary-{name}")
        assert redacted(f"canary-{name}") == f"[value of {name}]"


def test_a_variable_with_an_ordinary_value_changes_no_name_figure_or_digest_of_a_record(
    config: Path, baton: Baton
) -> None:
    """The values are a literal, a metric, a figure, a logged figure and digests: none of them is free text."""
    ordinary = {"CACHE_KEY": "artifact", "SORT_KEY": "accuracy", "NUM_KEY": "10000000", "LOSS_KEY": "0.33333333"}
    plain = baton("run", config)
    stage = config.parent / "run" / "stages" / "base"
    before = json.loads((stage / "manifest.json").read_text())
    digests = {"CODE_KEY": before["environment"]["code"], "OWN_KEY": before["digest"]}
    (config.parent / "run").rename(config.parent / "first")
    done = baton("run", config, **ordinary, **digests)
    assert (plain.returncode, done.returncode) == (0, 0), done.stderr
    after = json.loads((stage / "manifest.json").read_text())
    for changing in ("cost", "started", "seal", "outputs"):
        del before[changing], after[changing]
    for record in (*before["inputs"].values(), *after["inputs"].values()):
        del record["manifest_sha256"]
    assert after == before
    assert baton("verify", config.parent / "run", **ordinary).returncode == 0
    for records in (stage / "metrics.jsonl", config.parent / "run" / "history.jsonl"):
        assert [json.loads(line) for line in records.read_text().splitlines()]
    assert [json.loads(line)["loss"] for line in (stage / "metrics.jsonl").read_text().splitlines()] == [1, 0.5, 1 / 3]


def test_a_secret_is_replaced_before_a_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary" * 10)
    shown = printable("x" * 50 + "canary" * 10 + "y" * 1000)
    assert "canary" not in shown
    assert len(shown) == 80


def test_the_longer_of_two_secrets_is_replaced_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "canarycanary")
    monkeypatch.setenv("B_KEY", "canarycanary-longer")
    assert redacted("canarycanary-longer canarycanary") == "[value of B_KEY] [value of A_KEY]"
