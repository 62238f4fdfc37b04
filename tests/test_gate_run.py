"""A gate at the end of a whole run: what was trained for passes, a sabotaged reward fails, and neither is forgotten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reports
import reward_servers
from test_pair_judge import completion, prefers

from pipeline import cli
from pipeline import manifest as manifests

pytestmark = pytest.mark.chain

CONFIG = """\
output: {root}/run
device: cpu
dtype: float32
data:
  chats: {{source: {root}/chats.jsonl, held_out: 0.5}}
  pairs: {{source: {root}/pairs.jsonl, held_out: 0.5}}
  prompts: {{source: {root}/prompts.jsonl, held_out: 0.5}}
stages:
  tokenizer: {{kind: tokenizer, data: chats, vocab_size: 300}}
  base:
    kind: pretrain
    tokenizer: tokenizer
    data: chats
    architecture: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
      num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 128, tie_word_embeddings: true}}
    max_length: 32
    steps: 20
    examples_per_step: 8
    optimizer: {{learning_rate: 0.01}}
  sft: {{kind: sft, policy: base, data: chats, lora: null, steps: 80, examples_per_step: 16,
    optimizer: {{learning_rate: 0.01}}}}
  reward: {{kind: reward, policy: sft, data: pairs, steps: 20, examples_per_step: 8,
    optimizer: {{learning_rate: 0.01}}}}
  dpo: {{kind: dpo, policy: sft, data: pairs, steps: 20, examples_per_step: 8, sft_weight: 1.0,
    optimizer: {{learning_rate: 0.003}}}}
  ppo: {{kind: ppo, policy: sft, reward: reward, data: prompts, steps: 12, examples_per_step: 32, max_new_tokens: 8,
    kl_coefficient: 0.1, gold: exact, evaluate_every: 2, optimizer: {{learning_rate: 0.002}}}}
  evaluate:
    kind: evaluate
    models: [sft, dpo, ppo]
    reward: reward
    prompts: prompts
    pairs: pairs
    gold: exact
    max_new_tokens: 8
    require:
      dpo: {{gold: "> parent", length: "< 2 x parent"}}
      ppo: {{gold: "> parent"}}
      reward: {{pair_accuracy: "> 0.8"}}
"""
GATE = "stages.evaluate.require"


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a model that says yes or nay, and that preferences teach to say yes."""
    root = tmp_path_factory.mktemp("gate")
    questions = [f"Say {number}?" for number in range(120)]
    turns = [({"role": "user", "content": question}, answer) for question in questions for answer in ("Yes.", "Nay.")]
    chats = [{"messages": [turn, {"role": "assistant", "content": answer}]} for turn, answer in turns]
    pairs = [{"prompt": question, "chosen": "Yes.", "rejected": "Nay."} for question in questions]
    reports.write_lines(root / "chats.jsonl", chats)
    reports.write_lines(root / "pairs.jsonl", pairs)
    exchanged = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    reports.write_lines(root / "exchanged.jsonl", exchanged)
    reports.write_lines(root / "prompts.jsonl", [{"prompt": question, "answer": "Yes."} for question in questions])
    path = root / "config.yaml"
    path.write_text(CONFIG.format(root=root))
    assert baton("run", path) == 0
    return path


@pytest.fixture(scope="module")
def sabotaged(config: Path) -> Path:
    """The same run with chosen and rejected exchanged; only what learns from pairs is trained again."""
    run = Path(shutil.copytree(config.parent / "run", config.parent / "sabotaged"))
    assert baton("run", config, *sabotage(run)) == 4
    return run


def sabotage(run: Path) -> list[str]:
    """What makes a run's reward the opposite."""
    return [f"output={run}", f"data.pairs.source={run.parent}/exchanged.jsonl"]


@pytest.fixture
def copy(config: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to continue."""
    return Path(shutil.copytree(config.parent / "run", tmp_path / "copy"))


def evaluation(run: Path) -> Any:
    return json.loads((run / "stages" / "evaluate" / "evaluation.json").read_text())


def samples(run: Path) -> list[Any]:
    lines = (run / "stages" / "evaluate" / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_what_was_trained_for_passes_the_gate(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert baton("run", config) == 0
    assert "evaluate: 4 of 4 requirements hold" in capsys.readouterr().out
    assert "4 of 4 requirements hold" in (config.parent / "run" / "report.html").read_text()


def test_a_sabotaged_reward_fails_the_gate_by_name_with_what_was_found(
    config: Path, sabotaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert baton("run", config, *sabotage(sabotaged)) == 4
    said = capsys.readouterr()
    metrics = manifests.load(sabotaged / "stages" / "evaluate").metrics
    for model in ("dpo", "ppo"):
        gain = metrics[f"{model}.gold_gain"]
        assert gain.high is not None
        assert gain.high <= 0
        written = f"{gain.value:.4g} [{gain.low:.4g}, {gain.high:.4g}]"
        expected = f"{GATE}: {model}.gold should be `> parent`, but its difference from the parent's is {written}"
        assert expected in said.err
    assert f"{GATE}: reward" not in said.err  # it learned well what it was given
    assert "nothing to do: every stage is up to date" in said.out


def test_a_failed_gate_leaves_all_published_and_reported(sabotaged: Path) -> None:
    assert baton("verify", sabotaged) == 0
    requirements = json.loads((sabotaged / "report.json").read_text())["requirements"]["evaluate"]
    assert [(each["model"], each["metric"], each["holds"]) for each in requirements] == [
        ("dpo", "gold", False),
        ("dpo", "length", True),
        ("ppo", "gold", False),
        ("reward", "pair_accuracy", True),
    ]
    page = (sabotaged / "report.html").read_text()
    reports.assert_inert(page)
    assert "2 of 4 requirements hold" in reports.Elements(page).text


def test_other_stages_alone_meet_no_gate(config: Path, sabotaged: Path) -> None:
    assert baton("run", config, *sabotage(sabotaged), "--only", "dpo") == 0
    assert baton("run", config, *sabotage(sabotaged), "--until", "ppo") == 0
    assert baton("run", config, *sabotage(sabotaged), "--only", "evaluate") == 4


def test_another_gate_is_checked_and_reported_without_evaluating_again(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = manifests.sha256(copy / "stages" / "evaluate")
    changed = [f"output={copy}", "stages.evaluate.require={dpo: {gold: '> parent + 5', kl: '< 0', reward: '> parent'}}"]
    assert baton("run", config, *changed) == 4
    said = capsys.readouterr()
    assert "evaluate: 1 of 3 requirements hold" in said.out
    assert f"{GATE}: dpo.gold should be `> parent + 5`" in said.err
    assert f"{GATE}: dpo.kl should be `< 0`, but is " in said.err
    assert manifests.sha256(copy / "stages" / "evaluate") == before
    assert "> parent + 5" in reports.Elements((copy / "report.html").read_text()).text


def test_a_figure_that_is_missing_fails_and_says_so(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = "stages.evaluate.require={dpo: {perplexity: '< 9'}, sft: {gold: '> parent'}}"
    assert baton("run", config, f"output={copy}", missing) == 4
    said = capsys.readouterr().err
    assert f"{GATE}: dpo.perplexity should be `< 9`, but no such figure was measured (known: " in said
    assert f"{GATE}: sft.gold should be `> parent`, but was not compared with a parent's" in said


def test_comparisons_count_wins_and_test_accuracies_as_samples_say(config: Path) -> None:
    gold = [each["gold"] for each in samples(config.parent / "run")]
    for model in ("dpo", "ppo"):
        found = evaluation(config.parent / "run")["models"][model]
        won = sum(each[model] > each["sft"] for each in gold)
        lost = sum(each[model] < each["sft"] for each in gold)
        comparison = found["comparison"]
        counts = (comparison["won"], comparison["tied"], comparison["lost"], comparison["unread"])
        assert counts == (won, len(gold) - won - lost, lost, 0)
        assert found["metrics"]["win_rate"]["value"] == pytest.approx(0.5 + (won - lost) / (2 * len(gold)))
        test = comparison["tests"]["accuracy"]
        assert (test["gained"], test["lost"]) == (won, lost)
        assert 0 < test["p"] <= test["adjusted"] < 0.05
        assert comparison["needed"] == {}
        controlled = found["metrics"]["win_rate_length_controlled"]
        assert controlled["low"] <= controlled["value"] <= controlled["high"]


def test_a_judge_s_verdicts_are_the_win_rate(config: Path, copy: Path) -> None:
    with reward_servers.serving(prefers("Nay.", otherwise="who knows")) as server:
        judge = f"{{url: '{server.url}', hosts: ['127.0.0.1:{server.server_port}'], model: judge-1}}"
        assert baton("run", config, f"output={copy}", f"stages.evaluate.judge={judge}", f"{GATE}={{}}") == 0
    found = evaluation(copy)
    assert found["judge"] == "judge-1"
    asked = 0
    for model in ("dpo", "ppo"):
        pairs = [(each["responses"][model], each["responses"]["sft"]) for each in samples(copy)]
        preferred = ["same" if a == b else ("Nay." in a) - ("Nay." in b) for a, b in pairs]
        comparison, rate = found["models"][model]["comparison"], found["models"][model]["metrics"]["win_rate"]
        assert comparison["won"] == preferred.count(1)
        assert comparison["lost"] == preferred.count(-1) > 0
        assert comparison["tied"] == preferred.count("same")
        assert comparison["unread"] == preferred.count(0)
        assert rate["high"] < 0.5
        asked += 2 * (len(pairs) - preferred.count("same"))
    assert len(server.bodies) == asked
    text = reports.Elements((copy / "report.html").read_text()).text
    assert "judged by judge-1" in text


def test_verdicts_that_cannot_be_read_are_counted_and_warned_of(config: Path, copy: Path) -> None:
    with reward_servers.serving(reward_servers.says(completion("I cannot say."))) as server:
        judge = f"{{url: '{server.url}', hosts: ['127.0.0.1:{server.server_port}'], model: judge-1}}"
        assert baton("run", config, f"output={copy}", f"stages.evaluate.judge={judge}", f"{GATE}={{}}") == 0
    found = evaluation(copy)["models"]["dpo"]
    comparison = found["comparison"]
    assert comparison["unread"] > 0
    assert (comparison["won"], comparison["lost"]) == (0, 0)
    assert found["metrics"]["win_rate"]["n"] == comparison["tied"]
    warnings = manifests.load(copy / "stages" / "evaluate").warnings
    assert [each for each in warnings if each.startswith(f"dpo: {comparison['unread']} of ")]
