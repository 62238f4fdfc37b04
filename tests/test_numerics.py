"""Losses, gradients and weights that are not finite stop a stage at any step, and the last good state is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from pipeline import checkpoints, cli
from pipeline import manifest as manifests
from stages.core import optim
from stages.core.loop import Part, Updater

pytestmark = [pytest.mark.chain, pytest.mark.usefixtures("report_of_one_line")]

RUN = (
    tiny.ONE_STAGE
    + """\
stages:
  stage: {{kind: {stage}, steps: {rounds}}}
"""
)
MADE = "{made}/stages"
LEARNS = "examples_per_step: 6, optimizer: {{learning_rate: 0.01}}"
STAGES = {
    "pretrain": f"pretrain, policy: {MADE}/base, data: corpus, max_length: 32, {LEARNS}",
    "sft": f"sft, policy: {MADE}/base, data: demonstrations, lora: {{{{rank: 4}}}}, {LEARNS}",
    "reward": f"reward, policy: {MADE}/sft, data: preferences, lora: {{{{rank: 4}}}}, {LEARNS}",
    "dpo": f"dpo, policy: {MADE}/sft, data: preferences, lora: {{{{rank: 4}}}}, {LEARNS}",
    "ppo": f"ppo, policy: {MADE}/sft, reward: {MADE}/reward, data: prompts, max_new_tokens: 4, minibatches: 2, "
    f"evaluate_rows: 2, lora: {{{{rank: 4}}}}, {LEARNS}",
    "online_dpo": f"online_dpo, policy: {MADE}/sft, reward: {MADE}/reward, data: prompts, max_new_tokens: 8, "
    f"evaluate_rows: 4, lora: {{{{rank: 4}}}}, {LEARNS}",
}
STEPS = 4
"""Optimizer steps of a stage."""
UPDATES = {"ppo": 2}
"""Optimizer steps of a round, where they are several."""


@pytest.fixture(scope="module")
def root(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs go; the stages that they begin with are in `made`."""
    root = tmp_path_factory.mktemp("numerics")
    (root / "made").symlink_to(chain)
    return root


def baton(config: Path, *arguments: str) -> int:
    return cli.execute(cli.app, ["run", str(config), *arguments])


def configured(root: Path, kind: str, name: str) -> Path:
    config = root / f"{name}.yaml"
    stage = STAGES[kind].format(made=root / "made")
    config.write_text(RUN.format(root=root, name=name, stage=stage, rounds=STEPS // UPDATES.get(kind, 1)))
    return config


def not_a_number(loss: Tensor) -> Tensor:
    return loss * torch.nan


def infinite_gradient(loss: Tensor) -> Tensor:
    """The same number, whose derivative is infinite."""
    return loss + (loss - loss.detach()).sqrt()


SPOILT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan": (not_a_number, "the loss is nan"),
    "gradient": (infinite_gradient, "the gradient norm is "),
}


FAST = {(kind, "nan") for kind in STAGES if kind != "online_dpo"} | {("pretrain", "gradient")}
CASES = [
    pytest.param(kind, what, marks=() if (kind, what) in FAST else pytest.mark.slow)
    for kind in STAGES
    for what in SPOILT
]


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[Tensor], Tensor]) -> None:
    """Change the losses of the optimizer step of this number, and all that follow."""
    take = Updater.step

    def spoilt(self: Updater, parts: Iterator[Part], origins: Sequence[str] = ()) -> dict[str, float]:
        if self.taken + 1 >= step:
            parts = (replace(part, loss=change(part.loss)) for part in parts)
        return take(self, parts, origins)

    monkeypatch.setattr(Updater, "step", spoilt)


@pytest.mark.parametrize(("kind", "what"), CASES)
def test_at_every_step_the_stage_stops_before_it_and_goes_on_from_the_last_good_one(
    root: Path, capsys: pytest.CaptureFixture[str], kind: str, what: str
) -> None:
    change, message = SPOILT[what]
    name, updates = f"{kind}-{what}", UPDATES.get(kind, 1)
    config, kept = configured(root, kind, name), root / name / ".checkpoints" / "stage"
    for step in range(1, STEPS + 1):
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, step, change)
            capsys.readouterr()
            assert baton(config) == 4
        said = capsys.readouterr().err
        assert re.match(rf"error: step {step} \(rows world:\w+:\d+.*\): {message}", said), said
        assert "no weight was changed by this step" in said
        done = (step - 1) // updates
        assert (checkpoints.last_step(kept) or 0) == done
        log = root / name / ".failed" / "stage" / "metrics.jsonl"
        assert len(log.read_text().splitlines() if log.exists() else []) == done
        assert not (root / name / "stages" / "stage").exists()
    assert baton(config) == 0
    whole = root / f"whole-{kind}"
    if not whole.exists():
        assert baton(configured(root, kind, whole.name)) == 0
    assert digest(root / name) == digest(whole)


def digest(run: Path) -> str:
    return manifests.verify(run / "stages" / "stage").digest


@pytest.mark.parametrize("kind", ["dpo", "ppo", "sft"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_weights_that_a_step_makes_infinite_stop_the_stage_and_are_in_no_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, step: int
) -> None:
    class Overflowing(torch.optim.AdamW):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            super().step()
            first = self.param_groups[0]["params"][0]
            if self.state[first]["step"] == step:
                first.data.view(-1)[0] = torch.inf

    monkeypatch.setattr(optim, "AdamW", Overflowing)
    name = f"infinite-{kind}-{step}"
    assert baton(configured(root, kind, name)) == 4
    said = capsys.readouterr().err
    assert re.match(
        rf"error: step {step} \(rows .*\): the step is taken, and tensor `\S+` is not finite: 1 of its ", said
    )
    done = (step - 1) // UPDATES.get(kind, 1)
    assert (checkpoints.last_step(root / name / ".checkpoints" / "stage") or 0) == done
    assert not (root / name / "stages" / "stage").exists()


def test_a_preference_loss_that_stays_at_ln_2_is_told_of(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(root, "dpo", "silent")
    assert baton(config, "stages.stage.beta=1e-9") == 0
    told = "alarm at step 3 (rows world:preferences:"
    assert told in capsys.readouterr().out
    (warning,) = manifests.load(root / "silent" / "stages" / "stage").warnings
    assert warning.startswith(told)
    assert "zero signal: the gradient norm was at most " in warning
    assert "(loss 0.6931)" in warning
    log = (root / "silent" / "stages" / "stage" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("alarm") for line in log] == [None, None, "zero_signal", "zero_signal"]


def test_half_precision_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(root, "sft", "half")
    assert baton(config, "dtype=float16") == 2
    assert "dtype" in capsys.readouterr().err
    trl = "stages.stage={kind: trl, trainer: SFT, policy: %s, data: demonstrations, arguments: {fp16: true}}"
    assert baton(config, trl % (root / "made" / "stages" / "sft")) == 2
    assert "fp16" in capsys.readouterr().err


def test_a_step_in_which_nothing_is_predicted_is_refused_with_its_rows(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"  # a token and the end, or two: blocks of an end and a token alone
    texts.write_text(
        "".join(
            json.dumps({"text": text}) + "\n"
            for text in [*(f"{each}#" for each in "0123456789"), *"abcdefghijklmnopqrstuvwxyz"]
        )
    )
    config = configured(root, "pretrain", "nothing")
    blocks = ["stages.stage.max_length=2", "stages.stage.document_masks=true", "stages.stage.examples_per_step=1"]
    assert baton(config, f"data.corpus={{source: {texts}, held_out: 0.2}}", *blocks, "stages.stage.steps=30") == 3
    named = rf"error: {texts}:\d+ \+ {texts}:\d+: no token of a step's rows is trained on"
    assert re.match(named, capsys.readouterr().err)
