"""Estimates of the memory that a round takes beyond the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.config import Rounds
from stages.core.rl.experience import Experience
from stages.core.roles import POLICY, VALUE, Roles
from stages.core.rollout import CACHED_TOKENS

STATES = 34
"""Numbers a token keeps for the backward pass in each layer, in hidden sizes (Korthikanti et al. 2022, arXiv
2205.05198, section 4.1, without attention's scores); 2 with checkpointed layers."""
OF_ADAM = 12
"""Bytes of the gradient and the two moments of a trained number."""


def held(roles: Roles) -> int:
    """Bytes of all weights in memory: the base once, and every role's adapter and head."""
    parameters = [
        *roles.base.model.parameters(),
        *(each for head in roles.heads.values() for each in head.parameters()),
    ]
    return sum(each.numel() * each.element_size() for each in parameters)


def expected(roles: Roles, experiences: Sequence[Experience], settings: Rounds) -> int:
    """Bytes that sampling or an update takes at most, about, beyond the weights."""
    config = roles.base.model.config.get_text_config()
    bytes_each = torch.finfo(roles.base.compute.dtype).bits // 8
    trained = sum(each.numel() for role in (POLICY, VALUE) for _, each in roles.parameters(role))
    longest = max(len(tree.prompt) for each in experiences for tree in each.batch.trees) + settings.max_new_tokens
    rows = sum(each.batch.branches for each in experiences)
    cached = min(rows * longest, max(longest, CACHED_TOKENS * settings.tokens_per_batch))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = cached * 2 * config.num_hidden_layers * heads * head * bytes_each
    at_once = max(each.batch.token_count for each in experiences)
    kept = 2 if settings.gradient_checkpointing else STATES
    activations = at_once * config.num_hidden_layers * config.hidden_size * kept * bytes_each
    return trained * OF_ADAM + max(cache, activations)


def free(device: torch.device) -> int:
    """Bytes that can still be had on a device; 0 where that cannot be told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return _free_on_linux() if device.type == "cpu" else 0


def _free_on_linux() -> int:
    table = Path("/proc/meminfo")
    if not table.is_file():
        return 0
    sizes = dict(line.split(":", 1) for line in table.read_text().splitlines() if ":" in line)
    kibibytes = sizes.get("MemAvailable", "0 kB").split()[0]
    return int(kibibytes) * 1024
