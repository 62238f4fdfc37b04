"""The scalar head: a float32 linear map from a hidden state to a score, with the mean that centres it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import ArtifactError

FILE_NAME = "head.safetensors"


class ScalarHead(nn.Module):
    """score = weight . h + bias - mean; [n, hidden] -> [n], in float32 whatever the input's precision.

    `mean` is not trained: a reward model sets it so that SFT responses score zero on average (Ziegler et al. 2019).
    """

    mean: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        self.register_buffer("mean", torch.zeros(()))
        # A small start keeps the first scores near zero and independent of the width.
        nn.init.normal_(self.linear.weight, std=1 / (hidden_size + 1))
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return self.linear(states.float()).squeeze(-1) - self.mean

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
        head, tensors = cls(hidden_size), load_file(path)
        expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            raise ArtifactError(f"the reward head holds {found}, expected {expected}", where=path)
        head.load_state_dict(tensors)
        return head
