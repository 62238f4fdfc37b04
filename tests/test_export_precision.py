"""In which precision an adapter on a base in bfloat16 is exported, and what is refused there."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.contract import Artifact
from pipeline.errors import ArtifactError
from stages.core import export
from stages.core.models import LanguageModel
from stages.core.roles import POLICY, Roles, open_role
from stages.core.scoring import record_probes


def adapter(directory: Path, size: float) -> Artifact:
    """An adapter whose weights have this size, on a base that is stored in bfloat16."""
    (directory / "base").mkdir()
    LanguageModel(models.model(dtype=torch.bfloat16), models.tokenizer(), models.HALF).save(directory / "base")
    base = Artifact(directory / "base", "model", "base", source="base")
    roles = open_role(base, POLICY, models.LORA, models.HALF)
    models.disturb(roles, POLICY, size=size)
    stored = models.save_role(roles, POLICY, directory / "dpo", base)
    with roles.use(POLICY):
        record_probes(stored.directory, models.responses(8), roles.base)
    return stored


@pytest.mark.parametrize(("size", "dtype"), [(0.003, torch.float32), (0.3, torch.bfloat16)])
def test_a_small_change_is_written_in_float32_and_a_large_one_as_the_base(
    tmp_path: Path, size: float, dtype: torch.dtype
) -> None:
    """A change of less than half of bfloat16's last digit would be lost."""
    stored, out = adapter(tmp_path, size), tmp_path / "out"
    out.mkdir()
    parity = export.write(stored, out)
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype
    assert parity.dtype == str(dtype).removeprefix("torch.")
    assert parity.lost < (1e-2 if dtype == torch.float32 else export.LOST)


@pytest.mark.parametrize("size", [0.003, 0.3])
@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_an_adapter_that_is_merged_twice_or_not_at_all_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float, factor: float
) -> None:
    stored, out, tensors = adapter(tmp_path, size), tmp_path / "out", Roles._tensors
    out.mkdir()

    def scaled(roles: Roles, role: str) -> dict[str, torch.Tensor]:
        return {name: each * factor if "lora_B" in name else each for name, each in tensors(roles, role).items()}

    monkeypatch.setattr(Roles, "_tensors", scaled)
    with pytest.raises(ArtifactError, match="the exported model differs from the stage's by up to"):
        export.write(stored, out)
