"""`baton eval`: lm-eval-harness sees the stage's own model, asks it what Baton asks, and gets what Baton gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.schema import Message
from pipeline import cli, durable, harness, inputs
from pipeline import manifest as manifests
from pipeline.store import RunDirectory
from stages.core import device
from stages.core.lineup import Lineup
from stages.core.models import LanguageModel

pytestmark = [
    pytest.mark.chain,
    # lm-eval and the libraries that it imports warn of themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
LONGEST = 16
QUESTIONS = ["How much is 2 plus 3?", "Where does Ada live?", "Spell duck backwards, please.", "Who works in Oslo?"]
TASK = """\
task: echo
custom_dataset: !function echo.rows
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 16}
"""
ROWS = """
from datasets import Dataset


def rows(**_):
    return {"test": Dataset.from_list(%r)}
"""


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


@torch.no_grad()
def greedy(language_model: LanguageModel, question: str) -> str:
    """The most likely token again and again, each from the whole text so far."""
    template = language_model.template
    tokens = template.prompt([Message("user", question)])
    start = len(tokens)
    while len(tokens) < start + LONGEST:
        tokens.append(int(language_model.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == template.stop_id:
            break
    return template.decode(tokens[start:])


def by_hand(stage: Path) -> list[str]:
    artifact = inputs.resolve(str(stage), RunDirectory(stage), ())
    (contestant,) = Lineup({"models.0": artifact}, device.choose("cpu", "float32")).contestants.values()
    with contestant.use() as language_model:
        return [greedy(language_model, question) for question in QUESTIONS]


def write_task(folder: Path, answers: list[str]) -> Path:
    rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    (folder / "echo.yaml").write_text(TASK)
    (folder / "echo.py").write_text(ROWS % rows)
    return folder


def disturbed(chain: Path, place: Path, name: str, file: str) -> Path:
    """A copy of a stage with random weights, which gives every question an answer of its own."""
    for each in {"sft", name}:
        shutil.copytree(chain / "stages" / each, place / "run" / "stages" / each)
    stage = place / "run" / "stages" / name
    weights = load_file(stage / file)
    generator = torch.Generator().manual_seed(0)
    changed = {
        key: each if "norm" in key else torch.randn(each.shape, generator=generator) * 0.4
        for key, each in sorted(weights.items())
    }
    save_file(changed, stage / file, metadata={"format": "pt"})
    (stage / "probes.json").unlink()
    manifest = manifests.load(stage)
    (stage / manifests.FILE_NAME).unlink()
    outputs = durable.inventory(stage)
    digest = manifests.content_digest(outputs)
    durable.seal(stage, manifests.FILE_NAME, manifest.model_copy(update={"outputs": outputs, "digest": digest}))
    return stage


@pytest.mark.parametrize(("name", "file"), [("sft", "model.safetensors"), ("dpo", "adapter_model.safetensors")])
def test_greedy_responses_and_their_score_are_those_of_the_stage(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, file: str
) -> None:
    pytest.importorskip("lm_eval")
    stage = disturbed(chain, tmp_path, name, file)
    expected = by_hand(stage)
    assert len(set(expected)) == len(QUESTIONS)
    answers = [text if number % 2 else f"not {text}" for number, text in enumerate(expected)]
    folder = write_task(tmp_path, answers)
    assert baton("eval", stage, "--tasks", "echo", "--include", folder, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    manifest = manifests.load(stage)
    (path,) = (tmp_path / "run" / "evals" / f"{name}-{manifest.digest[:8]}").glob("echo.json")
    content: dict[str, Any] = json.loads(path.read_text())
    assert printed == [content]
    assert [sample["resps"][0][0] for sample in content["samples"]] == expected
    assert [sample["exact_match"] for sample in content["samples"]] == [0.0, 1.0, 0.0, 1.0]
    assert content["figures"]["exact_match,none"] == 0.5
    assert (content["rows"], content["digest"]) == (4, manifest.digest)
    assert content["chat_template"] == manifest.tokenizer["chat_template"]


def test_gsm8k_runs_from_the_local_file(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": question, "answer": f"As said:\n#### {number}"} for number, question in enumerate(QUESTIONS)]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("BATON_DATA", str(tmp_path))
    assert baton("eval", chain / "stages" / "sft", "--tasks", "gsm8k", "--limit", "3") == 0
    printed = capsys.readouterr().out
    assert "gsm8k, 3 rows:\n  correct,none: " in printed
    assert (chain / "evals").is_dir()


def test_an_unknown_task_is_refused_with_those_there_are(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    folder = write_task(tmp_path, QUESTIONS)
    assert baton("eval", chain / "stages" / "sft", "--tasks", "ecco", "--include", folder) == 2
    error = capsys.readouterr().err
    assert "no task `ecco`; did you mean `echo`?" in error
    assert "tasks of this folder: echo" in error


def test_without_lm_eval_it_says_what_to_install(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    assert baton("eval", chain / "stages" / "sft", "--tasks", "gsm8k") == 2
    assert 'pip install "baton-align[eval]"' in capsys.readouterr().err


def test_a_reward_model_is_refused(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: object())  # type: ignore[attr-defined]
    assert baton("eval", chain / "stages" / "reward", "--tasks", "gsm8k") == 5
    assert "`eval` needs a model or adapter" in capsys.readouterr().err
