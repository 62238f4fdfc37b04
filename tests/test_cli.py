"""The command line as users meet it: every command, every exit code, no traceback for a user's mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import fakes
import pytest
from conftest import REPOSITORY, Baton
from forks import Process

from pipeline import cli, launch, loader, runner
from pipeline.config import RunSettings
from pipeline.suites import METHODS
from pipeline.terminal import console


@pytest.fixture
def finished(config: Path, fake_stages: None) -> Path:
    """The run directory of a finished run."""
    runner.run(loader.load(config), console=console(stderr=True))
    return config.parent / "run"


@pytest.fixture
def inside(
    tmp_path: Path, fake_stages: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Baton:
    """Run `baton ARGUMENTS` in this process, where everything is imported already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        words = list(map(str, arguments))
        capsys.readouterr()
        code = cli.execute(cli.app, words)
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return call


def test_a_run_ends_with_a_table_and_the_report(baton: Baton, config: Path) -> None:
    done = baton("run", config, REAL_REPORT="1")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "tok: running (never ran)"
    assert lines[-1] == f"report: {config.parent}/run/report.html"
    assert (config.parent / "run" / "report.html").stat().st_size > 1000
    assert [line.split()[0] for line in lines[-6:-1]] == fakes.STAGES


def test_plan_dry_run_and_json_agree(baton: Baton, inside: Baton, config: Path) -> None:
    plan = baton("plan", config, "stages.dpo.beta=0.2")
    assert plan.stdout == inside("run", config, "stages.dpo.beta=0.2", "--dry-run").stdout
    assert "5 of 5 would run" in plan.stdout
    decisions = json.loads(inside("plan", config, "--json").stdout)
    assert [decision["stage"] for decision in decisions] == fakes.STAGES
    assert decisions[0]["reasons"] == [{"cause": "never ran", "subject": "", "old": "", "new": ""}]
    assert not (config.parent / "run").exists()


def test_status_before_and_after(baton: Baton, inside: Baton, config: Path, finished: Path) -> None:
    states = json.loads(baton("status", finished, "--json").stdout)
    assert [state["state"] for state in states] == ["published"] * 5
    assert inside("status", config).stdout == inside("status", finished).stdout
    assert inside("status", config.parent).returncode == 2


def test_show_leads_back_to_the_data(baton: Baton, inside: Baton, finished: Path) -> None:
    shown = baton("show", finished / "stages" / "dpo")
    assert shown.returncode == 0, shown.stderr
    assert "dpo: adapter of a dpo stage, digest " in shown.stdout
    assert "accuracy: 0.5 [0.25, 0.75]" in shown.stdout
    assert "memory: at most " in shown.stdout
    for name, data in [("dpo", "pairs"), ("sft", "chats"), ("base", "text"), ("tok", "text")]:
        assert f"{finished}/stages/{name}" in shown.stdout
        assert f"{data}.jsonl (8 rows, train)" in shown.stdout
    lineage = json.loads(inside("show", finished / "stages" / "dpo", "--json").stdout)["lineage"]
    assert [each["stage"] for each in lineage] == ["dpo", "sft", "base", "tok"]
    assert inside("show", finished).returncode == 5


def test_verify_names_the_damaged_file_and_exits_5(baton: Baton, inside: Baton, finished: Path) -> None:
    intact = inside("verify", finished)
    assert (intact.returncode, intact.stdout.count("intact")) == (0, 5)
    (finished / "stages" / "rm" / "nested" / "weights.safetensors").write_text("short")
    damaged = baton("verify", finished)
    assert damaged.returncode == 5
    assert "rm: damaged\n  nested/weights.safetensors: 5 bytes, expected 64 bytes" in damaged.stdout
    assert json.loads(inside("verify", finished, "--json").stdout)["rm"]
    assert inside("verify", finished / "stages" / "rm").returncode == 5
    assert inside("verify", finished / "stages" / "sft").returncode == 0


def test_verify_fast_finds_sizes_and_says_that_it_hashes_nothing(inside: Baton, finished: Path) -> None:
    weights = finished / "stages" / "rm" / "nested" / "weights.safetensors"
    weights.write_text("0" * 64)
    fast = inside("verify", finished, "--fast")
    assert (fast.returncode, fast.stdout.count("not re-hashed")) == (0, 5)
    assert inside("verify", finished).returncode == 5
    weights.write_text("short")
    assert inside("verify", finished, "--fast").returncode == 5
    weights.unlink()
    weights.symlink_to("/etc/hostname")
    assert "a link, expected a regular file" in inside("verify", finished, "--fast").stdout


def test_verify_finds_a_link_of_the_chain_that_was_exchanged(inside: Baton, finished: Path, config: Path) -> None:
    other = inside("run", config, "stages.sft.epochs=2", f"output={finished.parent}/other")
    assert other.returncode == 0, other.stderr
    (finished / "stages" / "sft").rename(finished / "stages" / "old")
    (finished.parent / "other" / "stages" / "sft").rename(finished / "stages" / "sft")
    verified = inside("verify", finished)
    assert verified.returncode == 5
    assert f"input policy: {finished}/stages/sft/manifest.json: sha256 " in verified.stdout
    assert "damaged: dpo, rm" in verified.stderr


def test_why_tells_the_last_reason_and_the_next(baton: Baton, inside: Baton, finished: Path, config: Path) -> None:
    config.write_text(config.read_text().replace("beta: 0.1", "beta: 0.2"))
    why = baton("why", config, "dpo")
    assert why.returncode == 0, why.stderr
    assert ": published\n  because: never ran\n" in why.stdout
    assert "run   dpo (dpo)\n      config beta: 0.1 -> 0.2\n" in why.stdout
    assert "keep  dpo (dpo)" in inside("why", finished, "dpo").stdout
    assert inside("why", finished, "dop").returncode == 2


def test_a_run_that_was_moved_is_still_up_to_date(inside: Baton, finished: Path) -> None:
    moved = finished.rename(finished.parent / "moved")
    assert "keep  dpo (dpo)" in inside("why", moved, "dpo").stdout
    assert inside("verify", moved).returncode == 0


def test_diff_names_settings_inputs_and_results(baton: Baton, inside: Baton, finished: Path, config: Path) -> None:
    other = finished.parent / "other"
    assert inside("run", config, "stages.dpo.beta=0.2", f"output={other}", "--until", "dpo").returncode == 0
    lines = baton("diff", finished, other).stdout.splitlines()
    assert "dpo: settings.beta: 0.1 -> 0.2" in lines
    assert any(line.startswith("dpo: digest: ") for line in lines)
    assert "rm: stage: published -> absent" in lines
    assert all(line.startswith(("dpo: ", "rm: stage")) for line in lines)
    assert inside("diff", finished, finished).stdout == "no difference\n"


def test_report_can_be_written_again(baton: Baton, finished: Path) -> None:
    written = baton("report", finished, REAL_REPORT="1")
    assert written.stdout == f"{finished}/report.html\n"
    assert (finished / "report.html").stat().st_size > 1000


def test_schema_is_the_models(baton: Baton) -> None:
    assert json.loads(baton("schema").stdout) == RunSettings.model_json_schema()


def test_schema_of_suites_has_every_method_and_its_settings(baton: Baton) -> None:
    printed = json.loads(baton("schema", "--suite").stdout)
    found = {method: printed["$defs"][each["$ref"].rpartition("/")[2]] for method, each in offered(printed).items()}
    assert found.keys() == METHODS.keys()
    for method, model in METHODS.items():
        assert found[method]["properties"].keys() == model.model_fields.keys()
        assert all("description" in each for each in found[method]["properties"].values())


def offered(schema: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Method -> where its schema stands, in the alternatives that the discriminator tells apart."""
    named = {each["$ref"]: each for each in schema["oneOf"]}
    return {method: named[place] for method, place in schema["discriminator"]["mapping"].items()}


def test_init_writes_a_recipe_once(baton: Baton, inside: Baton, tmp_path: Path) -> None:
    recipe = next(iter(sorted((REPOSITORY / "configs").glob("*.yaml"))))
    assert inside("init", "mine.yaml", "--recipe", recipe.stem).returncode == 0
    assert (tmp_path / "mine.yaml").read_bytes() == recipe.read_bytes()
    again = inside("init", "mine.yaml", "--recipe", recipe.stem)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    unknown = baton("init", "--recipe", "quickstrat")
    assert (unknown.returncode, "did you mean `quickstart`?" in unknown.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "missing.yaml"],
        ["run", "--fast", "x"],
        ["status", "."],
        ["diff", ".", "."],
    ],
)
def test_usage_errors_exit_2(inside: Baton, arguments: list[str]) -> None:
    done = inside(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("what", "code"), [("nan", 4), ("link", 5), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stage_that_ends_badly_sets_the_exit_code(baton: Baton, config: Path, what: str, code: int) -> None:
    done = baton("run", config, FAKE_STAGE=f"sft:{what}")
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_bad_data_exits_3_before_anything_runs(baton: Baton, config: Path) -> None:
    (config.parent / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    done = baton("run", config)
    assert done.returncode == 3
    assert "pairs.jsonl:1" in done.stderr
    assert not (config.parent / "run" / "stages").exists()


def test_an_output_that_cannot_be_written_exits_6(baton: Baton, config: Path) -> None:
    for output in ("/proc/baton", config):
        done = baton("run", config, f"output={output}")
        assert done.returncode == 6
        assert f"error: {output}: cannot be the run directory: " in done.stderr


def test_two_runs_at_once_one_is_told_to_wait(baton: Baton, config: Path) -> None:
    environment = {**os.environ, "FAKE_STAGE": "tok:wait"}
    with Process(fakes.COMMAND, "run", config, cwd=config.parent, environment=environment) as first:
        first.waits_for("waiting")
        second = baton("run", config)
        assert second.returncode == 75
        assert f"in use by process {first.pid} on " in second.stderr
        first.send_signal(signal.SIGTERM)
        assert first.ends().returncode == 143


def test_a_stage_as_a_script_runs_only_its_kind(
    fake_stages: None, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config)]
    assert cli.execute(launch.application("sft"), arguments) == 2
    assert "stage `base` has not been published" in capsys.readouterr().err
    for kind in ("tokenizer", "pretrain", "sft"):
        assert cli.execute(launch.application(kind), arguments) == 0
    published = {path.name for path in (config.parent / "run" / "stages").iterdir()}
    assert published == {"tok", "base", "sft"}
    manifest = json.loads((config.parent / "run" / "stages" / "sft" / "manifest.json").read_text())
    assert manifest["command"] == f"python -m stages.sft {config} --only sft"
    assert cli.execute(launch.application("ppo"), arguments) == 2
    assert cli.execute(launch.application("dpo"), [*arguments, "--only", "sft"]) == 2
    capsys.readouterr()
    assert cli.execute(launch.application("dpo"), [*arguments, "--dry-run"]) == 0
    assert "run   dpo (dpo)" in capsys.readouterr().out
