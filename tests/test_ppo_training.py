"""Whole trainings on a tiny model: what is rewarded becomes likelier, the best policy is handed on, nothing drifts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import rl
import torch

from data import read
from data.split import is_held_out
from pipeline.config import DataSource, OnlineDpoSettings, PpoSettings, RejectionSettings
from pipeline.contract import Artifact, Context, Result
from pipeline.diagnostics import DIAGNOSTICS, is_round
from pipeline.errors import DataError, NumericalError
from stages import online_dpo, ppo, rejection
from stages.core.rl import trunk
from stages.core.rl.experience import Collector, Experience, estimate, score
from stages.core.rl.prompts import read_prompts
from stages.core.rl.rewards import Scale
from stages.core.rl.sampling import Sampler
from stages.core.rl.updates import Losses
from stages.core.roles import POLICY, REFERENCE, VALUE
from stages.core.scoring import record_probes

LETTER = [{"rule": "pattern", "expression": "[aeiou]"}]
STAGES: dict[str, tuple[Any, Any]] = {
    "ppo": (ppo, PpoSettings),
    "rejection": (rejection, RejectionSettings),
    "online_dpo": (online_dpo, OnlineDpoSettings),
}


@pytest.fixture
def policy(tmp_path: Path) -> Artifact:
    """A stored model with its probes."""
    made = models.save_base(tmp_path / "policy")
    roles = models.roles(POLICY)
    with roles.use(REFERENCE):
        record_probes(made.directory, models.responses(4), roles.base)
    return made


def train(
    policy: Artifact, kind: str = "ppo", seed: int = 0, **changes: object
) -> tuple[Result, list[dict[str, float]]]:
    """A stage on prompts of the embedded world, with a reward for vowels."""
    records: list[dict[str, float]] = []

    def progress(record: Mapping[str, Any], *, done: int, total: int) -> None:
        records.append({**record, "done": done, "total": total})

    return STAGES[kind][0].run(context_of(policy, kind, seed, changes, progress)), records


def context_of(policy: Artifact, kind: str, seed: int, changes: Mapping[str, Any], progress: Any = None) -> Context:
    """What the runner gives a stage."""
    held_out = changes.get("held_out", 0.2)
    changes = {name: value for name, value in changes.items() if name != "held_out"}
    options = {
        "policy": "p", "data": "d", "rules": LETTER, "max_new_tokens": 5, "missing_eos_penalty": 0.0, "steps": 2,
        "examples_per_step": 8, "samples_per_prompt": 2, "evaluate_rows": 8, "evaluate_samples": 2,
        "lora": models.LORA.model_dump(), "optimizer": {"learning_rate": 0.01, "warmup": 0.0},
    }  # fmt: skip
    if kind == "ppo" and changes.get("advantage", "gae") == "gae":
        options["value_learning_rate"] = 0.01
    directory = policy.directory.parent / f"out-{len(list(policy.directory.parent.iterdir()))}"
    directory.mkdir()
    source = DataSource(source="world:prompts", rows=40, held_out=held_out)
    chosen, inputs = STAGES[kind][1].model_validate({**options, **changes}), {"policy": policy}
    return Context(
        kind, chosen, inputs, {"data": source}, directory, progress, said.append, seed, device="cpu", dtype="float32"
    )


said: list[str] = []


@pytest.mark.parametrize(("kind", "changes"), [
    ("ppo", {"advantage": "rloo", "samples_per_prompt": 4, "examples_per_step": 32, "steps": 15}),
    pytest.param(
        "ppo", {"advantage": "grpo", "samples_per_prompt": 4, "kl_in": "loss", "kl_estimator": "k3"},
        marks=pytest.mark.slow,
    ),
    pytest.param("ppo", {"advantage": "gae", "update_epochs": 2}, marks=pytest.mark.slow),
    pytest.param("ppo", {"advantage": "gae", "value": "head"}, marks=pytest.mark.slow),
    pytest.param("rejection", {"samples_per_prompt": 8}, marks=pytest.mark.slow),
    pytest.param("online_dpo", {"samples_per_prompt": 4}, marks=pytest.mark.slow),
])  # fmt: skip
def test_what_is_rewarded_becomes_likelier(policy: Artifact, kind: str, changes: dict[str, object]) -> None:
    settings = {"steps": 20, "examples_per_step": 64, "optimizer": {"learning_rate": 0.02, "warmup": 0.0}, **changes}
    result, records = train(policy, kind, evaluate_every=20, evaluate_samples=32, **settings)
    gain = result.metrics["held_out_gain"]
    assert gain.value > 0.04
    assert gain.low is not None
    assert gain.low > 0
    assert result.metrics["chosen_round"].value >= settings["steps"] / 2
    assert all(math.isfinite(value) for each in records for value in each.values())


@pytest.mark.parametrize(("kind", "changes", "absent"), [
    ("ppo", {"advantage": "gae", "update_epochs": 2}, ("no_advantage",)),
    ("ppo", {"advantage": "rloo"}, ("value_", "explained_variance")),
    ("rejection", {"samples_per_prompt": 4}, ("value_", "explained_variance", "advantage", "ratio",
                                              "approximate_kl", "clip_fraction")),
])  # fmt: skip
def test_every_diagnostic_is_one_that_rounds_log(
    policy: Artifact, kind: str, changes: dict[str, object], absent: tuple[str, ...]
) -> None:
    _, records = train(policy, kind, steps=2, evaluate_every=1, **changes)
    expected = {each.name for each in DIAGNOSTICS if not each.name.startswith(absent)}
    assert all(is_round(each) for each in records)
    assert expected == set().union(*records) & {each.name for each in DIAGNOSTICS}


def test_what_a_round_logs_is_a_diagnostic_or_counts_or_belongs_to_a_loss(policy: Artifact) -> None:
    _, records = train(policy, advantage="gae", update_epochs=2, evaluate_every=1)
    others = {"updates", "tokens", "kl_coefficient", "ratio", "policy_loss", "value_loss", "learning_rate"}
    assert set().union(*records) - {each.name for each in DIAGNOSTICS} == others | {"done", "total"}


def test_the_policy_that_did_best_is_the_one_that_is_stored(policy: Artifact) -> None:
    # So large a step ruins the policy, and the one before any step is better.
    result, records = train(
        policy, advantage="rloo", steps=6, evaluate_every=2, rules=[{"rule": "length", "words": 1}, *LETTER],
        optimizer={"learning_rate": 3.0, "warmup": 0.0}, kl_coefficient=0.0,
    )  # fmt: skip
    looks = json.loads((policy.directory.parent / "out-1" / "looks.json").read_text())
    assert {0, 2, 4, 6} <= {look["round"] for look in looks}
    best = max(looks, key=lambda look: look["score"])
    assert result.metrics["chosen_round"].value == best["round"]
    assert result.metrics["held_out"].value == pytest.approx(best["score"])
    assert records[1]["held_out"] == next(look["score"] for look in looks if look["round"] == 2)


@pytest.mark.slow
def test_a_policy_that_goes_far_is_looked_at_earlier(policy: Artifact) -> None:
    _, records = train(
        policy, advantage="rloo", steps=30, examples_per_step=16, evaluate_every=30, kl_coefficient=0.0,
        optimizer={"learning_rate": 0.1, "warmup": 0.0},
    )  # fmt: skip
    looks = json.loads((policy.directory.parent / "out-1" / "looks.json").read_text())
    rounds = [look["round"] for look in looks]
    assert len(rounds) > 2
    assert [number for number, record in enumerate(records, 1) if "held_out" in record] == rounds[1:]
    seen = iter([*looks[1:], looks[-1]])
    last, following = 0.0, next(seen)
    for number, record in enumerate(records, 1):
        is_far = record["kl"] > last + 1.0
        assert (number == following["round"]) == (is_far or number == 30)
        if number == following["round"]:
            last, following = record["kl"], next(seen)


def test_a_gold_rule_that_is_never_met_leaves_the_start_and_says_so(policy: Artifact) -> None:
    said.clear()
    result, _ = train(policy, advantage="rloo", steps=2, evaluate_every=1, gold="exact")
    assert result.metrics["chosen_round"].value == 0
    (warning,) = [each for each in result.warnings if "the stage began with" in each]
    assert f"warning: {warning}" in said


def test_the_tokens_that_count_are_those_of_rounds_and_looks(policy: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, collect = [], Collector.collect

    def counted(collector: Collector, *arguments: Any) -> list[Experience]:
        found = collect(collector, *arguments)
        computed.append(sum(each.batch.token_count for each in found))
        return found

    monkeypatch.setattr(Collector, "collect", counted)
    result, records = train(policy, advantage="rloo", steps=2, evaluate_every=1)
    assert len(computed) == 5
    # The first look follows the first sampling, which the scale of the rewards is taken from.
    rounds, looks = [computed[0], computed[3]], [computed[1], computed[2], computed[4]]
    # Policy and reference read every response, and the policy twice more: to learn from it, and to see what it learnt.
    assert [each["tokens"] for each in records] == [4 * each for each in rounds]
    assert result.tokens == 4 * sum(rounds) + 2 * sum(looks)


def test_every_round_samples_otherwise_and_the_same_seed_trains_the_same(policy: Artifact) -> None:
    _, first = train(policy, advantage="rloo", steps=3)
    _, again = train(policy, advantage="rloo", steps=3)
    _, other = train(policy, advantage="rloo", steps=3, seed=1)
    assert first == again
    assert first != other
    assert len({each["entropy"] for each in first}) == 3


def test_an_alarm_ends_the_training_where_the_settings_say_so(policy: Artifact) -> None:
    said.clear()
    changes = {
        "advantage": "grpo",
        "kl_coefficient": 0.0,
        "optimizer": {"learning_rate": 1.0, "warmup": 0.0},
        "steps": 8,
        "update_epochs": 3,
    }
    result, records = train(policy, **changes, stop_on=["ratio_explosion"])
    assert len(records) < 8
    assert any("ratio explosion" in line and "training ends here" in line for line in result.warnings)
    assert result.warnings[-1] in said
    _, whole = train(policy, **changes)
    assert len(whole) == 8


def test_the_preflight_is_told_line_by_line_and_stops_a_reward_that_tells_nothing_apart(policy: Artifact) -> None:
    said.clear()
    with pytest.raises(NumericalError, match="spread of the rewards"):
        train(policy, advantage="rloo", examples_per_step=16, rules=[{"rule": "length", "words": 1000}])
    assert [line for line in said if line.startswith("preflight ok: probability ratio")]
    assert [line for line in said if line.startswith("preflight FAILED: spread")]
    assert not list((policy.directory.parent / "out-1").glob("*.safetensors"))


def test_what_is_handed_on_is_measured_by_the_gold_rule_and_the_reward(policy: Artifact) -> None:
    result, _ = train(policy, advantage="rloo", gold="world", steps=1)
    looks = json.loads((policy.directory.parent / "out-1" / "looks.json").read_text())
    best = max(looks, key=lambda look: look["score"])
    for metric, figure in (("held_out", "score"), ("held_out_reward", "reward"), ("held_out_kl", "kl")):
        assert result.metrics[metric].value == pytest.approx(best[figure])


def test_an_alarm_that_ends_the_training_has_the_policy_looked_at_first(policy: Artifact) -> None:
    _, records = train(
        policy, advantage="rloo", kl_coefficient=0.0, optimizer={"learning_rate": 1.0, "warmup": 0.0}, steps=20,
        update_epochs=4, stop_on=["ratio_explosion"], evaluate_every=100,
    )  # fmt: skip
    assert len(records) < 20
    assert "held_out" in records[-1]
    looks = json.loads((policy.directory.parent / "out-1" / "looks.json").read_text())
    assert looks[-1]["round"] == len(records)


@pytest.mark.parametrize(("cut", "layers", "told"), [(True, None, 0), (True, 1, 0), (False, 1, 1), (False, 2, 0)])
def test_top_layers_that_save_nothing_are_told(
    policy: Artifact, monkeypatch: pytest.MonkeyPatch, cut: bool, layers: int | None, told: int
) -> None:
    monkeypatch.setattr(trunk, "_can_be_cut", lambda model: cut)
    lora = models.LORA.model_dump() | {"top_layers": layers}
    result, _ = train(policy, advantage="rloo", steps=1, lora=lora)
    assert sum("lora.top_layers=1 saves nothing" in line for line in result.warnings) == told


def test_a_training_without_held_out_prompts_says_so(policy: Artifact) -> None:
    result, _ = train(policy, advantage="rloo", steps=1, held_out=0.0)
    assert "no prompt is held out: the policy is chosen by its score on training prompts" in result.warnings


def test_a_prompt_that_is_cut_to_a_training_prompts_tokens_is_not_held_out(policy: Artifact) -> None:
    context = context_of(policy, "ppo", 0, {"advantage": "rloo", "max_length": 15})
    found = read_prompts(context, models.language_model())
    trained = {each.tokens for each in found.passes.pass_(0)}
    assert found.held_out
    assert not trained & {each.tokens for each in found.held_out}


@pytest.mark.parametrize("how", [{"rules": [{"rule": "numeric"}]}, {"gold": "numeric"}])
def test_an_answer_that_is_of_no_use_is_found_before_anything_is_sampled(
    policy: Artifact, tmp_path: Path, how: dict[str, Any]
) -> None:
    rows = [{"prompt": f"How much is {number} plus 1?", "answer": str(number + 1)} for number in range(60)]
    (tmp_path / "sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = DataSource(source=str(tmp_path / "sums.jsonl"), held_out=0.2)
    given = context_of(policy, "ppo", 0, {"advantage": "rloo", "reward_normalisation": "none", **how})
    held_out = [is_held_out(row, 0.2) for row in read.prompts(source)]
    at_fault = max(place for place, held in enumerate(held_out) if held == ("gold" in how))
    rows[at_fault]["answer"] = "none"
    (tmp_path / "sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    said.clear()
    with pytest.raises(DataError, match="the prompt's `answer` holds no number") as caught:
        ppo.run(dataclasses.replace(given, data={"data": source}))
    assert caught.value.where == f"{tmp_path}/sums.jsonl:{at_fault + 1}"
    assert not [line for line in said if "preflight" in line]


def test_the_tokens_that_were_sampled_are_those_that_are_scored_and_trained_on() -> None:
    roles, chosen = rl.four_roles(), rl.settings(samples_per_prompt=2)
    rollout = Sampler(roles, chosen).rollout(rl.prompts(), 0)
    for each in rl.collected(roles, rollout, chosen):
        places = iter(each.batch.targets.split(each.counts))
        for place in rollout.of(each.batch):
            assert tuple(next(places).tolist()) == rollout.samples[place].tokens


def test_the_stop_token_is_learnt() -> None:
    roles, chosen = rl.four_roles(), rl.settings()
    stop = roles.base.template.stop_id
    trees = [dataclasses.replace(tree, number=number) for number, tree in enumerate(models.responses(2))]
    ending = [dataclasses.replace(tree, branches=(type(tree.branches[0]).of((stop,)),)) for tree in trees]
    group = rl.collected(roles, rl.given(ending), chosen)
    for each in group:
        each.advantages = torch.ones_like(each.advantages)
    for part in rl.losses(roles, chosen).policy(group, 0.0):
        part.loss.backward()
    assert any(each.grad.any() for _, each in roles.parameters(POLICY))


def test_the_same_forward_twice_gives_the_same_bits() -> None:
    roles, chosen = rl.disturbed(), rl.settings()
    rollout = rl.given(models.responses(6))
    first, again = (rl.collected(roles, rollout, chosen) for _ in range(2))
    for name in ("logprobs", "reference", "values", "rewards"):
        assert torch.equal(rl.joined(first, name), rl.joined(again, name))


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_responses_of_one_token_give_finite_figures(advantage: str) -> None:
    roles, chosen = rl.disturbed(), rl.settings(advantage=advantage, samples_per_prompt=2, kl_coefficient=0.0)
    trees = [
        dataclasses.replace(tree, branches=(type(tree.branches[0]).of((5 + number,)),) * 2)
        for number, tree in enumerate(models.responses(3))
    ]
    group = rl.collected(roles, rl.given(trees), chosen)
    assert torch.isfinite(rl.joined(group, "advantages")).all()
    parts = list(rl.losses(roles, chosen).policy(group, 0.05))
    assert all(torch.isfinite(part.loss) for part in parts)


def test_with_a_constant_reward_and_perfect_values_there_is_nothing_to_learn() -> None:
    roles, chosen = rl.four_roles(), rl.settings(kl_coefficient=0.0)
    rollout = rl.given(models.responses(6))
    group = rl.collected(roles, rollout, chosen)
    for each in group:
        each.rewards, each.values = torch.full_like(each.rewards, 0.7), torch.full_like(each.values, 0.7)
    score(group, chosen, Scale())
    estimate(group, chosen, 0.0)
    assert rl.joined(group, "advantages").abs().max() < 1e-2
    assert (rl.joined(group, "returns") - 0.7).abs().max() < 1e-6


def test_on_one_token_the_gradient_is_that_of_the_expected_reward() -> None:
    """A bandit: over all tokens, weighted by their chance, the update's gradient is the exact policy gradient."""
    roles = models.roles(POLICY)
    models.disturb(roles, POLICY)
    worth = torch.randn(len(models.tokenizer()), generator=torch.Generator().manual_seed(0))
    with roles.use(POLICY):
        chances = roles.base.model(torch.tensor([[7, 8]])).logits[0, -1].softmax(-1)
        exact = torch.autograd.grad(-(chances * worth).sum(), [each for _, each in roles.parameters(POLICY)])
    chosen = rl.settings(reward=None, rules=LETTER, advantage="rloo", samples_per_prompt=2, examples_per_step=2)
    tree = models.responses(1)[0]
    every = dataclasses.replace(
        tree,
        prompt=(7, 8),
        number=0,
        branches=tuple(type(tree.branches[0]).of((token,)) for token in range(len(worth))),
    )
    (group,) = rl.collector(roles, chosen).collect(rl.given([every]), [every], [0.0] * len(worth))
    group.advantages = worth * chances.detach() * len(worth)
    for part in Losses(roles, chosen, rl.losses(roles, chosen)._trunk).policy([group], 0.0):
        part.loss.backward()
    for (name, parameter), expected in zip(roles.parameters(POLICY), exact, strict=True):
        assert torch.allclose(parameter.grad, expected, atol=1e-5), name


def test_a_role_switched_between_forward_and_backward_is_refused() -> None:
    roles, chosen = rl.disturbed(), rl.settings()
    group = rl.sampled(roles, chosen)
    (part, *_) = rl.losses(roles, chosen).policy(group, 0.0)
    with roles.use(VALUE), pytest.raises(RuntimeError, match="was policy's, the backward pass runs as value"):
        part.loss.backward()
