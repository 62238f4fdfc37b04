"""The scalar head: its scores, its file, and the refusal of any other file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import ArtifactError
from reward.head import FILE_NAME, ScalarHead


def trained(seed: int = 0, heads: int = 1) -> ScalarHead:
    torch.manual_seed(seed)
    head = ScalarHead(8, heads)
    torch.nn.init.normal_(head.linear.weight)
    head.linear.bias.data.fill_(0.25)
    head.mean.fill_(1.5)
    return head


def test_a_score_is_linear_in_the_state_less_the_mean() -> None:
    head, states = trained(), torch.randn(5, 8)
    slow = [sum(w * x for w, x in zip(head.linear.weight[0], state, strict=True)) + 0.25 - 1.5 for state in states]
    assert torch.allclose(head(states), torch.stack(slow), atol=1e-6)


def test_scores_are_float32_whatever_the_states_and_autocast() -> None:
    head, states = trained(), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(states.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, head(states.bfloat16().float()))


@pytest.mark.parametrize("heads", [1, 2, 7])
def test_a_reloaded_head_gives_exactly_the_same_scores(tmp_path: Path, heads: int) -> None:
    head, states = trained(heads=heads), torch.randn(50, 8)
    head.save(tmp_path)
    torch.manual_seed(123)
    found = ScalarHead.load(tmp_path, 8)
    assert torch.equal(found.each(states), head.each(states))
    assert torch.equal(found(states), head(states))


def test_the_file_of_one_head_is_a_row_a_bias_and_a_mean(tmp_path: Path) -> None:
    """As it was before there were ensembles, byte by byte."""
    head = trained()
    head.save(tmp_path)
    save_file({"linear.bias": torch.tensor([0.25]), "linear.weight": head.linear.weight.detach(),
               "mean": torch.tensor(1.5)}, tmp_path / "plain.safetensors")  # fmt: skip
    assert (tmp_path / FILE_NAME).read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_a_fresh_head_starts_near_zero_at_any_width() -> None:
    for width in (8, 512, 4096):
        head = ScalarHead(width)
        assert head(torch.randn(100, width)).abs().max() < 2
        assert head.mean == 0


def test_the_mean_is_not_trained() -> None:
    assert {name for name, _ in trained().named_parameters()} == {"linear.weight", "linear.bias"}


def test_a_missing_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the reward head is missing"):
        ScalarHead.load(tmp_path, 8)


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    trained().save(tmp_path)
    with pytest.raises(ArtifactError, match=r"\(1, 8\).*expected.*\(1, 9\)"):
        ScalarHead.load(tmp_path, 9)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("name", ["linear.weight", "linear.bias", "mean"])
def test_a_missing_tensor_is_refused(tmp_path: Path, name: str, heads: int) -> None:
    trained(heads=heads).save(tmp_path)
    tensors = load_file(tmp_path / FILE_NAME)
    del tensors[name]
    save_file(tensors, tmp_path / FILE_NAME)
    with pytest.raises(ArtifactError, match="the reward head holds"):
        ScalarHead.load(tmp_path, 8)


@pytest.mark.parametrize("bias", [torch.zeros(2), torch.zeros(4), torch.zeros(0), torch.zeros(3, 1), torch.tensor(0.0)])
def test_heads_that_do_not_go_together_are_refused(tmp_path: Path, bias: Tensor) -> None:
    trained(heads=3).save(tmp_path)
    save_file({**load_file(tmp_path / FILE_NAME), "linear.bias": bias}, tmp_path / FILE_NAME)
    with pytest.raises(ArtifactError, match="the reward head holds"):
        ScalarHead.load(tmp_path, 8)


def test_an_extra_tensor_is_refused(tmp_path: Path) -> None:
    trained().save(tmp_path)
    save_file({**load_file(tmp_path / FILE_NAME), "other": torch.zeros(1)}, tmp_path / FILE_NAME)
    with pytest.raises(ArtifactError, match="other"):
        ScalarHead.load(tmp_path, 8)
