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

from data.ngrams import words
from pipeline import cli, difference
from pipeline import manifest as manifests
from pipeline.store import RunDirectory
from reward.comparison import holm

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
    printed = capsys.readouterr().out
    assert "evaluate: 4 of 4 requirements hold" in printed
    sentence = json.loads((config.parent / "run" / "report.json").read_text())["verdict"]["sentence"]
    assert sentence in printed.splitlines()
    assert "4 of 4 requirements hold" in (config.parent / "run" / "report.html").read_text()


@pytest.mark.slow
def test_two_runs_are_compared_prompt_by_prompt(config: Path, sabotaged: Path) -> None:
    changes = difference.changes(RunDirectory(config.parent / "run"), RunDirectory(sabotaged))
    found = {change.metric: change.by for change in changes if change.stage == "evaluate"}
    for figure in ("gold", "gold_gain", "accuracy", "accuracy_gain", "length", "win_rate.gold"):
        assert found[f"dpo.{figure}"] == difference.PAIRED["prompt"]


@pytest.mark.slow
def test_a_sabotaged_reward_fails_the_gate_by_name_with_what_was_found(
    config: Path, sabotaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert baton("run", config, *sabotage(sabotaged)) == 4
    said = capsys.readouterr()
    metrics = manifests.load(sabotaged / "stages" / "evaluate").metrics
    for model in ("dpo", "ppo"):
        gain = metrics[f"{model}.gold_gain"]
        assert gain.value <= 0
        written = f"{gain.value:.4g} [{gain.low:.4g}, {gain.high:.4g}]"
        expected = f"{GATE}: {model}.gold should be `> parent`, but its difference from the parent's is {written}"
        assert expected in said.err
    assert f"{GATE}: reward" not in said.err  # it learned well what it was given
    assert "nothing to do: every stage is up to date" in said.out


@pytest.mark.slow
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


@pytest.mark.slow
def test_other_stages_alone_meet_no_gate(config: Path, sabotaged: Path) -> None:
    assert baton("run", config, *sabotage(sabotaged), "--only", "dpo") == 0
    assert baton("run", config, *sabotage(sabotaged), "--until", "ppo") == 0
    assert baton("run", config, *sabotage(sabotaged), "--only", "evaluate") == 4


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_figure_that_is_missing_fails_and_says_so(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = "stages.evaluate.require={dpo: {accuracy.sums: '> 0.9'}, sft: {gold: '> parent'}}"
    assert baton("run", config, f"output={copy}", missing) == 4
    said = capsys.readouterr().err
    assert f"{GATE}: dpo.accuracy.sums should be `> 0.9`, but no such figure was measured; did you mean `a" in said
    assert f"{GATE}: sft.gold should be `> parent`, but was not compared with a parent's" in said


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_figure_that_is_never_measured_is_refused_of_an_evaluation_that_is_up_to_date_too(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert baton(command, config, f"output={copy}", "stages.evaluate.require={dpo: {perplexity: '< 9'}}") == 2
    assert f"{GATE}.dpo.perplexity: the stage measures no such figure" in capsys.readouterr().err


def test_comparisons_count_wins_by_each_judge_and_test_them_as_samples_say(config: Path) -> None:
    kept = samples(config.parent / "run")
    assert evaluation(config.parent / "run")["judges"] == {
        "gold": "the rule exact",
        "reward": "the reward model reward",
    }
    for model in ("dpo", "ppo"):
        found = evaluation(config.parent / "run")["models"][model]
        for judge in ("gold", "reward"):
            scores = [each[judge] for each in kept]
            won = sum(each[model] > each["sft"] for each in scores)
            lost = sum(each[model] < each["sft"] for each in scores)
            counts = {"won": won, "tied": len(scores) - won - lost, "lost": lost}
            assert found["comparison"]["judges"][judge] == counts
            assert found["metrics"][f"win_rate.{judge}"]["value"] == pytest.approx(0.5 + (won - lost) / (2 * len(kept)))
            outcomes = [each["outcomes"][judge][model] for each in kept]
            assert [outcomes.count(each) for each in (1.0, 0.5, 0.0)] == list(counts.values())
            test = found["comparison"]["tests"][f"win_rate.{judge}"]
            assert (test["gained"], test["lost"]) == (won, lost)
            assert 0 < test["p"] <= test["adjusted"] < 0.05
            controlled = found["metrics"][f"win_rate_length_controlled.{judge}"]
            assert controlled["low"] <= controlled["value"] <= controlled["high"]
        assert found["comparison"]["needed"] == {}
        test = found["comparison"]["tests"]["accuracy"]
        won = found["comparison"]["judges"]["gold"]["won"]
        assert (test["gained"], test["lost"]) == (won, found["comparison"]["judges"]["gold"]["lost"])


RULES = "{yes: [{rule: pattern, expression: Yes}], short: [{rule: length, words: 1}, {rule: exact, weight: -0.5}]}"
"""Two judges that are rules, the second of which takes off for what the prompts' rows call right."""


@pytest.mark.slow
def test_rules_judge_beside_the_reward_model_where_nothing_is_gold(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = "{dpo: {win_rate.yes: '> 0.5', score.yes: '> parent', win_rate.short: '> 0.5'}}"
    changed = ["stages.evaluate.gold=none", f"stages.evaluate.judges={RULES}", f"{GATE}={gate}"]
    assert baton("run", config, f"output={copy}", *changed) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert f"{GATE}: dpo.win_rate.short should be `> 0.5`, but is " in said
    assert f"{GATE}: dpo.win_rate.yes" not in said
    assert f"{GATE}: dpo.score.yes" not in said
    found, kept = evaluation(copy), samples(copy)
    assert found["judges"] == {
        "reward": "the reward model reward",
        "yes": "the rule pattern",
        "short": "the rules length + -0.5 x exact",
    }
    for model in ("dpo", "ppo"):
        own = found["models"][model]
        for judge, by_hand in (("yes", _says_yes), ("short", _is_short_and_wrong)):
            scores = [{name: by_hand(text) for name, text in each["responses"].items()} for each in kept]
            assert [each["scores"][judge] for each in kept] == scores
            won, lost = (sum(sign * each[model] > sign * each["sft"] for each in scores) for sign in (1, -1))
            assert own["comparison"]["judges"][judge] == {"won": won, "tied": len(kept) - won - lost, "lost": lost}
            rate = own["metrics"][f"win_rate.{judge}"]
            assert rate["value"] == pytest.approx(0.5 + (won - lost) / (2 * len(kept)))
            gain = own["metrics"][f"score.{judge}_gain"]
            assert gain["value"] == pytest.approx(sum(each[model] - each["sft"] for each in scores) / len(kept))
            assert gain["low"] <= gain["value"] <= gain["high"]
            assert f"win_rate_length_controlled.{judge}" in own["metrics"]
    tests = {
        (model, name): each["p"]
        for model in ("dpo", "ppo")
        for name, each in found["models"][model]["comparison"]["tests"].items()
    }
    adjusted = dict(zip(tests, holm(list(tests.values())), strict=True))
    assert len(tests) == 6
    for (model, name), value in adjusted.items():
        assert found["models"][model]["comparison"]["tests"][name]["adjusted"] == value
    text = reports.Elements((copy / "report.html").read_text()).text
    assert "yes is the rule pattern; short is the rules length + -0.5 x exact." in text
    assert "By " not in text.partition("Lineage")[0]  # the verdict is by the reward model


def _says_yes(text: str) -> float:
    return float("Yes" in text)


def _is_short_and_wrong(text: str) -> float:
    count = len(words(text))
    return min(1.0, max(0.0, 2.0 - count)) - 0.5 * (text.strip().casefold().rstrip(".!?,;: ") == "yes")


@pytest.mark.slow
def test_with_rules_alone_the_verdict_is_theirs(config: Path, copy: Path) -> None:
    changed = ["stages.evaluate.gold=none", "stages.evaluate.reward=null", f"stages.evaluate.judges={RULES}"]
    assert baton("run", config, f"output={copy}", *changed, f"{GATE}={{}}") == 0
    verdict = json.loads((copy / "report.json").read_text())["verdict"]
    assert (verdict["state"], verdict["metric"], verdict["parent"]) == ("better", "win_rate.yes", "sft")
    assert verdict["sentence"].startswith(f"By yes, {verdict['stage']} is better than its parent sft: it wins ")


def test_a_prompt_without_the_answer_that_a_judge_needs_is_named(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "unanswered.jsonl"
    reports.write_lines(path, [{"prompt": f"Say {number}?"} for number in range(120)])
    judge = ["stages.evaluate.gold=none", "stages.evaluate.judges={right: [{rule: exact}]}", f"{GATE}={{}}"]
    change = [f"output={copy}", f"data.unanswered={{source: {path}, held_out: 0.5}}"]
    assert baton("run", config, *change, *judge, "stages.evaluate.prompts=unanswered") == 3
    said = " ".join(capsys.readouterr().err.split())
    assert f"{path}:" in said
    assert "the prompt has no `answer`, which the rule `exact` needs" in said


@pytest.mark.parametrize(
    ("judges", "said"),
    [
        ("{gold: [{rule: exact}]}", "judges.gold: that is what the setting `gold` is called: take another name"),
        ("{right: [{rule: exact}]}", "judges.right: gold=exact judges by this rule: leave one of them out"),
        ("{my_judge: [{rule: world}]}", "judges.my_judge: string should match pattern"),
        ("{none: []}", "judges.none: list should have at least 1 item"),
        ("{odd: [{rule: patern}]}", "judges.odd.0: unknown rule `patern`; did you mean `pattern`?"),
        ("{odd: [{rule: length, word: 3}]}", "judges.odd.0.word: unknown setting; did you mean `words`?"),
        ("{odd: 3}", "judges.odd: a judge is a list of rules, as in `[{rule: exact}]`, or a server"),
        ("{odd: {rule: length, words: 3}}", "judges.odd: rules are a list, as in `[{rule: exact}]`"),
        ("{gpt: {url: 'http://localhost', hosts: [localhost], modle: m}}", "unknown setting; did you mean `model`?"),
    ],
)
def test_a_mistake_in_the_judges_is_named(
    config: Path, judges: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert baton("plan", config, f"stages.evaluate.judges={judges}") == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_server_s_verdicts_are_its_win_rate(config: Path, copy: Path) -> None:
    with reward_servers.serving(prefers("Nay.", otherwise="who knows")) as server:
        judge = f"{{url: '{server.url}', hosts: ['127.0.0.1:{server.server_port}'], model: judge-1}}"
        assert baton("run", config, f"output={copy}", f"stages.evaluate.judges={{gpt: {judge}}}", f"{GATE}={{}}") == 0
    found = evaluation(copy)
    assert found["judges"]["gpt"] == "the model judge-1"
    asked = 0
    for model in ("dpo", "ppo"):
        pairs = [(each["responses"][model], each["responses"]["sft"]) for each in samples(copy)]
        preferred = ["same" if a == b else ("Nay." in a) - ("Nay." in b) for a, b in pairs]
        rate, said = found["models"][model]["metrics"]["win_rate.gpt"], found["models"][model]["comparison"]["judges"]
        assert said["gpt"]["won"] == preferred.count(1)
        assert said["gpt"]["lost"] == preferred.count(-1) > 0
        assert said["gpt"]["tied"] == preferred.count("same")
        assert said["gpt"]["unread"] == preferred.count(0)
        assert said.keys() == {"gold", "reward", "gpt"}
        assert rate["high"] < 0.5 < found["models"][model]["metrics"]["win_rate.gold"]["low"]
        asked += 2 * (len(pairs) - preferred.count("same"))
    tried_out = 2
    assert len(server.bodies) == asked + tried_out
    text = reports.Elements((copy / "report.html").read_text()).text
    assert "gpt is the model judge-1" in text


@pytest.mark.parametrize("judge", ["model: judge-1", "rule: server"])
def test_a_judge_that_cannot_be_asked_is_an_error_before_anything_is_answered(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str], judge: str
) -> None:
    with reward_servers.serving(reward_servers.says("none such", status=404)) as server:
        where = f"url: '{server.url}', hosts: ['127.0.0.1:{server.server_port}']"
        chosen = f"{{{judge}, {where}}}" if "model" in judge else f"[{{{judge}, {where}}}]"
        assert baton("run", config, f"output={copy}", f"stages.evaluate.judges={{gpt: {chosen}}}", f"{GATE}={{}}") == 69
    assert f"judges.gpt ({server.url}): it answered 404" in " ".join(capsys.readouterr().err.split())
    assert len(server.bodies) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dpo", "ppo"])
def test_a_judge_that_fails_later_costs_its_own_figures_alone(config: Path, copy: Path, model: str) -> None:
    whole = evaluation(copy)["models"]
    verdict, failure = completion("first"), reward_servers.says("gone", status=410)
    first = sum(each["responses"]["dpo"] != each["responses"]["sft"] for each in samples(copy))
    until = 3 if model == "dpo" else 2 + 2 * first + 1
    answers = [reward_servers.says(verdict)] * until
    with reward_servers.serving(*answers, failure) as server:
        judge = f"{{url: '{server.url}', hosts: ['127.0.0.1:{server.server_port}'], model: m, requests_at_once: 1}}"
        assert baton("run", config, f"output={copy}", f"stages.evaluate.judges={{gpt: {judge}}}", f"{GATE}={{}}") == 0
        asked = len(server.bodies)
    found = evaluation(copy)["models"]
    for name in ("sft", "dpo", "ppo"):
        metrics = dict(found[name]["metrics"])
        by_judge = {each for each in metrics if each.endswith(".gpt")}
        assert bool(by_judge) == (name == "dpo" and model == "ppo")
        assert {each: value for each, value in metrics.items() if each not in by_judge} == whole[name]["metrics"]
    assert asked <= until + 2
    warnings = manifests.load(copy / "stages" / "evaluate").warnings
    said = [each for each in warnings if each.startswith("the judge gpt was given up") and "410" in each]
    assert said
    assert said[0].endswith("`--force evaluate` measures all again")
    assert "the judge gpt was given up" in reports.Elements((copy / "report.html").read_text()).text


@pytest.mark.slow
def test_the_verdict_names_the_models_that_its_judge_did_not_see(config: Path, copy: Path) -> None:
    different = sum(each["responses"]["dpo"] != each["responses"]["sft"] for each in samples(copy))
    answers = [prefers("Yes.", otherwise="tie")] * (2 + 2 * different)
    alone = ["stages.evaluate.gold=none", "stages.evaluate.reward=null", f"{GATE}={{}}"]
    with reward_servers.serving(*answers, reward_servers.says("gone", status=410)) as server:
        judge = f"{{url: '{server.url}', hosts: ['127.0.0.1:{server.server_port}'], model: m, requests_at_once: 1}}"
        assert baton("run", config, f"output={copy}", f"stages.evaluate.judges={{gpt: {judge}}}", *alone) == 0
    verdict = json.loads((copy / "report.json").read_text())["verdict"]
    assert (verdict["stage"], verdict["state"]) == ("dpo", "better")
    assert verdict["caution"] == "gpt has no verdict of ppo."


def test_a_suite_that_leaves_a_model_no_room_is_named_before_any_model_answers(
    config: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports.write_lines(tmp_path / "long.jsonl", [{"prompt": "Never heard?", "answer": "no"}])
    (tmp_path / "long.yaml").write_text(
        "kind: suite\nmeasures: All.\nsource: long.jsonl\nmethod: generation\ngold: exact\nmax_new_tokens: 128\n"
    )
    suites = f"stages.evaluate.suites=[{tmp_path / 'long.yaml'}]"
    with reward_servers.serving(reward_servers.lengths) as server:
        rule = f"[{{rule: server, url: '{server.url}', hosts: ['127.0.0.1:{server.server_port}']}}]"
        judges = f"stages.evaluate.judges={{by: {rule}}}"
        assert baton("run", config, f"output={copy}", suites, judges, f"{GATE}={{}}") == 2
        assert not server.bodies
    said = " ".join(capsys.readouterr().err.split())
    assert "stages.evaluate.suites.long.max_new_tokens: sft has 128 positions, which leaves no room" in said


def suite_by_server(root: Path, server: reward_servers.Scripted) -> str:
    """An override that adds a suite which a reward server judges."""
    reports.write_lines(root / "served.jsonl", [{"prompt": f"Never heard {number}?"} for number in range(6)])
    rule = {"rule": "server", "url": server.url, "hosts": [f"127.0.0.1:{server.server_port}"]}
    (root / "served.yaml").write_text(
        f"kind: suite\nmeasures: Length.\nsource: served.jsonl\nmethod: generation\nrules: {json.dumps([rule])}\n"
    )
    return f"stages.evaluate.suites=[{root / 'served.yaml'}]"


@pytest.mark.slow
def test_a_server_of_a_suite_that_fails_later_costs_its_own_figures_alone(
    config: Path, copy: Path, tmp_path: Path
) -> None:
    with reward_servers.serving(*[reward_servers.lengths] * 2, reward_servers.says("gone", status=410)) as server:
        suite = suite_by_server(tmp_path, server)
        assert baton("run", config, f"output={copy}", suite, f"{GATE}={{}}") == 0
        assert len(server.bodies) == 3
    found, whole = evaluation(copy)["models"], evaluation(config.parent / "run")["models"]
    assert [name for name, model in found.items() if "suite.served" in model["metrics"]] == ["sft"]
    assert found["ppo"]["metrics"] == whole["ppo"]["metrics"]
    warnings = manifests.load(copy / "stages" / "evaluate").warnings
    assert [each for each in warnings if each.startswith("the suite served was given up") and "410" in each]


def test_a_server_of_a_suite_that_cannot_be_asked_is_an_error_that_names_the_suite(
    config: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reward_servers.serving(reward_servers.says("gone", status=410)) as server:
        assert baton("run", config, f"output={copy}", suite_by_server(tmp_path, server), f"{GATE}={{}}") == 69
    assert f"suites.served ({server.url}): it answered 410" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_prompts_that_are_cut_are_warned_of(config: Path, copy: Path) -> None:
    narrow = ["stages.evaluate.max_length=14", "stages.evaluate.max_new_tokens=8"]
    assert baton("run", config, f"output={copy}", *narrow, f"{GATE}={{}}") == 0
    warnings = manifests.load(copy / "stages" / "evaluate").warnings
    cut = [each for each in warnings if "prompts of the held-out rows lost their beginning" in each]
    assert len(cut) == 3


@pytest.mark.slow
def test_a_reward_model_of_another_run_is_known_by_its_stage(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(config.parent / "run" / "stages", tmp_path / "elsewhere" / "stages")
    elsewhere = tmp_path / "elsewhere" / "stages" / "reward"
    copied = Path(shutil.copytree(config.parent / "run", tmp_path / "copy"))
    gate, again = f"{GATE}={{reward: {{pair_accuracy: '> 0'}}}}", "stages.evaluate.rows=20"
    assert baton("run", config, f"output={copied}", f"stages.evaluate.reward={elsewhere}", gate, again) == 0
    assert "pair_accuracy" in evaluation(copied)["models"]["reward"]["metrics"]
    shutil.rmtree(elsewhere.with_name("ppo"))
    changed = f"stages.evaluate.reward={elsewhere.rename(elsewhere.with_name('ppo'))}"
    capsys.readouterr()
    assert baton("run", config, f"output={copied}", changed, f"{GATE}={{}}", "stages.evaluate.rows=21") == 2
    assert "would both be called `ppo`" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_verdicts_that_cannot_be_read_are_counted_and_warned_of(config: Path, copy: Path) -> None:
    with reward_servers.serving(reward_servers.says(completion("I cannot say."))) as server:
        judge = f"{{url: '{server.url}', hosts: ['127.0.0.1:{server.server_port}'], model: judge-1}}"
        assert baton("run", config, f"output={copy}", f"stages.evaluate.judges={{gpt: {judge}}}", f"{GATE}={{}}") == 0
    found = evaluation(copy)["models"]["dpo"]
    said = found["comparison"]["judges"]["gpt"]
    assert said["unread"] > 0
    assert (said["won"], said["lost"]) == (0, 0)
    assert found["metrics"]["win_rate.gpt"]["n"] == said["tied"]
    assert [each["outcomes"]["gpt"]["dpo"] for each in samples(copy)].count(None) == said["unread"]
    warnings = manifests.load(copy / "stages" / "evaluate").warnings
    expected = f"dpo: {said['unread']} of {len(samples(copy))} comparisons with its parent got no verdict of gpt that "
    assert [each for each in warnings if each.startswith(expected)]
