"""The scalar head: float32 linear maps from a hidden state to a score, with the mean that centres it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import ArtifactError
from pipeline.model_files import unreadable

FILE_NAME = "head.safetensors"


class ScalarHead(nn.Module):
    """score = weight . h + bias - mean; [n, hidden] -> [n], in float32 whatever the input's precision.

    `mean` is not trained: a reward model sets it so that SFT responses score zero on average (Ziegler et al. 2019). Of
    an ensemble of heads on the same state (Osband et al. 2016, arXiv 1602.04621), the score is the heads' mean.
    """

    mean: Tensor

    def __init__(self, hidden_size: int, heads: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, heads)
        self.register_buffer("mean", torch.zeros(()))
        # A small start keeps the first scores near zero and independent of the width.
        nn.init.normal_(self.linear.weight, std=1 / (hidden_size + 1))
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.each(states).mean(-1)

    def each(self, states: Tensor) -> Tensor:
        """The scores of the single heads, which the same `mean` is taken off: [n, heads], float32."""
        with torch.autocast(states.device.type, enabled=False):
            return self.linear(states.float()) - self.mean

    @torch.no_grad()
    def align(self, means: Tensor) -> None:
        """Move every head's bias so that scores whose means were `means` [heads] have one mean; their mean stays.

        Losses of differences leave open where a head's zero is, and heads could not be compared.
        """
        self.linear.bias.add_(means.mean() - means)

    @torch.no_grad()
    def rescale(self, factor: float, shift: float) -> None:
        """Have the score be `factor` times what it was, plus `shift`."""
        self.linear.weight.mul_(factor)
        self.linear.bias.sub_(self.mean).mul_(factor).add_(shift)
        self.mean.zero_()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a single head becomes the mean of an ensemble's, whose score is the same."""
        if self.linear.out_features == 1:
            linear = {name: tensor for name, tensor in state_dict.items() if name.startswith("linear.")}
            state_dict = {**state_dict, **{name: tensor.mean(0, keepdim=True) for name, tensor in linear.items()}}
        return super().load_state_dict(state_dict, strict, assign)

    def save(self, directory: Path) -> None:
        """Write `head.safetensors`."""
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()},
            directory / FILE_NAME,
        )

    @classmethod
    def load(cls, directory: Path, hidden_size: int) -> ScalarHead:
        """Read `head.safetensors`; a missing file, tensor or shape raises ArtifactError, never a random head."""
        path = directory / FILE_NAME
        if not path.is_file():
            raise ArtifactError("the reward head is missing", where=path, hint="train the reward stage again")
        with unreadable(directory, "reward head"):
            tensors = load_file(path)
        head = cls(hidden_size, _heads(tensors))
        expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            raise ArtifactError(f"the reward head holds {found}, expected {expected}", where=path)
        head.load_state_dict(tensors)
        return head


def _heads(tensors: Mapping[str, Tensor]) -> int:
    """Heads in a file: the length of `linear.bias`, or 1 where that is not to be had."""
    bias = tensors.get("linear.bias")
    return len(bias) if bias is not None and bias.ndim == 1 and len(bias) else 1
