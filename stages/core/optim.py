"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from pipeline.config import Optimizer
from pipeline.errors import ConfigError
from stages.core.checkpoint import State
from stages.core.muon import Muon

Named = Iterable[tuple[str, nn.Parameter]]
# Rows of these are looked up or scored one by one, so orthogonalising the whole matrix has no meaning.
NOT_FOR_MUON = ("embed", "wte", "wpe", "lm_head", "head.")
EPSILON = 1e-8
FUSED = ("cpu", "cuda")
"""Devices on which one kernel takes AdamW's whole step."""
QUANTILES = ("qmap1", "qmap2")
"""The table by which bitsandbytes reads 8 bits, the same for all parameters and always."""


def build(named: Named, settings: Optimizer, epsilon: float = EPSILON) -> list[torch.optim.Optimizer]:
    """The optimizers for the parameters that are trained.

    Weight decay is for matrices only. With `muon`, matrices other than embeddings and heads are orthogonalised, scaled
    to AdamW's update size so that one learning rate serves both.

    Raises:
        ConfigError: The device of the parameters does not serve the optimizer.
    """
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    matrices = [parameter for name, parameter in trained if parameter.ndim == 2 and _for_muon(name, settings)]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for _, parameter in trained if id(parameter) not in chosen]
    built: list[torch.optim.Optimizer] = []
    if matrices:
        built.append(Muon(matrices, settings.learning_rate, settings.weight_decay))
    if rest:
        built.append(_adamw(rest, settings, epsilon))
    return built


def require_support(settings: Optimizer, device: torch.device) -> None:
    """Raise ConfigError where the optimizer does not run on the device; cheap, so that stages ask before all else."""
    if settings.name == "paged_adamw8bit" and device.type != "cuda":
        raise ConfigError(
            f"paged_adamw8bit needs a CUDA device, this is {device.type}",
            where="optimizer.name",
            hint="use device=cuda, or optimizer.name=adamw",
        )
    if settings.name == "adamw8bit":
        _require_a_step(device)


def size(optimizer: torch.optim.Optimizer) -> int:
    """About how many bytes an optimizer remembers once it has taken a step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, Muon):
        return sum(parameter.nbytes for parameter in parameters)
    if isinstance(optimizer, AdamW):
        return 2 * sum(parameter.nbytes for parameter in parameters)
    return 2 * sum(parameter.numel() for parameter in parameters)  # in 8 bits each


def state_of(optimizer: torch.optim.Optimizer, named: Named) -> State:
    """What an optimizer remembers of each parameter, by the parameter's name."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in QUANTILES:
                continue
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                values[f"{name}/{key}"] = value
    return State(tensors, values)


def load_state(optimizer: torch.optim.Optimizer, named: Named, state: State) -> None:
    """Let a new optimizer remember of each parameter what another one did."""
    names = {parameter: name for name, parameter in named}
    if hasattr(optimizer, "init_state"):
        _load_quantized(optimizer, names, state)
        return
    filled = optimizer.state_dict()
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(ordered):
        part = state.part(names[parameter])
        tensors = {key: _laid_out(tensor, parameter) for key, tensor in part.tensors.items()}
        if tensors or part.values:
            filled["state"][number] = tensors | dict(part.values)
    optimizer.load_state_dict(filled)


def scale(settings: Optimizer, step: int, total: int) -> float:
    """Factor of the peak learning rate for 0-based `step` of `total`."""
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "wsd":
        return min(1.0, (total - step) / max(1, math.ceil(settings.decay * total)))
    progress = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1 + math.cos(math.pi * progress))


def _adamw(parameters: list[nn.Parameter], settings: Optimizer, epsilon: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "eps": epsilon}
    device = parameters[0].device
    if settings.name not in ("adamw8bit", "paged_adamw8bit"):
        return AdamW(filled, fused=device.type in FUSED, **options)
    require_support(settings, device)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    kind = PagedAdamW8bit if settings.name == "paged_adamw8bit" else AdamW8bit
    made: torch.optim.Optimizer = kind(filled, **options)
    return made


def _require_a_step(device: torch.device) -> None:
    """Try bitsandbytes' 8-bit AdamW on a vector large enough to be kept in 8 bits.

    Raises:
        ConfigError: bitsandbytes is not installed, or fails on the device; with what it said.
    """
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        hint = "pip install bitsandbytes, or use optimizer.name=adamw"
        raise ConfigError("adamw8bit needs bitsandbytes", where="optimizer.name", hint=hint) from error
    vector = nn.Parameter(torch.zeros(4096, device=device))
    vector.grad = torch.ones_like(vector)
    try:
        AdamW8bit([vector]).step()
    except RuntimeError as error:  # how bitsandbytes and torch say that a kernel is missing; told below in their words
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the installed bitsandbytes has no adamw8bit for {device.type}: {reason}",
            where="optimizer.name",
            hint="use optimizer.name=adamw, device=cuda, or bitsandbytes 0.50",
        ) from error


def _load_quantized(optimizer: Any, names: Mapping[nn.Parameter, str], state: State) -> None:
    """bitsandbytes makes the memory, some of it paged, which a tensor put in its place would not be."""
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            part = state.part(names[parameter])
            if not part.values:
                continue
            optimizer.init_state(group, parameter, number, place)
            remembered = optimizer.state[parameter]
            for key, tensor in part.tensors.items():
                remembered[key].copy_(tensor)
            remembered.update(part.values)


def _laid_out(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """In memory as the parameter is: one kernel goes over both."""
    if tensor.shape != parameter.shape:
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _for_muon(name: str, settings: Optimizer) -> bool:
    return settings.name == "muon" and not any(part in name for part in NOT_FOR_MUON)
