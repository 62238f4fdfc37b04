"""What would end an evaluation after hours of training is found by `baton plan`, before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from data.schema import Message, Prompt
from data.split import is_held_out
from pipeline import cli
from stages.core import models

RUN = """\
output: {root}/run
data:
  texts: {{source: {root}/texts.jsonl}}
  chats: {{source: {root}/chats.jsonl}}
stages:
  tokenizer: {{kind: tokenizer, data: texts, vocab_size: 300}}
  base: {{kind: pretrain, tokenizer: tokenizer, data: texts, architecture: {{model_type: llama}}, steps: 1}}
  sft: {{kind: sft, policy: base, data: chats, steps: 1}}
  ppo: {{kind: ppo, policy: sft, data: chats, steps: 1, rules: [{{rule: pattern, expression: x}}]}}
  evaluate:
    kind: evaluate
    models: [sft, ppo]
    prompts: chats
    suites: [{root}/mine.yaml]
"""
SUITE = {"kind": "suite", "measures": "All.", "source": "mine.jsonl", "method": "generation", "gold": "exact"}
SERVER = {"url": "https://example.com/v1", "hosts": ["example.com"], "token_variable": "CHECKS_KEY"}
QUESTIONS = [{"prompt": f"Unheard of {each}?", "answer": "no"} for each in range(40)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_suite(root: Path, rows: list[dict[str, Any]], **settings: Any) -> None:
    values = {name: value for name, value in {**SUITE, **settings}.items() if value is not None}
    (root / "mine.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    write_lines(root / "mine.jsonl", rows)


def plan(root: Path, *arguments: str) -> int:
    """The exit code of `baton plan`, run in this process."""
    return cli.execute(cli.app, ["plan", str(root / "run.yaml"), *arguments])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run that has a suite and has not begun."""
    write_lines(tmp_path / "texts.jsonl", [{"text": f"This is document number {each}."} for each in range(50)])
    write_lines(tmp_path / "chats.jsonl", [{"prompt": f"Question {each}?", "completion": "Yes."} for each in range(50)])
    write_suite(tmp_path, QUESTIONS)
    (tmp_path / "run.yaml").write_text(RUN.format(root=tmp_path))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_run_in_which_nothing_is_wrong_is_planned(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(root) == 0
    assert "run   evaluate" in capsys.readouterr().out


def test_a_suite_s_prompt_that_will_be_trained_on_is_refused_with_both_places(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_suite(root, [*QUESTIONS, *({"prompt": f"Question {each}?", "answer": "no"} for each in range(5))])
    assert plan(root) == 3
    message = said(capsys)
    assert "prompt on both sides" in message
    assert f"{root}/chats.jsonl:" in message
    assert f"{root}/mine.jsonl:4" in message
    assert "fix: " in message
    assert not (root / "run" / "stages").exists()
    assert plan(root, "--until", "sft") == 0


def test_a_suite_s_document_that_will_be_pretrained_on_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [{"text": f"This is document number {each}."} for each in range(5)]
    write_suite(root, texts, method="likelihood", gold=None)
    assert plan(root) == 3
    message = said(capsys)
    assert f"{root}/texts.jsonl:" in message
    assert f"{root}/mine.jsonl:" in message


@pytest.mark.parametrize(
    ("override", "where"),
    [
        (
            f"stages.evaluate.judges={json.dumps({'other': SERVER | {'model': 'm'}})}",
            "stages.evaluate.judges.other.token_variable",
        ),
        (
            f"stages.evaluate.judges={json.dumps({'other': [{'rule': 'server', **SERVER}]})}",
            "stages.evaluate.judges.other.0.token_variable",
        ),
        (f"stages.ppo.rules={json.dumps([{'rule': 'server', **SERVER}])}", "stages.ppo.rules.0.token_variable"),
        ("", "stages.evaluate.suites.mine.rules.0.token_variable"),
    ],
)
def test_a_token_that_is_not_in_the_environment_is_missed_before_anything_runs(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, override: str, where: str
) -> None:
    if not override:
        write_suite(root, QUESTIONS, gold=None, rules=[{"rule": "server", **SERVER}])
    overrides = [override] if override else []
    assert plan(root, *overrides) == 2
    assert f"{where}: the environment variable CHECKS_KEY is not set fix: export it" in said(capsys)
    assert plan(root, *overrides, "--until", "sft") == 0
    monkeypatch.setenv("CHECKS_KEY", "secret")
    assert plan(root, *overrides) == 0


@pytest.mark.parametrize(
    ("settings", "last", "message"),
    [
        ({}, {"prompt": 3, "answer": "no"}, "mine.jsonl:41: prompt: 3"),
        (
            {},
            {"prompt": "Who?", "answer": None},
            "mine.jsonl:41: the prompt has no `answer`, which",
        ),
        ({}, {"id": "a", "prompt": "Who?", "answer": "no"}, "mine.jsonl:42: id: 'a' stands before, at"),
        ({"method": "invariance"}, {"prompt": "Who?", "answer": "no"}, "mine.jsonl:41: no `group`"),
    ],
)
def test_the_last_row_of_a_suite_is_looked_at(
    root: Path, capsys: pytest.CaptureFixture[str], settings: Mapping[str, Any], last: dict[str, Any], message: str
) -> None:
    together = [{**row, "group": "one"} for row in QUESTIONS] if settings else QUESTIONS
    double = [{**last, "prompt": "Whose?"}] if "id" in last else []
    write_suite(root, [*together, *double, last], **settings)
    assert plan(root) == 3
    assert message in said(capsys)


@pytest.mark.parametrize(
    "override",
    [
        "stages.evaluate.gold=exact",
        "stages.evaluate.judges={right: [{rule: length, words: 9}, {rule: exact}]}",
        "stages.ppo.rules=[{rule: exact}]",
        "stages.ppo.gold=exact",
    ],
)
def test_prompts_without_what_a_rule_needs_are_missed_before_anything_runs(
    root: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    asked = [{"prompt": f"Who is number {each}?"} for each in range(50)]
    known = [{**row, "answer": "I."} for row in asked]
    role = "stages.ppo.data=asked" if "ppo" in override else "stages.evaluate.prompts=asked"
    data = f"data.asked={{source: {root}/asked.jsonl}}"
    write_lines(root / "asked.jsonl", asked)
    assert plan(root, data, role) == 0
    assert plan(root, data, role, override) == 3
    assert "the prompt has no `answer`, which the rule `exact` needs" in said(capsys)
    write_lines(root / "asked.jsonl", known)
    assert plan(root, data, role, override) == 0


def test_rows_that_an_evaluation_does_not_ask_need_no_answer(root: Path) -> None:
    rows = [Prompt((Message("user", f"Who is number {each}?"),)) for each in range(300)]
    held_out = [each for each, row in enumerate(rows) if is_held_out(row, 0.1)]
    known = {each: {"answer": "I."} for each in held_out[:3]}
    asked = [{"prompt": row.prompt[0].content} | known.get(each, {}) for each, row in enumerate(rows)]
    write_lines(root / "asked.jsonl", asked)
    overrides = [f"data.asked={{source: {root}/asked.jsonl}}", "stages.evaluate.prompts=asked"]
    overrides += ["stages.evaluate.gold=exact"]
    assert plan(root, *overrides, "stages.evaluate.rows=3") == 0
    assert plan(root, *overrides, "stages.evaluate.rows=4") == 3


def test_the_last_row_of_a_suite_holds_what_its_rules_need(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_suite(root, [*QUESTIONS, {"prompt": "Who?"}], gold=None, rules=[{"rule": "exact"}])
    assert plan(root) == 3
    assert "mine.jsonl:41: the prompt has no `answer`, which the rule `exact` needs" in said(capsys)


def test_a_suite_file_that_is_missing_is_named_with_what_to_do(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "mine.yaml").unlink()
    assert plan(root) == 2
    assert f"{root}/mine.yaml: cannot read the suite: No such file or directory fix: correct its name" in said(capsys)


def test_responses_that_leave_no_room_for_a_prompt_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_suite(root, QUESTIONS, max_new_tokens=100)
    assert plan(root, "stages.evaluate.max_length=100") == 2
    message = said(capsys)
    assert "stages.evaluate.suites.mine: max_new_tokens=100 of the suite leaves no room for a prompt" in message
    assert plan(root, "stages.evaluate.max_length=101") == 0


def test_where_nothing_is_to_be_trained_the_search_is_the_evaluation_s_own(root: Path) -> None:
    write_suite(root, [{"prompt": f"Question {each}?", "answer": "no"} for each in range(5)])
    config = root / "run.yaml"
    before, _, after = config.read_text().partition("  tokenizer:")
    evaluate = after[after.index("  evaluate:") :].replace("[sft, ppo]", f"[{root}/other]")
    config.write_text(before + evaluate)
    tiny.save_model(root / "other", "qwen2", ["Yes. No."] * 5)
    assert plan(root) == 0


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ("acuracy", "did you mean `accuracy`?"),
        ("gold", "the stage measures no such figure"),
        ("suite.mien", "did you mean `suite.mine`?"),
        ("suite.mine_perplexty", "did you mean `suite.mine_perplexity`?"),
        ("win_rate.shrt", "did you mean `win_rate.short`?"),
        ("score.gpt", "did you mean `score.short`?"),
        ("perplexity", "the stage measures no such figure"),
    ],
)
def test_a_required_figure_that_nobody_measures_is_refused_before_anything_runs(
    root: Path, capsys: pytest.CaptureFixture[str], figure: str, message: str
) -> None:
    judges = {"short": [{"rule": "length", "words": 3}], "gpt": SERVER | {"model": "m", "token_variable": None}}
    settings = [f"stages.evaluate.judges={json.dumps(judges)}"]
    rules = [] if figure == "gold" else ["stages.evaluate.gold=exact"]
    required = json.dumps({"ppo": {figure: "> 0"}})
    write_lines(
        root / "chats.jsonl",
        [{"prompt": f"Question {each}?", "completion": "Yes.", "answer": "Yes."} for each in range(50)],
    )
    assert plan(root, *settings, *rules, f"stages.evaluate.require={required}") == 2
    found = said(capsys)
    assert f"stages.evaluate.require.ppo.{figure}: " in found
    assert message in found
    assert "fix: " in found


def test_every_figure_that_is_measured_can_be_required(root: Path) -> None:
    judges = {"short": [{"rule": "length", "words": 3}], "gpt": SERVER | {"model": "m", "token_variable": None}}
    figures = ["length", "kl", "suite.mine", "suite.mine.hard", "suite.mine_gain", "score.short", "length_ratio"]
    figures += [f"{kind}.{judge}" for kind in ("win_rate", "win_rate_length_controlled") for judge in judges]
    required = json.dumps({"ppo": dict.fromkeys(figures, "> 0")})
    settings = f"stages.evaluate.judges={json.dumps(judges)}", f"stages.evaluate.require={required}"
    assert plan(root, *settings) == 0


@pytest.mark.parametrize(
    ("figure", "bound", "allowed"),
    [
        ("score.short", "< 1.05 x parent", "compared by difference"),
        ("suite.mine", "> 2 x parent", "compared by difference"),
        ("length", "> parent - 3", "compared by ratio"),
        ("win_rate.short", "> parent", "no comparison of it with the parent's"),
        ("kl", "< parent", "no comparison of it with the parent's"),
        ("length_ratio", "< parent", "no comparison of it with the parent's"),
        ("length_gain", "> 0", "the stage measures no such figure"),
        ("kl_gain", "> 0", "the stage measures no such figure"),
    ],
)
def test_a_bound_that_a_figure_is_never_held_against_is_refused_before_anything_runs(
    root: Path, capsys: pytest.CaptureFixture[str], figure: str, bound: str, allowed: str
) -> None:
    judges = json.dumps({"short": [{"rule": "length", "words": 3}]})
    required = json.dumps({"ppo": {figure: bound}})
    assert plan(root, f"stages.evaluate.judges={judges}", f"stages.evaluate.require={required}") == 2
    found = said(capsys)
    assert f"stages.evaluate.require.ppo.{figure}: " in found
    assert allowed in found


@pytest.mark.parametrize(
    ("figure", "bound"),
    [("score.short", "> parent - 0.1"), ("suite.mine", "> parent"), ("length", "< 2 x parent"), ("length", "< parent")],
)
def test_a_figure_may_be_held_against_what_it_is_compared_by(root: Path, figure: str, bound: str) -> None:
    judges = json.dumps({"short": [{"rule": "length", "words": 3}]})
    required = json.dumps({"ppo": {figure: bound}})
    assert plan(root, f"stages.evaluate.judges={judges}", f"stages.evaluate.require={required}") == 0


@pytest.mark.parametrize(("task", "code"), [("sums_gain", 3), ("sums", 0)])
def test_a_task_that_is_called_like_a_comparison_is_refused_with_its_line(
    root: Path, capsys: pytest.CaptureFixture[str], task: str, code: int
) -> None:
    asked = {"source": str(root / "asked.jsonl"), "held_out": 1}
    write_lines(root / "asked.jsonl", [{"prompt": f"Asked {each}?", "answer": "no", "task": task} for each in range(9)])
    settings = f"data.asked={json.dumps(asked)}", "stages.evaluate.prompts=asked", "stages.evaluate.gold=exact"
    assert plan(root, *settings) == code
    if code:
        found = said(capsys)
        assert "asked.jsonl:" in found
        assert "task: 'sums_gain' ends as the names of comparisons with a parent do" in found


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("stages.evaluate.models=[sft, {root}/sft]", "stages.evaluate.models.1: `sft` and `{root}/sft` would both be"),
        (
            "stages.evaluate.reward={root}/ppo",
            "stages.evaluate.reward: `ppo` and `{root}/ppo` would both be called `ppo`",
        ),
    ],
)
def test_two_models_of_one_name_are_refused_with_their_place(
    root: Path, capsys: pytest.CaptureFixture[str], change: str, what: str
) -> None:
    (root / "sft").mkdir()
    (root / "ppo").mkdir()
    assert plan(root, change.format(root=root)) == 2
    message = said(capsys)
    assert what.format(root=root) in message
    assert message.startswith("error: command line: ")
    assert "copy one of them to a directory of another name" in message


@pytest.mark.parametrize(
    ("share", "rows", "what"),
    [
        (0.0, 50, "chats.jsonl: no held-out rows for stages.evaluate.prompts"),
        (0.01, 3, "chats.jsonl: no held-out rows for stages.evaluate.prompts"),
        (0.99, 1, "chats.jsonl: all rows are held out, none is left for stages.sft.data"),
    ],
)
def test_rows_that_are_all_on_the_other_side_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str], share: float, rows: int, what: str
) -> None:
    held_out = f"held_out={share}"
    assert plan(root, f"data.chats.{held_out}", f"data.texts.{held_out}", f"data.chats.rows={rows}") == 3
    message = said(capsys)
    assert what in message
    assert "its held_out" in message


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (["device=cuda"], "device: device `cuda` is not available fix: use device=auto or device=cpu"),
        (["stages.sft.optimizer.name=paged_adamw8bit"], "stages.sft.optimizer.name: paged_adamw8bit needs a CUDA"),
        (["stages.sft.quantization=4bit"], "stages.sft.quantization: quantization=4bit needs bitsandbytes"),
        (["stages.sft.quantization=4bit", "device=mps"], "4bit does not work on device=mps"),
    ],
)
def test_a_device_that_does_not_do_what_is_asked_is_refused_before_anything_is_trained(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: list[str],
    what: str,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert cli.execute(cli.app, ["run", str(root / "run.yaml"), *changes]) == 2
    assert what in said(capsys)
    assert not (root / "run" / "stages").exists() or not list((root / "run" / "stages").iterdir())


def test_a_plan_for_another_machine_is_made_with_a_warning(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    assert plan(root, "device=cuda") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: on this machine, a run would end at once: device: device `cuda` is not available" in printed


def test_a_plan_that_asks_for_nothing_special_does_not_import_torch(root: Path) -> None:
    program = (
        "import sys; from pipeline import loader, plan; from pathlib import Path; "
        f"plan.plan(loader.load(Path({str(root / 'run.yaml')!r}))); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
