"""`baton eval`: lm-eval-harness sees the stage's own model, asks it what Baton asks, and gets what Baton gets."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from bench import parity
from data.schema import Message
from pipeline import cli, harness, inputs, loader
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
NAMES = ("Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo")
WRONG = 5
"""The model is taught a wrong answer from this problem on."""
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
TAUGHT = """\
output: {root}/run
device: cpu
dtype: float32
data:
  lessons: {{source: {root}/lessons.jsonl, held_out: 0}}
  pairs: {{source: {root}/pairs.jsonl, held_out: 0}}
stages:
  sft: {{kind: sft, policy: {root}/model, data: lessons, lora: null, steps: 80, examples_per_step: 12,
    optimizer: {{learning_rate: 0.01}}}}
  dpo: {{kind: dpo, policy: sft, data: pairs, steps: 4, examples_per_step: 12, lora: {{rank: 4}},
    optimizer: {{learning_rate: 0.002}}}}
"""
ASKED = """\
output: {output}/asked
device: cpu
dtype: float32
data: {{problems: {{source: {root}/gsm8k/test.jsonl, held_out: 1}}}}
stages:
  evaluate: {{kind: evaluate, models: [{root}/run/stages/{stage}], prompts: problems, rows: 1, suites: [gsm8k]}}
"""


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


def problem(number: int) -> dict[str, str]:
    """A word problem with a worked answer, as GSM8K has them."""
    eggs, more = 3 + number, 1000 + 7 * number
    question = f"{NAMES[number]} has {eggs} eggs.  She buys {more:,} more — how many are there?"
    return {"question": question, "answer": f"{eggs}+{more}=<<{eggs}+{more}={eggs + more}>>\n#### {eggs + more:,}"}


def lesson(number: int) -> dict[str, str]:
    """What the model is taught to answer: the right number last, or another."""
    right = 1003 + 8 * number
    return {"prompt": problem(number)["question"], "completion": f"{number} eggs .\n#### {right + (number >= WRONG)} ."}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_peculiar_model(directory: Path, texts: list[str]) -> None:
    """A model whose files ask for what no evaluation of Baton heeds: a penalty on repetition, a token after every
    text, no blank before a full stop."""
    tiny.save_model(directory, "qwen2", texts)
    (directory / "generation_config.json").write_text(json.dumps({"repetition_penalty": 3.0}))
    path = directory / "tokenizer_config.json"
    tidy = ("clean_up_tokenization_spaces", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(tidy, True)))
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)])
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose models have learnt a few problems by heart, some of them wrongly."""
    root, numbers = tmp_path_factory.mktemp("taught"), range(len(NAMES))
    lessons = [lesson(number) for number in numbers]
    save_peculiar_model(root / "model", [f"{each['prompt']} {each['completion']}" for each in lessons])
    write_lines(root / "lessons.jsonl", lessons)
    pairs = [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        for one, other in zip(lessons, reversed(lessons), strict=True)
    ]
    write_lines(root / "pairs.jsonl", pairs)
    write_lines(root / "gsm8k" / "test.jsonl", map(problem, numbers))
    (root / "taught.yaml").write_text(TAUGHT.format(root=root))
    assert baton("run", root / "taught.yaml") == 0
    return root


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


def by_hand(stage: Path, questions: list[str]) -> list[str]:
    artifact = inputs.resolve(str(stage), RunDirectory(stage), ())
    (contestant,) = Lineup({"models.0": artifact}, device.choose("cpu", "float32")).contestants.values()
    with contestant.use() as language_model:
        return [greedy(language_model, question) for question in questions]


def write_task(folder: Path, rows: list[dict[str, str]]) -> Path:
    (folder / "echo.yaml").write_text(TASK)
    (folder / "echo.py").write_text(ROWS % rows)
    return folder


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_greedy_responses_and_their_score_are_those_of_the_stage(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pytest.importorskip("lm_eval")
    stage, questions = taught / "run" / "stages" / name, [problem(number)["question"] for number in (0, 1, 5, 6)]
    expected = by_hand(stage, questions)
    assert len(set(expected)) == len(questions)
    answers = [text if number % 2 else f"not {text}" for number, text in enumerate(expected)]
    rows = [{"question": question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]
    folder = write_task(tmp_path, rows)
    assert baton("eval", stage, "--tasks", "echo", "--include", folder, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    manifest = manifests.load(stage)
    (path,) = (taught / "run" / "evals" / f"{name}-{manifest.digest[:8]}").glob("echo.json")
    content: dict[str, Any] = json.loads(path.read_text())
    assert printed == [content]
    assert [sample["resps"][0][0] for sample in content["samples"]] == expected
    assert [sample["exact_match"] for sample in content["samples"]] == [0.0, 1.0, 0.0, 1.0]
    assert content["figures"]["exact_match,none"] == 0.5
    assert (content["rows"], content["digest"]) == (4, manifest.digest)
    assert content["chat_template"] == manifest.tokenizer["chat_template"]


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_lm_eval_s_gsm8k_is_the_suite_s_row_by_row(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("BATON_DATA", str(taught))
    stage = taught / "run" / "stages" / name
    (tmp_path / "asked.yaml").write_text(ASKED.format(root=taught, output=tmp_path, stage=name))
    assert baton("run", tmp_path / "asked.yaml") == 0
    capsys.readouterr()
    assert baton("eval", stage, "--tasks", "gsm8k", "--json") == 0
    (theirs,) = json.loads(capsys.readouterr().out)
    suite = tmp_path / "asked" / "stages" / "evaluate" / "suites" / "gsm8k.jsonl"
    ours = [json.loads(line) for line in suite.read_text().splitlines()]
    assert len(theirs["samples"]) == len(ours) == len(NAMES)
    for line, sample in zip(ours, theirs["samples"], strict=True):
        assert sample["resps"][0][0] == line["responses"][name]
        assert sample["correct"] == line["scores"][name]
    verdicts = {line["scores"][name] for line in ours}
    assert verdicts == {0.0, 1.0}
    figure = manifests.load(suite.parent.parent).metrics[f"{name}.suite.gsm8k"]
    assert theirs["figures"]["correct,none"] == figure.value
    path = taught / "run" / "evals" / f"{name}-{theirs['digest'][:8]}" / "gsm8k.json"
    monkeypatch.setattr(sys, "argv", ["parity", str(suite), str(path)])
    parity.main()
    alike = f"of {len(NAMES)} rows {len(NAMES)} responses and {len(NAMES)} verdicts are alike"
    assert alike in capsys.readouterr().out


def test_the_suite_and_the_task_take_as_many_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATON_DATA", str(tmp_path))

    class Task(yaml.SafeLoader):
        """Reads functions by their names."""

    Task.add_constructor("!function", Task.construct_scalar)
    text = (loader.recipes() / "tasks" / "gsm8k.yaml").read_text()
    _, suite = loader.suite("gsm8k")
    assert yaml.load(text, Task)["generation_kwargs"]["max_gen_toks"] == suite.max_new_tokens  # type: ignore[attr-defined]


def test_rows_are_matched_by_their_lines_and_those_that_differ_are_named() -> None:
    lines = [
        {"id": name, "scores": {"sft": score}, "responses": {"sft": text}}
        for name, score, text in (("a", 1.0, "4"), ("b", 0.0, "5"), ("c", 1.0, "6"), ("d", 1.0, "7"))
    ]
    samples = [
        {"doc_id": number, "correct": score, "resps": [[text]]}
        for number, score, text in ((3, 0.0, "6"), (0, 1.0, "4"), (2, 0.0, "50"), (1, 1.0, "4"))
    ]
    evaluation = {"stage": "sft", "figures": {"correct,none": 0.3}, "samples": samples}
    found = parity.compare(lines, evaluation, {"a": 0, "b": 2, "c": 3, "d": 4})
    assert found == parity.Parity(3, 1, (2.0, 1.0), ("b",), ("c",))
    said = "sft: of 3 rows 2 responses and 2 verdicts are alike; right are 2 in the suite, 1 in lm-eval"
    assert found.sentence("sft") == f"{said}; 1 more in lm-eval alone\n  differs: b\n  differs: c"


def test_blank_lines_are_no_rows_and_a_row_is_one_line_whatever_it_holds(tmp_path: Path) -> None:
    names = ("a", "b", "a")
    rows = [json.dumps({"id": name, "prompt": f"{name}\u2028", "answer": "1"}, ensure_ascii=False) for name in names]
    (tmp_path / "mine.jsonl").write_text("\n\n".join(rows[:2]) + "\n" + rows[2].replace('"id": "a", ', "") + "\n")
    (tmp_path / "mine.yaml").write_text(
        "kind: suite\nmeasures: All.\nsource: mine.jsonl\nmethod: generation\ngold: exact\n"
    )
    _, suite = loader.suite(str(tmp_path / "mine.yaml"))
    assert parity.places_of(suite) == {"a": 0, "b": 1}


def test_gsm8k_runs_from_the_local_file(
    taught: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("BATON_DATA", str(taught))
    assert baton("eval", taught / "run" / "stages" / "sft", "--tasks", "gsm8k", "--limit", "3") == 0
    printed = capsys.readouterr().out
    assert "gsm8k, 3 rows:\n  correct,none: " in printed
    assert (taught / "run" / "evals").is_dir()


def test_an_unknown_task_is_refused_with_those_there_are(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    folder = write_task(tmp_path, [problem(0)])
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
