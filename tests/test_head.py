"""The scalar head: its scores, its file, and the refusal of any other file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ArtifactError
from reward.head import FILE_NAME, ScalarHead


def trained(seed: int = 0) -> ScalarHead:
    torch.manual_seed(seed)
    head = ScalarHead(8)
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


def test_a_reloaded_head_gives_exactly_the_same_scores(tmp_path: Path) -> None:
    head, states = trained(), torch.randn(50, 8)
    head.save(tmp_path)
    torch.manual_seed(123)
    assert torch.equal(ScalarHead.load(tmp_path, 8)(states), head(states))


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


@pytest.mark.parametrize("name", ["linear.weight", "linear.bias", "mean"])
def test_a_missing_tensor_is_refused(tmp_path: Path, name: str) -> None:
    trained().save(tmp_path)
    tensors = load_file(tmp_path / FILE_NAME)
    del tensors[name]
    save_file(tensors, tmp_path / FILE_NAME)
    with pytest.raises(ArtifactError, match="the reward head holds"):
        ScalarHead.load(tmp_path, 8)


def test_an_extra_tensor_is_refused(tmp_path: Path) -> None:
    trained().save(tmp_path)
    save_file({**load_file(tmp_path / FILE_NAME), "other": torch.zeros(1)}, tmp_path / FILE_NAME)
    with pytest.raises(ArtifactError, match="other"):
        ScalarHead.load(tmp_path, 8)
