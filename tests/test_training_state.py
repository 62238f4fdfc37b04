"""What a checkpoint holds of a training: an updater that takes it up goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor, nn

from data.mixture import Mixture, stream
from pipeline.config import Lora, Optimizer, Share, Training
from pipeline.errors import ArtifactError, NumericalError
from stages.core import checkpoint, loop
from stages.core.checkpoint import State, joined
from stages.core.loop import Part, Updater
from stages.core.roles import POLICY
from stages.core.scoring import negative_mean

CPU = torch.device("cpu")
OPTIMIZERS = ("adamw", "muon", "adamw8bit")


class Net(nn.Module):
    """Matrices large enough for moments in 8 bits, one of them in use twice, a vector and a frozen weight."""

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(80, 64, generator=generator).to(precision))
        self.tied = self.embed
        self.matrix = nn.Parameter(torch.randn(64, 64, generator=generator).to(precision))
        self.turned = nn.Parameter(torch.randn(70, 64, generator=generator).to(precision).T)
        self.bias = nn.Parameter(torch.zeros(64, dtype=precision))
        self.frozen = nn.Parameter(torch.ones(64, dtype=precision), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(64, 64, dtype=precision))

    def loss(self) -> Tensor:
        rows = torch.randint(80, (8,))
        states = nn.functional.dropout(self.embed[rows] @ self.matrix + self.bias * self.frozen, 0.3)
        return (states @ self.turned).square().mean() + (states @ self.tied.T).square().mean()


def updater(net: Net, name: str) -> Updater:
    return Updater(net.named_parameters(), Optimizer(name=name, learning_rate=0.01, weight_decay=0.1), 6)


def advance(net: Net, own: Updater, steps: int) -> list[dict[str, float]]:
    return [own.step([Part(net.loss()), Part(net.loss())]) for _ in range(steps)]


def tensors(own: Updater) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in own.state().tensors.items()}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_size_of_a_state_is_foreseen(name: str, precision: torch.dtype) -> None:
    """But for a parameter without gradient and small vectors that are not kept in 8 bits."""
    net = Net(precision)
    own = updater(net, name)
    before = own.size
    advance(net, own, 1)
    assert own.size == before
    assert 0.8 * own.size < own.state().size < 1.1 * own.size


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_an_updater_that_takes_up_a_state_goes_on_exactly(
    tmp_path: Path, name: str, taken: int, precision: torch.dtype
) -> None:
    torch.manual_seed(1)
    net = Net(precision)
    own = updater(net, name)
    advance(net, own, taken)
    checkpoint.save(tmp_path, joined({"own": own.state(), "random": checkpoint.random_state(CPU)}, tokens=7))
    expected = advance(net, own, 3)

    torch.manual_seed(2)
    other = Net(precision)
    with torch.no_grad():
        other.matrix.zero_()
    again = updater(other, name)
    state = checkpoint.load(tmp_path)
    again.load_state(state.part("own"))
    checkpoint.restore_random_state(state.part("random"), CPU)
    assert (again.taken, state.values["tokens"]) == (taken, 7)
    assert advance(other, again, 3) == expected
    before, after = tensors(own), tensors(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)
    assert other.tied is other.embed


def test_eight_bit_moments_are_stored_in_eight_bits(tmp_path: Path) -> None:
    net = Net(torch.float32)
    own = updater(net, "adamw8bit")
    advance(net, own, 1)
    checkpoint.save(tmp_path, own.state())
    stored = checkpoint.load(tmp_path).tensors
    assert stored["optimizer0/matrix/state1"].dtype == torch.uint8
    assert not any("qmap" in name for name in stored)


def test_adapters_of_all_kinds_go_on_exactly(tmp_path: Path) -> None:
    for number, (variant, initialisation) in enumerate([("lora", "default"), ("dora", "default"), ("lora", "pissa")]):
        lora = Lora(rank=4, alpha=8.0, variant=variant, initialisation=initialisation)
        directory = tmp_path / str(number)
        directory.mkdir()

        def begin(lora: Lora = lora) -> tuple[Updater, loop.Objective, models.Roles]:
            torch.manual_seed(0)
            roles = models.roles(POLICY, lora=lora)
            settings = Optimizer(learning_rate=0.01)
            return Updater(roles.parameters(POLICY), settings, 6), negative_mean(roles.base, 4000, "packed"), roles

        own, objective, roles = begin()
        with roles.use(POLICY):
            own.step(objective(models.forest(4, 1)))
            checkpoint.save(directory, own.state())
            expected = [own.step(objective(models.forest(4, 1, seed))) for seed in (1, 2)]
        again, objective, roles = begin()
        again.load_state(checkpoint.load(directory))
        with roles.use(POLICY):
            assert [again.step(objective(models.forest(4, 1, seed))) for seed in (1, 2)] == expected


def test_parts_of_a_state_keep_their_names(tmp_path: Path) -> None:
    policy = State({"a.weight": torch.arange(3), "ab": torch.ones(2, dtype=torch.bfloat16)}, {"taken": 1})
    value = State({"a.weight": torch.zeros(0, 4)}, {"taken": 2})
    checkpoint.save(tmp_path, joined({"policy": policy, "policy2": value}, history=[{"kl": 0.1, "ratio": 1e-17}]))
    found = checkpoint.load(tmp_path)
    assert found.values["history"] == [{"kl": 0.1, "ratio": 1e-17}]
    for name, part in (("policy", policy), ("policy2", value)):
        read = found.part(name)
        assert read.values == part.values
        assert read.tensors.keys() == part.tensors.keys()
        assert all(torch.equal(read.tensors[key], part.tensors[key]) for key in part.tensors)
        assert all(read.tensors[key].dtype == part.tensors[key].dtype for key in part.tensors)


def test_a_large_state_is_written_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    given = {f"t{number}": torch.full((number,), float(number)) for number in range(1, 40)}
    checkpoint.save(tmp_path, State(given))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 20
    found = checkpoint.load(tmp_path).tensors
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"a": torch.zeros(3)}, r"`a`: \(3,\) in the checkpoint, \(2,\) in the model"),
        ({}, r"`a`: absent in the checkpoint, \(2,\) in the model"),
        ({"a": torch.zeros(2), "b": torch.zeros(1)}, r"`b`: \(1,\) in the checkpoint, absent in the model"),
    ],
)
def test_a_state_of_other_weights_is_refused(given: dict[str, Tensor], said: str) -> None:
    target = torch.ones(2)
    with pytest.raises(ArtifactError, match=said):
        checkpoint.fill({"a": target}, State(given))
    assert target.tolist() == [1, 1]


def test_a_state_of_another_kind_of_device_is_refused() -> None:
    state = State({"cpu": torch.get_rng_state(), "cuda": torch.get_rng_state()})
    with pytest.raises(ArtifactError, match="made on cpu and cuda, this is cpu"):
        checkpoint.restore_random_state(state, CPU)


def sources() -> Iterator[Mixture[int]]:
    yield Mixture({"a": range(7)}, None, 3)
    shares = {"a": Share(epochs=0.4), "b": Share(epochs=2.5)}
    yield Mixture({"a": range(7), "b": range(100, 105)}, shares, 3)


def test_the_steps_that_are_left_take_what_they_would_have_taken() -> None:
    settings = Training(steps=12, examples_per_step=4)
    for passes in sources():
        whole = list(loop._steps(passes, settings, 12, 5))  # type: ignore[arg-type]
        for first in range(13):
            assert list(loop._steps(passes, settings, 12, 5, first)) == whole[first:]  # type: ignore[arg-type]
        assert [item for step in whole for item in step] == list(islice(stream(passes, 5), 48))


def test_the_last_step_of_whole_epochs_is_as_short_after_a_stop() -> None:
    settings = Training(epochs=1.5, examples_per_step=4)
    trees = models.forest(7)
    total = loop.total_steps(7, settings)
    whole = list(loop._steps(trees, settings, total, 0))
    assert [len(step) for step in whole] == [4, 4, 2]
    assert list(loop._steps(trees, settings, total, 0, 2)) == whole[2:]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_is_not_written(tmp_path: Path, bad: float) -> None:
    state = State({"weights": torch.ones(3), "moments": torch.tensor([1.0, bad])})
    with pytest.raises(NumericalError, match="`moments` is not finite: 1 of its 2 numbers"):
        checkpoint.save(tmp_path, state)
    assert not list(tmp_path.iterdir())
