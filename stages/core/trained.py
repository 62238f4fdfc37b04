"""Parameters in training with what their optimizers remember: all of a model that steps change."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pipeline.config import Optimizer
from stages.core import checkpoint, optim
from stages.core.checkpoint import State, joined


class Trained:
    """Those of the parameters that are to be trained, and their optimizers.

    Args:
        named: Parameters by name.
        settings: The optimizer's.
        epsilon: Added to the root of the second moment.

    Attributes:
        optimizers: Each parameter is in one of them.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], settings: Optimizer, epsilon: float = optim.EPSILON
    ) -> None:
        self._named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self._parameters = [parameter for _, parameter in self._named]
        self.optimizers = optim.build(self._named, settings, epsilon)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._parameters[0].device

    @property
    def size(self) -> int:
        """About as many bytes as its state has after a step."""
        return sum(parameter.nbytes for parameter in self._parameters) + sum(map(optim.size, self.optimizers))

    def state(self) -> State:
        """The weights, and what the optimizers remember of them."""
        parts = {f"optimizer{number}": optim.state_of(each, self._named) for number, each in enumerate(self.optimizers)}
        return joined({"weights": State(dict(self._named)), **parts})

    def load_state(self, state: State) -> None:
        """Go on where another one of the same parameters and settings was.

        Raises:
            ArtifactError: The state is of other parameters.
        """
        checkpoint.fill(dict(self._named), state.part("weights"))
        for number, optimizer in enumerate(self.optimizers):
            optim.load_state(optimizer, self._named, state.part(f"optimizer{number}"))
