"""What an adapter is made of: its configuration in peft's terms, and what DoRA and PiSSA do otherwise than peft.

DoRA keeps peft's formula and files; its norms are computed in float32, so that a fresh adapter changes nothing
in any precision, and from products of the low-rank factors, so that no second matrix of the weights' size is made in
a forward pass. PiSSA leaves the base alone, which other roles and the reference sit on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.config import Lora
from pipeline.errors import ConfigError
from pipeline.terminal import printable
from stages.core.models import decoder_layers

SMALLEST_SQUARE = 1e-12


def peft_config(lora: Lora, model: PreTrainedModel) -> LoraConfig:
    """The adapter's configuration, as it is stored beside it.

    Raises:
        ConfigError: The model has fewer layers than are to be adapted, or `targets` names others than can be.
    """
    rank, alpha = _rank_and_alpha(lora)
    # No dropout: policy and reference must agree exactly at the start, and PPO's ratio must be 1.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float is as good
        lora_dropout=0.0,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        task_type="CAUSAL_LM",
        **_targets(lora, model),
    )
    if lora.variant == "dora" or lora.initialisation == "pissa":
        _require_linear(config, model)
    return config


def not_followed(lora: Lora, config: LoraConfig) -> list[str]:
    """The settings that were given of `lora` and that an adapter, which is there already, has otherwise: its rank,
    alpha, variant and layers. Names of layers are not compared, which peft keeps in ways of its own."""
    layers: Any = config.layers_to_transform or ()
    rank, alpha = _rank_and_alpha(lora)
    variant = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    compared = {
        "rank": (rank, config.r),
        "alpha": (round(alpha, 6), round(config.lora_alpha, 6)),
        "top_layers": (lora.top_layers, len(layers) or None),
        "variant": (lora.variant, variant),
    }
    given = {name: each for name, each in compared.items() if name in lora.model_fields_set}
    return [f"{name}={asked} (it has {own})" for name, (asked, own) in given.items() if asked != own]


def _rank_and_alpha(lora: Lora) -> tuple[int, float]:
    """Of the adapter as it is stored. PiSSA's has twice the rank, for what is trained and what is taken off, and the
    same scaling."""
    if lora.initialisation != "pissa":
        return lora.rank, lora.alpha
    return 2 * lora.rank, lora.alpha * (math.sqrt(2) if lora.variant == "rslora" else 2)


def install_norms(layers: Iterable[LoraLayer], role: str) -> None:
    """Replace peft's DoRA layers of a role by the ones of this file; layers without DoRA stay as they are."""
    for layer in layers:
        if role in layer.lora_magnitude_vector:
            magnitudes: Any = layer.lora_magnitude_vector[role]
            base: Any = layer.get_base_layer()
            if _has_eight_bits(base) and base.state.SCB is not None:
                # peft has read the weights, and on a processor the layer would take them for new ones without scales.
                base.weight.CB = None
            layer.lora_magnitude_vector[role] = _Dora(magnitudes, base)


def start_principal(layers: Iterable[LoraLayer], role: str) -> None:
    """Let a role of rank 2r begin as PiSSA (Meng et al. 2024, arXiv 2404.02948, eq. 2-4), without moving the base.

    With W = U S V and s the adapter's scaling, B0 = U_r sqrt(S_r / s) and A0 = sqrt(S_r / s) V_r. PiSSA trains B and A
    from there on a base that is less by s B0 A0; here the update is s (B A - B0 A0), which is the same model. It is
    trained by the differences b = B - B0 and a = A - A0, which begin at zero: B A - B0 A0 = [B0 + b, b] [a; A0] is
    exactly zero then, an ordinary adapter of rank 2r, and weight decay pulls towards the base.

    Raises:
        ConfigError: The rank is larger than a matrix has singular values.
    """
    for layer in layers:
        if role not in layer.lora_A:
            continue
        down, up = _principal(layer, role)
        parametrize.register_parametrization(layer.lora_A[role], "weight", _Down(down))
        parametrize.register_parametrization(layer.lora_B[role], "weight", _Up(up))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with PiSSA's weights as what they amount to."""
    found = {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            found[f"{name}.weight"] = module.weight.detach()
    return found


class _Dora(DoraLinearLayer):
    """The magnitudes of one layer's weights under one role (Liu et al. 2024, arXiv 2402.09353, eq. 5).

    The output is m / |W + s B A| (W x + s B A x), the norm by output and without a gradient (their section 4.3).
    |W + s B A|^2 = |W|^2 + 2 s <W A', B> + s^2 <B A A', B>, output by output.
    """

    squares: Tensor

    def __init__(self, magnitudes: DoraLinearLayer, base: nn.Module) -> None:
        super().__init__(magnitudes.fan_in_fan_out)
        squares = _weight(base, self.fan_in_fan_out).float().square().sum(1)
        self.register_buffer("squares", squares, persistent=False)
        self.weight = magnitudes.weight
        self.weight.data.copy_(squares.sqrt())

    def forward(
        self,
        x: Any,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: Any,
        base_layer: Any,
        base_result: Any = None,
        adapter_name: Any = "",
    ) -> Tensor:
        """What is to be added to `base_result`, the base layer's output."""
        factor = self.weight / self._norms(base_layer, lora_A.weight, lora_B.weight, scaling)
        plain = base_result if base_layer.bias is None else base_result - base_layer.bias
        return (factor - 1) * plain + factor * scaling * lora_B(lora_A(x))

    @torch.no_grad()
    def _norms(self, base: nn.Module, down: Any, up: Any, scaling: float) -> Tensor:
        with torch.autocast(down.device.type, enabled=False):
            weight = _weight(base, self.fan_in_fan_out)
            crossed = (weight @ down.T.to(weight.dtype)).float()
            change = 2 * scaling * (crossed * up).sum(1) + scaling**2 * (up @ (down @ down.T) * up).sum(1)
        return (self.squares + change).clamp(min=SMALLEST_SQUARE).sqrt()


class _Down(nn.Module):
    """[a; A0] of the trained a: [2r, inputs] of [r, inputs]."""

    principal: Tensor

    def __init__(self, principal: Tensor) -> None:
        super().__init__()
        self.register_buffer("principal", principal)

    def forward(self, trained: Tensor) -> Tensor:
        return torch.cat([trained, self.principal])

    def right_inverse(self, whole: Tensor) -> Tensor:
        return torch.zeros_like(whole[: len(whole) // 2])


class _Up(nn.Module):
    """[B0 + b, b] of the trained b: [outputs, 2r] of [outputs, r]."""

    principal: Tensor

    def __init__(self, principal: Tensor) -> None:
        super().__init__()
        self.register_buffer("principal", principal)

    def forward(self, trained: Tensor) -> Tensor:
        return torch.cat([self.principal + trained, trained], 1)

    def right_inverse(self, whole: Tensor) -> Tensor:
        return torch.zeros_like(whole[:, : whole.shape[1] // 2])


def _principal(layer: Any, role: str) -> tuple[Tensor, Tensor]:
    """A0 [r, inputs] and B0 [outputs, r]."""
    rank = layer.r[role] // 2
    weight = _weight(layer.get_base_layer(), layer.fan_in_fan_out).float()
    if rank > min(weight.shape):
        raise ConfigError(
            f"rank {rank} is more than a matrix of {weight.shape[0]} by {weight.shape[1]} has",
            where="lora.rank",
            hint=f"use at most {min(weight.shape)} with initialisation=pissa, or leave that out",
        )
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[:rank] / layer.scaling[role]).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def _weight(base: Any, transposed: bool) -> Tensor:
    """A layer's weights as [outputs, inputs]; GPT-2 keeps them the other way round."""
    if _has_eight_bits(base):
        from bitsandbytes.functional import int8_vectorwise_dequant

        # After its first pass the layer keeps the scales in its state.
        scales = base.weight.SCB if base.state.SCB is None else base.state.SCB
        return int8_vectorwise_dequant(base.weight.data, scales)
    weight: Tensor = dequantize_module_weight(base).detach()
    return weight.T if transposed else weight


def _has_eight_bits(base: Any) -> bool:
    return type(base.weight).__name__ == "Int8Params"


def _targets(lora: Lora, model: PreTrainedModel) -> dict[str, Any]:
    if lora.top_layers is None:
        return {"target_modules": lora.targets}
    layers = decoder_layers(model)
    if lora.top_layers > len(layers):
        raise ConfigError(
            f"top_layers={lora.top_layers}, but the model has {len(layers)} decoder layers",
            where="lora.top_layers",
            hint="lower it, or leave it out to adapt all layers",
        )
    chosen = layers[-lora.top_layers :]
    if isinstance(lora.targets, list):
        _require_within(chosen, lora.targets)
    names = lora.targets if isinstance(lora.targets, list) else _linear_names(chosen)
    return {"target_modules": names, "layers_to_transform": list(range(len(layers) - lora.top_layers, len(layers)))}


def _require_within(layers: Iterable[nn.Module], names: Iterable[str]) -> None:
    """peft would adapt layers elsewhere in the model too where they have such a name."""
    paths = [f".{path}" for layer in layers for path, _ in layer.named_modules()]
    for name in names:
        if not any(path.endswith(f".{name}") for path in paths):
            raise ConfigError(
                f"the adapter does not fit the model: the decoder layers have no `{printable(name)}`",
                where="lora.targets",
                hint="with top_layers, name layers within the decoder layers",
            )


def _require_linear(config: LoraConfig, model: PreTrainedModel) -> None:
    """DoRA and PiSSA are of the weights of linear layers; peft fails with others, or trains a plain adapter."""
    if config.target_modules == "all-linear":
        return
    for name, module in model.named_modules():
        layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if not isinstance(layer, (nn.Linear, Conv1D)) and check_target_module_exists(config, name):
            raise ConfigError(
                f"`{printable(name)}` is not a linear layer, as variant=dora and initialisation=pissa need",
                where="lora.targets",
                hint="leave it out, or use neither",
            )


def _linear_names(layers: Iterable[nn.Module]) -> list[str]:
    """Names of the linear layers within decoder layers, those that carry an adapter already included."""
    kinds = (nn.Linear, Conv1D, LoraLayer)
    found: set[str] = set()
    for layer in layers:
        paths = [path.split(".") for path, module in layer.named_modules() if isinstance(module, kinds)]
        found |= {path[-1] for path in paths if not any(part.startswith(("lora_", "base_layer")) for part in path)}
    return sorted(found)
