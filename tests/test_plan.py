"""What runs and why: every reason, early cut-off, and a key that changes exactly when there is a reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest

from pipeline import fingerprint, loader, runner
from pipeline.contract import Context, Result
from pipeline.errors import ArtifactError, ConfigError, DataError
from pipeline.plan import Cause, Decision, Reason, changes, plan
from pipeline.store import RunDirectory
from pipeline.terminal import console

Run = Callable[..., list[runner.Outcome]]


@pytest.fixture
def run(config: Path, fake_stages: None) -> Run:
    def call(*overrides: str, **options: Any) -> list[runner.Outcome]:
        return runner.run(loader.load(config, overrides), console=console(stderr=True), **options)

    return call


def planned(config: Path, *overrides: str, **options: Any) -> dict[str, Decision]:
    return {each.stage: each for each in plan(loader.load(config, overrides), **options)}


def running(decisions: dict[str, Decision]) -> list[str]:
    return [name for name, decision in decisions.items() if decision.run]


def said(decision: Decision) -> list[str]:
    return [str(reason) for reason in decision.reasons]


def test_stages_come_after_their_inputs_whatever_their_order_in_the_file(config: Path) -> None:
    settings = loader.load(config)
    backwards = settings.model_copy(update={"stages": dict(reversed(settings.stages.items()))})
    order = [decision.stage for decision in plan(backwards)]
    assert sorted(order) == sorted(fakes.STAGES)
    for name in order:
        assert all(order.index(parent) < order.index(name) for parent in settings.stages[name].roles().values())


def test_what_never_ran_runs(config: Path) -> None:
    decisions = planned(config)
    assert running(decisions) == fakes.STAGES
    assert said(decisions["tok"]) == ["never ran"]


def test_after_a_run_nothing_runs(config: Path, run: Run) -> None:
    run()
    decisions = planned(config)
    assert running(decisions) == []
    assert all(decision.reasons == () for decision in decisions.values())


def test_a_changed_setting_is_named_and_children_wait(config: Path, run: Run) -> None:
    run()
    decisions = planned(config, "stages.sft.optimizer.learning_rate=2e-5", "stages.sft.lora=null")
    assert running(decisions) == ["sft", "rm", "dpo"]
    assert said(decisions["sft"])[-1] == "config optimizer.learning_rate: 0.0001 -> 2e-05"
    assert "config lora: absent -> null" in said(decisions["sft"])
    assert said(decisions["dpo"]) == ["parent will run: sft"]


@pytest.mark.parametrize("override", ["seed=2", "dtype=float32"])
def test_settings_of_the_run_are_settings_of_its_stages(config: Path, run: Run, override: str) -> None:
    run()
    assert running(planned(config, override)) == fakes.STAGES


@pytest.mark.parametrize(
    "override", ["stages.sft.tokens_per_batch=1", "stages.sft.gradient_checkpointing=true", "device=cpu"]
)
def test_how_it_is_computed_is_no_reason(config: Path, run: Run, override: str) -> None:
    run()
    assert running(planned(config, override)) == []


def test_stages_trained_with_a_fixed_batch_stay_valid_with_auto(config: Path, run: Run) -> None:
    run(*[f"stages.{name}.tokens_per_batch=8192" for name in fakes.STAGES if name != "tok"])
    for overrides in ([], ["memory=8GB"], ["stages.dpo.tokens_per_batch=auto"]):
        assert running(planned(config, *overrides)) == []


def test_changed_data_is_named_by_role(config: Path, run: Run, tmp_path: Path) -> None:
    run()
    with (tmp_path / "pairs.jsonl").open("a") as stream:
        stream.write('{"prompt": "Another?", "chosen": "Yes.", "rejected": "No."}\n')
    decisions = planned(config, "data.pairs.rows=5")
    assert running(decisions) == ["rm", "dpo"]
    assert said(decisions["rm"])[0].startswith("data data.digest: ")
    assert said(decisions["rm"])[1] == "data data.rows: null -> 5"


def test_data_that_only_moved_is_the_same_data(config: Path, run: Run, tmp_path: Path) -> None:
    run()
    (tmp_path / "pairs.jsonl").rename(tmp_path / "moved.jsonl")
    assert running(planned(config, f"data.pairs.source={tmp_path}/moved.jsonl")) == []


def test_an_input_of_other_content_is_named_with_both_digests(config: Path, run: Run) -> None:
    run()
    run("stages.sft.epochs=2", only=["sft"])
    decision = planned(config, "stages.sft.epochs=2")["dpo"]
    (reason,) = decision.reasons
    assert reason.cause is Cause.INPUT
    assert reason.subject == "policy"
    assert len(reason.old) == len(reason.new) == 64
    assert reason.old != reason.new
    assert str(reason) == f"input policy: {reason.old[:8]} -> {reason.new[:8]}"


def test_damage_is_named_and_makes_the_stage_run(config: Path, run: Run) -> None:
    run()
    directory = RunDirectory.of(loader.load(config)).stage("dpo")
    (directory / "nested" / "weights.safetensors").unlink()
    decision = planned(config)["dpo"]
    assert decision.damaged
    assert said(decision) == ["output damaged: nested/weights.safetensors: missing, expected 64 bytes"]
    (directory / "manifest.json").write_text("{")
    assert said(planned(config)["dpo"])[0].startswith("output damaged: manifest.json: the manifest is not JSON")


def test_code_and_environment_are_warnings_unless_strict(
    config: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    now = fingerprint.environment()
    monkeypatch.setattr(fingerprint, "sources", lambda kind: "0" * 64)
    monkeypatch.setattr(fingerprint, "environment", lambda: now | {"libraries": now["libraries"] | {"torch": "0.4"}})
    decision = planned(config)["dpo"]
    assert not decision.run
    causes = [reason.cause for reason in decision.reasons]
    assert causes == [Cause.CODE, Cause.ENVIRONMENT]
    assert said(decision)[1] == f"environment libraries.torch: {now['libraries']['torch']} -> 0.4"
    assert running(planned(config, strict=True)) == fakes.STAGES


@pytest.mark.parametrize(
    ("module", "made_by_other_code"),
    [("data/read.py", ["tok", "base", "sft", "rm"]), ("reward/never_imported.py", ["tok", "base"])],
)
def test_a_module_that_is_edited_while_a_stage_trains_is_what_it_was_when_it_was_imported(
    module: str, made_by_other_code: list[str], config: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "code" / module
    path.parent.mkdir(parents=True)
    path.write_text("x = 1\n")
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path / "code")
    train = fakes.run_stage

    def edited(context: Context) -> Result:
        path.write_text("x = 2\n")
        return train(context)

    monkeypatch.setattr(sys.modules["stages.sft"], "run", edited)
    run(until="rm")
    fingerprint._hashed.clear()  # the next command is another process
    decisions = planned(config, until="rm")
    assert [name for name, each in decisions.items() if each.reasons] == made_by_other_code
    assert {reason.cause for each in decisions.values() for reason in each.reasons} == {Cause.CODE}


def test_forcing_only_until(config: Path, run: Run) -> None:
    run()
    assert running(planned(config, force=["rm"])) == ["rm"]
    assert said(planned(config, force=["rm"])["rm"]) == ["forced"]
    assert list(planned(config, only=["rm", "dpo"])) == ["rm", "dpo"]
    assert list(planned(config, until="rm")) == ["tok", "base", "sft", "rm"]


@pytest.mark.parametrize("options", [{"only": ["ppo"]}, {"until": "ppo"}, {"force": ["ppo"]}])
def test_unknown_stage_names_are_refused(config: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no stage `ppo`; did you mean `dpo`"):
        planned(config, **options)


def test_only_needs_published_inputs(config: Path) -> None:
    with pytest.raises(ConfigError, match="stage `sft` has not been published"):
        planned(config, only=["dpo"])


def test_missing_and_unfit_data_is_found_before_anything_runs(config: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        planned(config, f"data.pairs.source={tmp_path}/gone.jsonl")
    with pytest.raises(DataError, match=r"text\.jsonl"):
        planned(config, "stages.dpo.data=text")


def test_a_damaged_input_from_elsewhere_stops_planning(config: Path, run: Run, tmp_path: Path) -> None:
    run()
    elsewhere = tmp_path / "run" / "stages" / "sft"
    (elsewhere / "nested" / "weights.safetensors").write_text("1" * 64)
    with pytest.raises(ArtifactError, match="damaged"):
        planned(config, f"stages.dpo.policy={elsewhere}", only=["dpo"])


def test_a_model_of_the_hub_that_is_not_here_yet_is_a_reason(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    decision = planned(config, "stages.dpo.policy=hub:owner/name@main")["dpo"]
    assert said(decision) == ["never ran"]
    assert decision.wanted.unknown["policy"] == Reason(
        Cause.INPUT, "policy", "hub:owner/name@main", "not downloaded yet"
    )


@pytest.mark.parametrize(
    "override",
    [
        "seed=3",
        "stages.dpo.beta=0.2",
        "stages.dpo.lora.rank=8",
        "stages.dpo.optimizer.betas=[0.9, 0.99]",
        "data.pairs.rows=4",
        "data.pairs.source={pairs}",
        "stages.dpo.tokens_per_batch=7",
        "device=cpu",
        "stages.dpo.policy={sft}",
        "stages.dpo.policy=base",
    ],
)
def test_the_key_changes_exactly_when_there_is_a_reason(config: Path, run: Run, tmp_path: Path, override: str) -> None:
    run()
    override = override.format(pairs=tmp_path / "./pairs.jsonl", sft=tmp_path / "run/stages/sft")
    old = planned(config)["dpo"]
    new = planned(config, override, only=["dpo"])["dpo"]
    assert (old.wanted.key != new.wanted.key) == bool(new.reasons)


def test_changes_are_symmetric_and_complete() -> None:
    old = {"a": {"b": 1, "c": {}}, "d": [1, 2], "e": "x"}
    new = {"a": {"b": 1.5, "c": {"f": None}}, "d": [2, 1], "g": True}
    found = list(changes(old, new))
    assert found == [
        ("a.b", "1", "1.5"),
        ("a.c", "{}", "absent"),
        ("a.c.f", "absent", "null"),
        ("d", "[1,2]", "[2,1]"),
        ("e", "x", "absent"),
        ("g", "absent", "true"),
    ]
    assert [(name, after, before) for name, before, after in found] == list(changes(new, old))
    assert list(changes(old, old)) == []


MIXED = "stages.sft.data={chats: {epochs: 1}, pairs: {epochs: 0.5}}"


def test_a_changed_share_of_a_mixture_is_a_reason(config: Path, run: Run) -> None:
    run(MIXED)
    assert running(planned(config, MIXED)) == []
    decisions = planned(config, "stages.sft.data={chats: {epochs: 1}, pairs: {epochs: 2}}")
    assert said(decisions["sft"]) == ["data data.pairs.share.epochs: 0.5 -> 2.0"]


def test_the_content_of_a_chat_template_is_a_reason_and_its_name_is_not(config: Path, run: Run, tmp_path: Path) -> None:
    template, other = tmp_path / "chat.jinja", tmp_path / "other.jinja"
    template.write_text("{{ messages }}")
    other.write_text("{{ messages }}")
    run(f"stages.sft.chat_template={template}")
    assert running(planned(config, f"stages.sft.chat_template={other}")) == []
    other.write_text("{{ messages[0] }}")
    (reason,) = said(planned(config, f"stages.sft.chat_template={other}")["sft"])
    assert reason.startswith("config chat_template_sha256: ")
    with pytest.raises(ConfigError, match=r"missing\.jinja: cannot be read: No such file"):
        planned(config, f"stages.sft.chat_template={tmp_path}/missing.jinja")


def test_what_a_source_is_cleaned_against_is_part_of_its_content(config: Path, run: Run) -> None:
    cleaned = "data.text.prepare={decontaminate: [pairs]}"
    run(cleaned)
    assert running(planned(config, cleaned)) == []
    pairs = config.parent / "pairs.jsonl"
    pairs.write_text(pairs.read_text() + '{"prompt": "Another?", "chosen": "Yes.", "rejected": "No."}\n')
    assert said(planned(config, cleaned)["tok"])[0].startswith("data data.digest: ")
