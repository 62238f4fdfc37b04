"""What a CUDA device computes: the whole chain, and the parts beside a processor's. Skipped where there is none.

`tests/test_attention.py` has the attention kernels.
"""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from pipeline import cli
from pipeline.config import Optimizer
from stages.core import loop
from stages.core.device import Compute, choose
from stages.core.models import load_model
from stages.core.roles import POLICY, Roles
from stages.core.rollout import Sample, sample
from stages.core.scoring import negative_mean

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = Compute(torch.device("cuda"), torch.float32)
HALF = Compute(torch.device("cuda"), torch.bfloat16)
PROMPTS = [tuple(range(5, 5 + length)) for length in (3, 11, 7, 1)]
BRANCHES = """\
output: {root}/{quantization}
device: cuda
data:
  demonstrations: {{source: "world:demonstrations", rows: 60, held_out: 0.2}}
  preferences: {{source: "world:preferences", rows: 60, held_out: 0.2}}
  prompts: {{source: "world:prompts", rows: 60, held_out: 0.2}}
stages:
  sft: {{kind: sft, policy: {base}, data: demonstrations, steps: 2, examples_per_step: 8,
    quantization: {quantization}, optimizer: {{name: paged_adamw8bit}}}}
  reward: {{kind: reward, policy: sft, data: preferences, steps: 2, examples_per_step: 8}}
  dpo: {{kind: dpo, policy: sft, data: preferences, steps: 2, examples_per_step: 8}}
  ppo: {{kind: ppo, policy: sft, reward: reward, data: prompts, steps: 2, examples_per_step: 8, max_new_tokens: 8}}
"""


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the whole chain."""
    root = tmp_path_factory.mktemp("cuda")
    assert baton("run", tiny.write_chain(root), "device=cuda", "dtype=auto") == 0
    return root / "run"


def opened(tmp_path: Path, compute: Compute) -> Roles:
    """The tiny model on a device, with a disturbed adapter."""
    stored = tmp_path / "base"
    artifact = models.save_base(stored) if not stored.exists() else models.Artifact(stored, "model", "base")
    roles = Roles(load_model(artifact, compute))
    roles.add(POLICY, models.LORA)
    models.disturb(roles, POLICY)
    return roles


def drawn(roles: Roles, **options: object) -> list[Sample]:
    given = {"stop_id": 1, "max_new_tokens": 8, "temperature": 1.0, "seed": 0, "tokens_per_batch": 512, **options}
    with roles.use(POLICY), roles.base.compute.autocast():
        return sample(roles.base.model, PROMPTS, **given)  # type: ignore[arg-type]


def test_the_whole_chain_runs_in_bfloat16_and_its_run_verifies(run: Path) -> None:
    manifest = json.loads((run / "stages" / "ppo" / "manifest.json").read_text())
    assert (manifest["environment"]["device"], manifest["environment"]["dtype"]) == ("cuda", "bfloat16")
    assert 0 < manifest["cost"]["peak_memory_bytes"] < 2**30
    assert baton("verify", run) == 0


# The tiny model's layers are narrower than what bitsandbytes has its fast kernels for.
@pytest.mark.filterwarnings("ignore:inner dimension .* is not aligned:UserWarning")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_every_stage_trains_on_a_quantized_base(run: Path, tmp_path: Path, quantization: str) -> None:
    config = tmp_path / "quantized.yaml"
    config.write_text(BRANCHES.format(root=tmp_path, base=run / "stages" / "base", quantization=quantization))
    assert baton("run", config) == 0
    assert baton("verify", tmp_path / quantization) == 0


def test_greedy_responses_are_those_of_a_processor(tmp_path: Path) -> None:
    ours, expected = (
        [each.tokens for each in drawn(opened(tmp_path, compute), temperature=0.0)] for compute in (CUDA, models.CPU)
    )
    assert ours == expected


def test_samples_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    roles = opened(tmp_path, CUDA)
    first, again, other = (drawn(roles, per_prompt=4, seed=seed) for seed in (0, 0, 1))
    assert [each.tokens for each in first] == [each.tokens for each in again]
    assert [each.tokens for each in first] != [each.tokens for each in other]


def test_losses_and_weights_are_those_of_a_processor(tmp_path: Path) -> None:
    settings = Optimizer(learning_rate=3e-3, schedule="constant", warmup=0.0)
    trees = models.responses(8)
    found: list[tuple[list[float], list[Tensor]]] = []
    for compute in (CUDA, models.CPU):
        roles = opened(tmp_path, compute)
        updater = loop.Updater(roles.parameters(POLICY), settings, 5)
        objective = negative_mean(roles.base, 1000, "plain")
        with roles.use(POLICY):
            losses = [updater.step(objective(trees))["loss"] for _ in range(5)]
        found.append((losses, [each.detach().cpu() for _, each in roles.parameters(POLICY)]))
    (ours, our_weights), (expected, weights) = found
    assert ours == pytest.approx(expected, rel=1e-3)
    for one, other in zip(our_weights, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [64, 128, 192, 704])
def test_gradients_of_masked_attention_are_numbers_where_every_score_is_far_below_zero(length: int) -> None:
    choose("cuda", "bfloat16")
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, length, 64, device="cuda", dtype=torch.bfloat16)
    query[..., 0], key[..., 0] = 1.0, -128.0 * 64**0.5
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    inputs = [each.requires_grad_() for each in (query, key, value)]
    functional.scaled_dot_product_attention(*inputs, attn_mask=mask).sum().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in inputs)


@torch.no_grad()
def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    tokens = torch.tensor([PROMPTS[1]], device="cuda")
    found = []
    for compute in (CUDA, HALF):
        roles = opened(tmp_path, compute)
        with roles.use(POLICY), compute.autocast():
            found.append(roles.base.model(tokens).logits.float())
    exact, rounded = found
    assert (rounded - exact).norm() < 0.05 * exact.norm()
