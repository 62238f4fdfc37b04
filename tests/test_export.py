"""`baton export`: what is written is the stage's model, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from data.template import ChatTemplate
from pipeline import cli, durable, handover
from pipeline import export as exporting
from pipeline import manifest as manifests
from stages.core.models import LanguageModel

pytestmark = pytest.mark.chain


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


def tokens(seed: int, rows: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randint(5, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def by_peft(run: Path, stage: str) -> Any:
    """The stage's model as peft puts it together, without Baton."""
    if (run / "stages" / stage / "model.safetensors").is_file():
        return AutoModelForCausalLM.from_pretrained(run / "stages" / stage)
    base = AutoModelForCausalLM.from_pretrained(run / "stages" / "sft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers a question by the name that it had before
        return PeftModel.from_pretrained(base, str(run / "stages" / stage)).eval()


@pytest.mark.parametrize("stage", ["base", "sft", "dpo", "ppo"])
def test_an_exported_model_is_the_stage_s(chain: Path, tmp_path: Path, stage: str) -> None:
    assert baton("export", chain / "stages" / stage, "--to", tmp_path / "out") == 0
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        difference = (written(tokens(1)).logits - by_peft(chain, stage)(tokens(1)).logits).abs().max()
    assert difference < 1e-4
    assert not list((tmp_path / "out").glob("adapter*"))
    record = exporting.ExportRecord.model_validate_json((tmp_path / "out" / "baton.json").read_bytes())
    assert record.digest == manifests.load(chain / "stages" / stage).digest
    assert 0 <= record.largest_difference < 1e-4 < record.largest_value
    assert list(manifests.differences(tmp_path / "out", record.outputs, exporting.FILE_NAME)) == []


def test_the_largest_difference_is_printed(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baton("export", chain / "stages" / "dpo", "--to", tmp_path / "out")
    record = exporting.ExportRecord.model_validate_json((tmp_path / "out" / "baton.json").read_bytes())
    assert f"largest difference from the stage: {record.largest_difference:.3g}" in capsys.readouterr().out


def test_generation_ends_where_the_template_ends_a_turn_and_where_the_base_ended(chain: Path, tmp_path: Path) -> None:
    stage = copy(chain, tmp_path, "base")
    own = AutoTokenizer.from_pretrained(stage).eos_token_id
    GenerationConfig(eos_token_id=[own, 7], temperature=0.5, do_sample=True).save_pretrained(stage)
    reseal(stage)
    baton("export", stage, "--to", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    stop = ChatTemplate(tokenizer).stop_id
    assert written.eos_token_id == [stop, 7]
    assert (written.pad_token_id, written.temperature) == (tokenizer.pad_token_id, 0.5)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(stage).chat_template


def test_an_existing_directory_is_left_alone(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert baton("export", chain / "stages" / "sft", "--to", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_what_computes_something_else_is_not_published(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = LanguageModel.save

    def disturbed(self: LanguageModel, directory: Path) -> None:
        with torch.no_grad():
            next(self.model.parameters()).mul_(1.01)
        save(self, directory)

    monkeypatch.setattr(LanguageModel, "save", disturbed)
    assert baton("export", chain / "stages" / "dpo", "--to", tmp_path / "out") == 5
    assert "differs from the stage's by up to" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_nothing(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "seal", full)
    assert baton("export", chain / "stages" / "sft", "--to", tmp_path / "out") == 6
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_stage_is_refused(chain: Path, tmp_path: Path) -> None:
    stage = copy(chain, tmp_path, "sft")
    content = bytearray((stage / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (stage / "model.safetensors").write_bytes(content)
    assert baton("export", stage, "--to", tmp_path / "out") == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["tokenizer", "evaluate"])
def test_a_stage_without_a_model_is_refused(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    assert baton("export", chain / "stages" / stage, "--to", tmp_path / "out") == 5
    assert "`export` needs a model or adapter or reward" in capsys.readouterr().err


def test_a_reward_model_becomes_a_classifier_with_its_scores(chain: Path, tmp_path: Path) -> None:
    stage = chain / "stages" / "reward"
    assert baton("export", stage, "--to", tmp_path / "out") == 0
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert classifier.config.num_labels == 1
    rows = tokens(2)
    states = by_peft(chain, "reward").get_base_model().base_model(rows).last_hidden_state[:, -1]
    head = load_file(stage / "head.safetensors")
    expected = states @ head["linear.weight"][0] + head["linear.bias"] - head["mean"]
    offset = json.loads((tmp_path / "out" / "baton.json").read_bytes())["score_offset"]
    with torch.no_grad():
        assert (classifier(rows).logits[:, 0] + offset - expected).abs().max() < 1e-4
    assert f"{offset:.6g}" in (tmp_path / "out" / "README.md").read_text()


def test_a_reward_model_that_classifiers_read_elsewhere_is_refused(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Padding that is the end of a turn makes them read the score one token too early."""
    monkeypatch.setattr(ChatTemplate, "padding_id", property(lambda template: template.stop_id))
    assert baton("export", chain / "stages" / "reward", "--to", tmp_path / "out") == 5
    assert "the exported model differs from the stage's by up to " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def copy(run: Path, place: Path, stage: str) -> Path:
    """A copy of a stage in another run's place."""
    shutil.copytree(run / "stages" / stage, place / "run" / "stages" / stage)
    return place / "run" / "stages" / stage


def reseal(stage: Path) -> None:
    """Have the manifest say what the files are now."""
    manifest = manifests.load(stage)
    (stage / manifests.FILE_NAME).unlink()
    outputs = durable.inventory(stage)
    found = {"outputs": outputs, "digest": manifests.content_digest(outputs), "model": handover.describe(stage)}
    durable.seal(stage, manifests.FILE_NAME, manifest.model_copy(update=found))
