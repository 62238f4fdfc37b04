"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Muon

from pipeline.config import Optimizer

Named = Iterable[tuple[str, nn.Parameter]]
# Rows of these are looked up or scored one by one, so orthogonalising the whole matrix has no meaning.
NOT_FOR_MUON = ("embed", "wte", "wpe", "lm_head", "head.")


def build(named: Named, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers for the parameters that are trained.

    Weight decay is for matrices only. With `muon` (Jordan et al. 2024; torch.optim.Muon), matrices other than
    embeddings and heads are orthogonalised, scaled to AdamW's update size so that one learning rate serves
    both.
    """
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    matrices = [parameter for name, parameter in trained if parameter.ndim == 2 and _for_muon(name, settings)]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for _, parameter in trained if id(parameter) not in chosen]
    built: list[torch.optim.Optimizer] = []
    if matrices:
        built.append(
            Muon(
                matrices,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest:
        groups = [
            {"params": [each for each in rest if each.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [each for each in rest if each.ndim < 2], "weight_decay": 0.0},
        ]
        filled = [group for group in groups if group["params"]]
        built.append(AdamW(filled, lr=settings.learning_rate, betas=settings.betas, eps=1e-8))
    return built


def scale(settings: Optimizer, step: int, total: int) -> float:
    """Factor of the peak learning rate for 0-based `step` of `total`."""
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1 + math.cos(math.pi * progress))


def _for_muon(name: str, settings: Optimizer) -> bool:
    return settings.name == "muon" and not any(part in name for part in NOT_FOR_MUON)
