"""The state of a training on disk: named tensors as safetensors, everything else as JSON.

A state is put together of parts, each of which knows its own: `joined({"policy": a, "value": b})` and `part("policy")`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import ArtifactError
from stages.core import guards

VALUES = "state.json"
FILE_BYTES = 1 << 30
"""Tensors are brought to the host's memory and written about so many bytes at a time."""


@dataclass(frozen=True)
class State:
    """Tensors and JSON values by name; the names of parts are divided by slashes."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def part(self, name: str) -> State:
        """A part, by the names that it has on its own."""
        prefix = f"{name}/"
        return State(_within(prefix, self.tensors), _within(prefix, self.values))


def joined(parts: Mapping[str, State], **values: Any) -> State:
    """One state of several and of further values."""
    tensors = {f"{name}/{key}": tensor for name, part in parts.items() for key, tensor in part.tensors.items()}
    within = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.values.items()}
    return State(tensors, within | values)


def save(directory: Path, state: State) -> None:
    """Write a state into a directory; tensors may be on any device and of any precision.

    Raises:
        NumericalError: A tensor is not finite: who went on from there would not get far.
    """
    guards.require_finite_state(state.tensors.items())
    for number, names in enumerate(_files(state.tensors)):
        kept = {name: state.tensors[name].detach().cpu().contiguous() for name in names}
        save_file(kept, directory / f"tensors-{number:05}.safetensors")
    (directory / VALUES).write_text(json.dumps(state.values, sort_keys=True) + "\n", encoding="utf-8")


def load(directory: Path) -> State:
    """Read a state; tensors are in the host's memory."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("tensors-*.safetensors")):
        tensors |= load_file(path)
    return State(tensors, json.loads((directory / VALUES).read_text(encoding="utf-8")))


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], state: State) -> None:
    """Give tensors in use the values of a state, in place, so that whoever shares them shares these.

    Raises:
        ArtifactError: Names or shapes differ.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
    if found != expected:
        odd = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise ArtifactError(
            f"the checkpoint does not fit the model at `{odd}`: {found.get(odd, 'absent')} in the checkpoint, "
            f"{expected.get(odd, 'absent')} in the model",
            hint="remove the stage's directory in `.checkpoints` to begin anew",
        )
    for name, target in targets.items():
        target.copy_(state.tensors[name])


def random_state(device: torch.device) -> State:
    """What torch's generators would draw next, on the host and on the device that computes."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return State(states)


def restore_random_state(state: State, device: torch.device) -> None:
    """Let torch's generators go on.

    Raises:
        ArtifactError: The state is that of another kind of device, on which nothing would go on exactly.
    """
    kinds = {"cpu", device.type}
    if state.tensors.keys() != kinds:
        made = " and ".join(sorted(state.tensors))
        raise ArtifactError(
            f"the checkpoint was made on {made}, this is {device.type}",
            hint="use the same `device`, or remove the stage's directory in `.checkpoints` to begin anew",
        )
    torch.set_rng_state(state.tensors["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state.tensors[device.type])


def _within(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): each for name, each in named.items() if name.startswith(prefix)}


def _files(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of the tensors of each file; a tensor is never divided."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    if names:
        yield names
