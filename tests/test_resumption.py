"""Stages that are stopped and go on: what they publish and log is what they would have without the stop."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny
import torch
from conftest import REPOSITORY, reseal
from rich.console import Console

from pipeline import checkpoints, cli, loader, runner
from pipeline import manifest as manifests
from pipeline.errors import ServerError
from pipeline.progress import StageProgress
from pipeline.store import RunDirectory
from stages.core import checkpoint
from stages.core.rl.rewards import Rewards
from stages.core.rl.sampling import Rollout

pytestmark = [pytest.mark.chain, pytest.mark.usefixtures("report_of_one_line")]
# Threads cost more than they gain on matrices this small.
torch.set_num_threads(1)

RUN = (
    tiny.ONE_STAGE
    + """\
  rankings: {{source: "{root}/rankings.jsonl", held_out: 0.2}}
stages: {{stage: {stage}}}
"""
)
STAGES = {
    "pretrain": """{{kind: pretrain, tokenizer: {root}/made/stages/tokenizer, data: corpus, max_length: 32, steps: 6,
      examples_per_step: 16, optimizer: {{name: muon, learning_rate: 0.01}},
      architecture: {{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, n_positions: 256, resid_pdrop: 0.2}}}}""",
    "sft": """{{kind: sft, policy: {root}/made/stages/base, data: demonstrations, steps: 6, examples_per_step: 8,
      lora: {{rank: 4, variant: dora}}, optimizer: {{learning_rate: 0.01}}}}""",
    "reward": """{{kind: reward, policy: {root}/made/stages/base, data: preferences, epochs: 1.5, examples_per_step: 6,
      lora: {{rank: 4}}, heads: 2, optimizer: {{learning_rate: 0.01}}}}""",
    "dpo": """{{kind: dpo, policy: {root}/made/stages/base, data: preferences, steps: 6, examples_per_step: 8,
      lora: {{rank: 4}}, optimizer: {{learning_rate: 0.01, schedule: linear}}}}""",
    "ppo": """{{kind: ppo, value_learning_rate: 0.01, minibatches: 2, update_epochs: 2, kl_target: 0.1, kl_horizon: 50,
      reward_normalisation: deviation, stop_at_kl: 0.5, {sampling}""",
    "values": """{{kind: ppo, reward: {root}/made/stages/reward, reward_weight: 2.0, value_warmup: 2, {sampling}""",
    "head": """{{kind: ppo, value: head, value_learning_rate: 0.01, {sampling}""",
    "grpo": """{{kind: ppo, advantage: grpo, gold: world, kl_in: loss, kl_estimator: k3, {sampling}""",
    "rejection": """{{kind: rejection, {sampling}""",
    "online_dpo": """{{kind: online_dpo, {sampling}""",
    "trl_sft": """{{trainer: SFT, policy: {root}/whole-pretrain/stages/stage, data: demonstrations, lora: null,
      arguments: {{neftune_noise_alpha: 5}}, {trl}""",
    "trl_dpo": """{{trainer: DPO, policy: {root}/whole-pretrain/stages/stage, data: preferences,
      lora: {{rank: 4, variant: dora}}, arguments: {{disable_dropout: false, precompute_ref_log_probs: true}}, {trl}""",
    "trl_dpo_of_an_adapter": """{{trainer: DPO, policy: {root}/whole-dpo/stages/stage, data: preferences,
      lora: {{rank: 4}}, {trl}""",
    "trl_reward": """{{trainer: Reward, policy: {root}/whole-pretrain/stages/stage, data: preferences,
      lora: {{rank: 4}}, arguments: {{disable_dropout: false}}, {trl}""",
    "trl_kto": """{{trainer: KTO, policy: {root}/made/stages/sft, data: preferences, lora: null, steps: 6,
      {trl}""",
    "trl_cpo": """{{trainer: CPO, policy: {root}/whole-pretrain/stages/stage, data: preferences,
      lora: {{rank: 4}}, arguments: {{disable_dropout: false}}, {trl}""",
    "trl_orpo": """{{trainer: ORPO, policy: {root}/whole-pretrain/stages/stage, data: preferences,
      lora: {{rank: 4}}, arguments: {{disable_dropout: false}}, {trl}""",
    "trl_tpo": """{{trainer: TPO, policy: {root}/whole-pretrain/stages/stage, data: rankings,
      lora: {{rank: 4}}, arguments: {{disable_dropout: false}}, {trl}""",
    "trl_grpo": """{{trainer: GRPO, arguments: {{num_generations: 2, beta: 0.1}}, {trl_sampling}""",
    "trl_rloo": """{{trainer: RLOO, arguments: {{num_generations: 2}}, {trl_sampling}""",
    "trl_gmpo": """{{trainer: GMPO, arguments: {{num_generations: 2, steps_per_generation: 1}}, {trl_sampling}""",
    "trl_online_dpo": """{{trainer: OnlineDPO, {trl_sampling}""",
}
SAMPLING = """policy: {root}/made/stages/sft, data: prompts, steps: 6, examples_per_step: 6, samples_per_prompt: 2,
      rules: [{{rule: pattern, expression: "e"}}, {{rule: length, words: 1}}], max_new_tokens: 6,
      missing_eos_penalty: 0, evaluate_every: 2, evaluate_rows: 4, evaluate_samples: 2, lora: {{rank: 4}},
      optimizer: {{learning_rate: 0.02}}}}"""
"""Each goes over its rows more than once in six steps."""
TRL = """kind: trl, epochs: 1.4, examples_per_step: 6, examples_per_batch: 2, max_length: 256,
      optimizer: {{learning_rate: 0.01, schedule: linear}}}}"""
"""The last step is not a full one."""
TRL_SAMPLING = """kind: trl, policy: {root}/whole-pretrain/stages/stage, reward: {root}/made/stages/reward,
      data: prompts, steps: 6, examples_per_step: 6, examples_per_batch: 2, max_new_tokens: 6, max_length: 256,
      lora: {{rank: 4}}, optimizer: {{learning_rate: 0.02}}}}"""
STEPS = 6
FAST = ("pretrain", "dpo", "head", "trl_sft")
"""Those in the fast tier, one for each loop that keeps checkpoints; the others differ in what they train."""
TIMES = ("seconds", "step_time")
"""Fields of the log that are never the same."""


class Stop(Exception):
    """What ends an attempt."""


@pytest.fixture(scope="module")
def root(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs go; the stages that they begin with are in `made`."""
    root = tmp_path_factory.mktemp("resumption")
    (root / "made").symlink_to(chain)
    rankings = [{"prompt": f"Is {n} odd?", "responses": [f"{n}.", "Yes.", "So it is."]} for n in range(30)]
    (root / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rankings))
    return root


@pytest.fixture(scope="module")
def whole(root: Path) -> Callable[[str], Path]:
    """The directory of a stage that was never stopped."""

    def run(kind: str) -> Path:
        directory = root / f"whole-{kind}" / "stages" / "stage"
        if not directory.exists():
            config = configured(root, kind, f"whole-{kind}")
            for needed in re.findall(r"/whole-(\w+)/stages/", config.read_text()):
                run(needed)
            assert baton(config) == 0
        return directory

    return run


def baton(config: Path, *arguments: str) -> int:
    return cli.execute(cli.app, ["run", str(config), *arguments])


def configured(root: Path, kind: str, name: str) -> Path:
    config = root / f"{name}.yaml"
    shared = {"sampling": SAMPLING, "trl": TRL, "trl_sampling": TRL_SAMPLING}
    stage = STAGES[kind].format(root=root, **{name: text.format(root=root) for name, text in shared.items()})
    config.write_text(RUN.format(root=root, name=name, stage=stage))
    return config


def stopping_at(monkeypatch: pytest.MonkeyPatch, step: int, stop: Callable[[], None]) -> None:
    """After this step's record is logged, and before its checkpoint, stop."""
    log = StageProgress.__call__

    def logged(self: StageProgress, record: Mapping[str, Any], *, done: int, total: int) -> None:
        log(self, record, done=done, total=total)
        if done == step:
            stop()

    monkeypatch.setattr(StageProgress, "__call__", logged)


def fail() -> None:
    raise Stop


def run_until(config: Path, step: int, stop: Callable[[], None] = fail) -> int | None:
    """The exit code of an attempt that is stopped at a step; None where it ended with `Stop`."""
    with pytest.MonkeyPatch.context() as patch:
        stopping_at(patch, step, stop)
        try:
            return baton(config)
        except Stop:
            return None


@pytest.fixture(scope="module")
def halfway(root: Path) -> Callable[[str], Path]:
    """The configuration of a DPO stage that was stopped with checkpoints of its steps 3 and 4."""
    original = configured(root, "dpo", "halfway")
    assert run_until(original, 5) is None

    def copy(name: str) -> Path:
        shutil.copytree(root / "halfway", root / name)
        return configured(root, "dpo", name)

    return copy


def kept(config: Path) -> Path:
    return RunDirectory.of(loader.load(config)).checkpoints("stage")


def records(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same(directory: Path, expected: Path) -> None:
    """Every byte is the same but for times."""
    first, second = (manifests.verify(each) for each in (directory, expected))
    assert first.digest == second.digest
    assert first.key == second.key
    assert first.metrics == second.metrics
    assert first.cost.tokens == second.cost.tokens
    assert records(directory) == records(expected)
    seconds = [json.loads(line)["seconds"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)
    for path in manifests.walk(expected):
        if path.name not in (manifests.FILE_NAME, "metrics.jsonl"):
            assert (directory / path.relative_to(expected)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in STAGES]
)
def test_a_stage_that_is_stopped_again_and_again_ends_as_one_that_is_not(
    root: Path, whole: Callable[[str], Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = whole(kind)
    config = configured(root, kind, f"stopped-{kind}")
    assert len(records(expected)) == STEPS
    # Sampling takes its time, as TRL does, and the other stages have been stopped everywhere.
    takes_its_time = "sampling" in STAGES[kind] or kind.startswith("trl")
    for step in (2, STEPS) if takes_its_time else (1, 2, 5, STEPS):
        assert run_until(config, step) is None
        found = checkpoints.last_step(kept(config))
        assert found == (step - 1 or None)
    capsys.readouterr()
    assert cli.execute(cli.app, ["plan", str(config)]) == 0
    assert "), goes on after step 5" in capsys.readouterr().out
    assert cli.execute(cli.app, ["status", str(config)]) == 0
    assert "not run, last attempt failed, checkpoint after step 5" in capsys.readouterr().out
    assert baton(config) == 0
    assert "stage: goes on after step 5" in capsys.readouterr().out
    assert_same(root / f"stopped-{kind}" / "stages" / "stage", expected)
    assert not kept(config).exists()


@pytest.mark.parametrize(
    ("kind", "after", "step"),
    [
        ("sft", "stages.sft.loss_metrics", "stages.core.loop.Updater.step"),
        pytest.param(
            *("trl_sft", "stages.core.trl.results.loss_metrics", "transformers.Trainer.train"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_stage_that_was_stopped_after_its_last_step_trains_no_more(
    root: Path, whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str, after: str, step: str
) -> None:
    expected = whole(kind)
    config = configured(root, kind, f"trained-{kind}")
    with monkeypatch.context() as patch:
        patch.setattr(after, lambda *arguments: fail())
        with pytest.raises(Stop):
            baton(config)
    assert checkpoints.last_step(kept(config)) == STEPS
    with monkeypatch.context() as patch:
        patch.setattr(step, lambda *arguments: fail())
        assert baton(config) == 0
    assert_same(root / f"trained-{kind}" / "stages" / "stage", expected)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import pytest, test_resumption
from pipeline import cli
patch = pytest.MonkeyPatch()
test_resumption.stopping_at(patch, 4, lambda: os.kill(os.getpid(), signal.SIGKILL))
sys.exit(cli.execute(cli.app, ["run", sys.argv[1]]))
"""


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("kind", ["dpo", pytest.param("trl_dpo", marks=pytest.mark.slow)])
def test_a_killed_process_loses_only_its_step(root: Path, whole: Callable[[str], Path], kind: str) -> None:
    expected = whole(kind)
    config = configured(root, kind, f"killed-{kind}")
    ended = forks.run(KILLED.format(tests=str(Path(__file__).parent)), config, cwd=REPOSITORY)
    assert ended.returncode == -9, ended.stderr
    assert checkpoints.last_step(kept(config)) == 3
    assert baton(config) == 0
    assert_same(root / f"killed-{kind}" / "stages" / "stage", expected)


@pytest.mark.parametrize("kind", ["reward", pytest.param("trl_reward", marks=pytest.mark.slow)])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint_whatever_the_interval(
    root: Path, whole: Callable[[str], Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = whole(kind)
    config = configured(root, kind, f"signalled-{kind}")
    config.write_text(config.read_text().replace("checkpoint_minutes: 0", "checkpoint_minutes: 10"))
    assert run_until(config, 3, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    said = capsys.readouterr()
    assert "stage: stopped after step 3, with a checkpoint" in said.out
    assert "training goes on from its checkpoint" in said.err
    assert [path.name for path in kept(config).iterdir()] == ["step-00000003"]
    assert baton(config) == 0
    assert_same(root / f"signalled-{kind}" / "stages" / "stage", expected)


@pytest.mark.parametrize("error", [OSError(5, "input/output error"), RuntimeError("a library's"), ServerError("it")])
def test_what_keeps_a_checkpoint_from_being_made_hides_no_other_error(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    config = configured(root, "grpo", f"hidden-{type(error).__name__}")
    config.write_text(config.read_text().replace("checkpoint_minutes: 0", "checkpoint_minutes: 10"))
    of_rules, asked = Rewards.of_rules, []

    def failing(self: Rewards, rollout: Rollout) -> list[float]:
        asked.append(rollout)
        if len(rollout.prompts) == 6 and len(asked) > 2:
            monkeypatch.setattr(checkpoint, "save", lambda *given: (_ for _ in ()).throw(error))
            raise ServerError("it is down", where="http://rewards")
        return of_rules(self, rollout)

    monkeypatch.setattr(Rewards, "of_rules", failing)
    assert baton(config) == 69
    said = capsys.readouterr()
    assert f"no checkpoint of step 1: {error}" in said.out
    assert "http://rewards: it is down" in said.err


@pytest.mark.slow
def test_a_reward_server_that_fails_in_a_round_costs_that_round_alone(
    root: Path, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = whole("ppo")
    config = configured(root, "ppo", "failing-ppo")
    config.write_text(config.read_text().replace("checkpoint_minutes: 0", "checkpoint_minutes: 10"))
    of_rules, asked = Rewards.of_rules, []

    def failing(self: Rewards, rollout: Rollout) -> list[float]:
        asked.append(rollout)
        if len(rollout.prompts) == 6 and sum(len(each.prompts) == 6 for each in asked) == 4:  # a look is at four
            raise ServerError("it is down", where="http://rewards")
        return of_rules(self, rollout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewards, "of_rules", failing)
        assert baton(config) == 69
    said = capsys.readouterr()
    assert "stage: stopped after step 3, with a checkpoint" in said.out
    assert [path.name for path in kept(config).iterdir()] == ["step-00000003"]
    assert baton(config) == 0
    assert_same(root / "failing-ppo" / "stages" / "stage", expected)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (
            "trl_grpo",
            ("trainer: GRPO, arguments: {", "trainer: GRPO, arguments: {num_iterations: 2, "),
            "more steps than",
        ),
        (
            "trl_grpo",
            ("trainer: GRPO, arguments: {", "trainer: GRPO, arguments: {use_adaptive_entropy: true, "),
            "the entropy of the steps before",
        ),
        ("trl_kto", ("trainer: KTO", "trainer: KTO, arguments: {sync_ref_model: true}"), "the reference moves"),
        ("trl_online_dpo", ("trainer: OnlineDPO", "trainer: A2PO"), "what its prompts are worth"),
    ],
)
def test_a_trainer_that_keeps_more_than_weights_says_that_it_begins_anew(
    root: Path,
    whole: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    kind: str,
    change: tuple[str, str],
    reason: str,
) -> None:
    whole("pretrain")
    config = configured(root, kind, f"anew-{reason.replace(' ', '-')}")
    config.write_text(config.read_text().replace(*change))
    assert run_until(config, 2, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    said = capsys.readouterr().out
    (line,) = [
        line for line in said.splitlines() if "stage: keeps no checkpoint, and begins anew if it is stopped" in line
    ]
    assert reason in line
    assert "1/6" in said
    assert "stopped after step" not in said
    assert not kept(config).exists()


def flip(path: Path) -> None:
    weights = path / "tensors-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 16
    weights.write_bytes(content)


def cut(path: Path) -> None:
    weights = path / "tensors-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def make_foreign(path: Path) -> None:
    reseal(path / checkpoints.FILE_NAME, key="another")


@pytest.mark.parametrize(
    ("harm", "reason"), [(flip, "sha256"), (cut, "bytes, expected"), (make_foreign, "other settings, inputs or data")]
)
def test_one_that_cannot_serve_is_named_and_the_older_one_is_taken(
    root: Path,
    whole: Callable[[str], Path],
    halfway: Callable[[str], Path],
    harm: Callable[[Path], None],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = halfway(harm.__name__)
    harm(kept(config) / "step-00000004")
    capsys.readouterr()
    assert baton(config) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "checkpoint not used" in line]
    assert "step-00000004" in line
    assert reason in line
    assert "stage: goes on after step 3" in said
    assert_same(root / harm.__name__ / "stages" / "stage", whole("dpo"))


def test_another_setting_begins_anew_and_one_without_effect_goes_on(
    halfway: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = halfway("changed")
    capsys.readouterr()
    assert cli.execute(cli.app, ["plan", str(config), "stages.stage.gradient_checkpointing=true"]) == 0
    assert "goes on after step 4" in capsys.readouterr().out
    config.write_text(config.read_text().replace("lora:", "beta: 0.3, lora:"))
    assert run_until(config, 1) is None
    said = capsys.readouterr().out
    assert "step-00000004: made from other settings, inputs or data" in said
    assert "step-00000003: made from other settings, inputs or data" in said
    assert "goes on" not in said


def test_other_code_begins_anew(
    halfway: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = halfway("coded")
    monkeypatch.setattr("pipeline.fingerprint.sources", lambda kind: "0" * 64)
    capsys.readouterr()
    assert run_until(config, 1) is None
    said = capsys.readouterr().out
    assert "step-00000004: made with other code: to go on would not be exact" in said
    assert "goes on" not in said


def test_a_short_run_writes_no_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(checkpoint, "save", lambda directory, state: written.append(directory))
    settings = loader.load(configured(root, "sft", "short"), ["checkpoint_minutes=10"])
    runner.run(settings, console=Console(file=io.StringIO()))
    assert written == []
    assert not (root / "short" / ".checkpoints").exists()


def test_the_interval_is_part_of_no_key(root: Path, whole: Callable[[str], Path]) -> None:
    whole("sft")
    settings = loader.load(root / "whole-sft.yaml", ["checkpoint_minutes=30"])
    assert [outcome.ran for outcome in runner.run(settings)] == [False]
