"""Every mistake in handing a model on is refused, by whoever receives it, with the place and both values.

The faults are planted in real stages as an honest but mistaken tool would leave them: with all hashes made anew, so
that hashes do not show them, and where it says so with the record of the model made anew, too. The same faults are
planted in models that no stage made, in a directory and in the hub's cache, where there is nothing to compare with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import cli, fingerprint, handover, inputs, seal
from pipeline import manifest as manifests
from pipeline.errors import ArtifactError
from pipeline.fingerprint import file_sha256
from pipeline.manifest import FILE_NAME, Manifest, OutputRecord
from pipeline.store import RunDirectory
from stages.core import handover as receiving
from stages.core.lineup import Lineup

pytestmark = [pytest.mark.chain, pytest.mark.usefixtures("report_of_one_line")]

Plant = Callable[[Path], None]
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
COMMIT = "c" * 40


@pytest.fixture
def config(chain: Path) -> Path:
    """The configuration of a finished run."""
    return chain.parent / "chain.yaml"


@pytest.fixture
def run(config: Path, tmp_path: Path) -> Path:
    """A copy of the run to plant a fault in."""
    return Path(shutil.copytree(config.parent / "run", tmp_path / "run"))


def baton(config: Path, *arguments: str) -> int:
    return cli.execute(cli.app, ["run", str(config), *arguments])


def edited(file: str, **fields: Any) -> Plant:
    """Other values in a JSON file."""

    def plant(directory: Path) -> None:
        path = directory / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return plant


def weights(change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> Plant:
    """Other tensors in a file of weights."""

    def plant(directory: Path) -> None:
        tensors = load_file(directory / file)
        change(tensors)
        save_file(tensors, directory / file, metadata={"format": "pt"})

    return plant


def without(file: str) -> Plant:
    return lambda directory: (directory / file).unlink()


def together(*plants: Plant) -> Plant:
    def plant(directory: Path) -> None:
        for each in plants:
            each(directory)

    return plant


def with_words_exchanged(directory: Path) -> None:
    """The last two words of the vocabulary change places."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    first, second = sorted(words, key=words.get)[-2:]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(tokenizer))


def with_one_more_token(directory: Path) -> None:
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 320, "content": "<|new|>"})
    path.write_text(json.dumps(tokenizer))


def with_another_template(directory: Path) -> None:
    path = directory / "chat_template.jinja"
    changed = path.read_text().replace("{% else %}{{ message", "{% else %}{{ '\n' + message")
    assert changed != path.read_text()
    path.write_text(changed)


def with_adapter_beside(directory: Path) -> None:
    """As a tool leaves it that merges an adapter and forgets to take it away."""
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')


DROPPED = weights(lambda tensors: tensors.pop(UP))
OTHER_SHAPE = weights(lambda tensors: tensors.update({UP: torch.zeros(63, 32)}))
UNEXPECTED = weights(lambda tensors: tensors.update({"score.weight": torch.zeros(1, 32)}))
NOT_A_NUMBER = weights(lambda tensors: tensors[EMBEDDING][300].fill_(torch.nan))
INFINITE_WHERE_NOBODY_LOOKS = weights(lambda tensors: tensors[EMBEDDING][0, 5].fill_(torch.inf))
HALF = weights(lambda tensors: tensors.update({name: each.half() for name, each in tensors.items()}))
UNTIED = edited("config.json", tie_word_embeddings=False)
FEW_WORDS = together(
    edited("config.json", vocab_size=300),
    weights(lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:300].clone()})),
)
OWN_HEAD = weights(lambda tensors: tensors.update({"lm_head.weight": torch.ones(320, 32)}))
HEAD = "head.safetensors"
NEW_HEAD = weights(lambda tensors: tensors.update({"linear.weight": torch.ones(1, 32)}), HEAD)
INFINITE_HEAD = weights(lambda tensors: tensors["linear.weight"][0, 3].fill_(torch.inf), HEAD)
SEVERAL_HEADS = weights(
    lambda tensors: tensors.update(
        {"linear.weight": tensors["linear.weight"].repeat(3, 1), "linear.bias": tensors["linear.bias"].repeat(3)}
    ),
    HEAD,
)
ADAPTER = "adapter_model.safetensors"
LORA_A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
ADAPTER_NOT_A_NUMBER = weights(lambda tensors: tensors[LORA_A].fill_(torch.nan), ADAPTER)
ADAPTER_DROPPED = weights(lambda tensors: tensors.pop(LORA_A), ADAPTER)


@dataclass(frozen=True)
class Receiver:
    """The stage that a fault is planted in, and the run that receives it."""

    stage: str
    arguments: tuple[str, ...]


RECEIVERS = {
    "sft": Receiver("sft", ("--only", "dpo", "--force", "dpo")),
    "reward": Receiver("reward", ("--only", "ppo", "--force", "ppo")),
    "dpo": Receiver("dpo", ("--only", "ppo", "--force", "ppo", "stages.ppo.policy=dpo")),
    "tokenizer": Receiver("tokenizer", ("--only", "base", "--force", "base")),
}
IN_TOKENIZER = "the tokenizer stage's other tokenizer"
RESEALED: dict[str, tuple[str, Plant, str]] = {
    "a tensor dropped": ("sft", DROPPED, f"sft: model.safetensors: {UP}: recorded F32 [64, 32], found absent"),
    "a tensor of another shape": ("sft", OTHER_SHAPE, f"{UP}: recorded F32 [64, 32], found F32 [63, 32]"),
    "an unexpected tensor": ("sft", UNEXPECTED, "score.weight: recorded absent, found F32 [1, 32]"),
    "another precision": ("sft", HALF, f"{EMBEDDING}: recorded F32 [320, 32], found F16 [320, 32]"),
    "a tie flag flipped": ("sft", UNTIED, "sft: config.json: tie_word_embeddings: recorded true, found false"),
    "a head beside tied embeddings": ("sft", OWN_HEAD, "lm_head.weight: recorded absent, found F32 [320, 32]"),
    "fewer positions": (
        "sft",
        edited("config.json", max_position_embeddings=64),
        "sft: config.json: max_position_embeddings: recorded 512, found 64",
    ),
    "fewer words": ("sft", FEW_WORDS, "sft: config.json: vocab_size: recorded 320, found 300"),
    "another end in the configuration": (
        "sft",
        edited("config.json", eos_token_id=5),
        "sft: config.json: eos_token_id: recorded 1, found 5",
    ),
    "another end in generation": (
        "sft",
        edited("generation_config.json", eos_token_id=5),
        "sft: generation_config.json: eos_token_id: recorded 1, found 5",
    ),
    "an adapter beside merged weights": (
        "sft",
        with_adapter_beside,
        "sft/adapter_config.json: an adapter beside whole",
    ),
    "another tokenizer": ("sft", with_words_exchanged, "sft: the tokenizer is not the stage's own: recorded "),
    "a token more": ("sft", with_one_more_token, "sft: the tokenizer is not the stage's own: recorded "),
    "another template": ("sft", with_another_template, "sft: the chat template is not the stage's own: recorded "),
    "probes gone": ("sft", without("probes.json"), "sft/probes.json: a stage without its probes"),
    "no probes in the file": (
        "sft",
        edited("probes.json", inputs=[], outputs=[]),
        "sft/probes.json: 0 inputs with 0 outputs",
    ),
    "probes that are none": ("sft", edited("probes.json", inputs=3), "sft/probes.json: no readable probes"),
    "weights cut off": (
        "sft",
        lambda directory: (directory / "model.safetensors").write_bytes(b"\1\0\0\0"),
        "sft/model.safetensors: no readable list of tensors",
    ),
    "a configuration that is none": (
        "sft",
        lambda directory: (directory / "config.json").write_text("[1]"),
        "sft/config.json: not a JSON object",
    ),
    "a head missing": ("reward", without(HEAD), "reward: head.safetensors: recorded a file, found absent"),
    "several heads in the place of one": (
        "reward",
        SEVERAL_HEADS,
        "reward: head.safetensors: linear.bias: recorded F32 [1], found F32 [3]",
    ),
    "a reward model's other tokenizer": (
        "reward",
        with_words_exchanged,
        "reward: the tokenizer is not the stage's own",
    ),
    "a reward model's other template": (
        "reward",
        with_another_template,
        "reward: the chat template is not the stage's",
    ),
    "an adapter's other strength": (
        "dpo",
        edited("adapter_config.json", lora_alpha=99),
        "dpo: adapter_config.json: lora_alpha: recorded 32.0, found 99",
    ),
    "an adapter's tensor dropped": (
        "dpo",
        ADAPTER_DROPPED,
        f"dpo: adapter_model.safetensors: {LORA_A}: recorded F32 [4",
    ),
    "an adapter's other tokenizer": (
        "dpo",
        with_words_exchanged,
        "dpo: the tokenizer is not the stage's own: recorded ",
    ),
    IN_TOKENIZER: (
        "tokenizer",
        with_words_exchanged,
        "tokenizer: the tokenizer is not the stage's own: recorded ",
    ),
}
RECORDED_ANEW: dict[str, tuple[str, Plant, str]] = {
    "a tensor dropped": ("sft", DROPPED, f"sft: tensors missing: {UP}"),
    "a tensor of another shape": ("sft", OTHER_SHAPE, f"{UP} (63, 32) in the file, (64, 32) in the model"),
    "an unexpected tensor": ("sft", UNEXPECTED, "sft: tensors not of this model: score.weight"),
    "a tie flag flipped": ("sft", UNTIED, "sft: tensors missing: lm_head.weight"),
    "a head beside tied embeddings": ("sft", OWN_HEAD, "sft/probes.json: probe 0: recorded -"),
    "fewer words": ("sft", FEW_WORDS, "sft: the tokenizer has 320 tokens, the model's embedding 300 rows"),
    "another end in the configuration": (
        "sft",
        edited("config.json", eos_token_id=5),
        "sft/config.json: eos_token_id is 5, the tokenizer's eos token is 1",
    ),
    "another padding in the configuration": (
        "sft",
        edited("config.json", pad_token_id=1),
        "sft/config.json: pad_token_id is 1, the tokenizer's pad token is 0",
    ),
    "another end in generation": (
        "sft",
        edited("generation_config.json", eos_token_id=[5, 6]),
        "sft/generation_config.json: eos_token_id is [5, 6], the tokenizer's eos token is 1",
    ),
    "weights that are no numbers": (
        "sft",
        NOT_A_NUMBER,
        f"sft: tensor `{EMBEDDING}` is not finite: 32 of its 10,240 numbers",
    ),
    "an infinite weight where no probe looks": (
        "sft",
        INFINITE_WHERE_NOBODY_LOOKS,
        f"sft: tensor `{EMBEDDING}` is not finite: 1 of its 10,240 numbers",
    ),
    "a head missing": ("reward", without(HEAD), "reward/head.safetensors: the reward head is missing"),
    "a head made anew": ("reward", NEW_HEAD, "reward/probes.json: probe 0: recorded "),
    "an infinite head": (
        "reward",
        INFINITE_HEAD,
        "reward/head.safetensors: tensor `linear.weight` is not finite: 1 of",
    ),
    "a head without its centre": (
        "reward",
        weights(lambda tensors: tensors.pop("mean"), HEAD),
        "reward/head.safetensors: the reward head holds {'linear.bias': (1,), 'linear.weight': (1, 32)}, expected",
    ),
    "a reward model's other tokenizer": ("reward", with_words_exchanged, "reward: its tokenizer is "),
    "a reward model's other template": (
        "reward",
        with_another_template,
        "reward: the reward model reads the chat templ",
    ),
    "an adapter's other strength": (
        "dpo",
        edited("adapter_config.json", lora_alpha=99),
        "dpo/probes.json: probe 0: recorded -",
    ),
    "an adapter's tensor dropped": (
        "dpo",
        ADAPTER_DROPPED,
        f"dpo: the adapter does not fit its base at `{LORA_A}`: abs",
    ),
    "an adapter that is no number": (
        "dpo",
        ADAPTER_NOT_A_NUMBER,
        f"dpo/adapter_model.safetensors: tensor `{LORA_A}` is not finite",
    ),
    "an adapter's other tokenizer": ("dpo", with_words_exchanged, "dpo: its tokenizer is "),
}
FOREIGN: dict[str, tuple[Plant, str]] = {
    "a tensor dropped": (DROPPED, f": tensors missing: {UP}"),
    "a tensor of another shape": (OTHER_SHAPE, f"{UP} (63, 32) in the file, (64, 32) in the model"),
    "the head of a classifier": (UNEXPECTED, ": tensors not of this model: score.weight"),
    "a tie flag flipped": (UNTIED, ": tensors missing: lm_head.weight"),
    "fewer words": (FEW_WORDS, ": the tokenizer has 320 tokens, the model's embedding 300 rows"),
    "a token more": (with_one_more_token, ": the tokenizer has 321 tokens, the model's embedding 320 rows"),
    "another end": (
        edited("config.json", eos_token_id=5),
        "/config.json: eos_token_id is 5, the tokenizer's eos token is 1",
    ),
    "another padding": (
        edited("config.json", pad_token_id=7),
        "/config.json: pad_token_id is 7, the tokenizer's pad token is 0",
    ),
    "another end in generation": (
        edited("generation_config.json", eos_token_id=7),
        "/generation_config.json: eos_token_id is 7, the tokenizer's eos token is 1",
    ),
    "weights that are no numbers": (NOT_A_NUMBER, f": tensor `{EMBEDDING}` is not finite: 32 of its 10,240 numbers"),
    "an infinite weight": (INFINITE_WHERE_NOBODY_LOOKS, f": tensor `{EMBEDDING}` is not finite: 1 of its 10,240"),
    "an adapter beside merged weights": (with_adapter_beside, "/adapter_config.json: an adapter beside whole weights"),
    "no template": (without("chat_template.jinja"), "the tokenizer has no chat template"),
}


def reseal(directory: Path, *, recorded: bool = False, **changes: Any) -> Manifest:
    """Make a manifest say of a directory's files what they are; with `recorded` also of the model and tokenizer."""
    before = manifests.load(directory)
    logs = {each.path for each in before.outputs if each.role == "log"}
    outputs = [
        OutputRecord(
            path=path.name,
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
            role="log" if path.name in logs else "artifact",
        )
        for path in manifests.walk(directory)
        if path.name != FILE_NAME
    ]
    if recorded:
        changes |= {"model": handover.describe(directory), "tokenizer": known_of(directory, before)}
    update = {"outputs": outputs, "digest": manifests.content_digest(outputs), **changes}
    (directory / FILE_NAME).write_text(seal.sealed(before.model_copy(update=update)))
    return manifests.verify(directory)


def known_of(directory: Path, before: Manifest) -> dict[str, Any]:
    from data.template import tokenizer_record
    from data.tokenizer import load_tokenizer

    return tokenizer_record(load_tokenizer(directory)) if before.tokenizer else {}


def rebase(run: Path, *, also_policy: bool = False) -> None:
    """Make the stages on `sft` say that they were trained on what it is now."""
    digest = manifests.load(run / "stages" / "sft").digest
    for name in ("reward", "dpo"):
        manifest = manifests.load(run / "stages" / name)
        assert manifest.adaptation is not None
        reference = digest if manifest.adaptation.reference else None
        adaptation = manifest.adaptation.model_copy(update={"base": digest, "reference": reference})
        given = manifest.inputs["policy"].model_copy(update={"digest": digest})
        reseal(run / "stages" / name, adaptation=adaptation, inputs={**manifest.inputs, "policy": given})


def refused(config: Path, run: Path, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 5) -> str:
    """What a run says that ends with this code and leaves all published stages as they were."""
    before = {path: path.read_bytes() for path in manifests.walk(run / "stages")}
    capsys.readouterr()
    assert baton(config, f"output={run}", *arguments) == code
    assert {path: path.read_bytes() for path in manifests.walk(run / "stages")} == before
    said: str = capsys.readouterr().err
    assert said.startswith("error: ")
    return said


def opened(run: Path, reference: str) -> None:
    """What every stage does with a model that it is handed: find it, open it, and compute its probes again."""
    artifact = inputs.resolve(reference, RunDirectory(run), RECEIVERS, download=True)
    if artifact.kind == "tokenizer":
        receiving.open_tokenizer(artifact)
    elif artifact.kind == "reward":
        Lineup({}, models.CPU).judge(artifact)
    else:
        Lineup({"model": artifact}, models.CPU)


def resealed(run: Path, fault: str) -> tuple[str, str]:
    """Plant a fault and make all hashes anew; returns the stage and what is to be said."""
    name, plant, message = RESEALED[fault]
    plant(run / "stages" / name)
    reseal(run / "stages" / name)
    if name == "sft":
        rebase(run)
    return name, message


@pytest.mark.parametrize("fault", RESEALED)
def test_a_fault_with_hashes_made_anew_is_refused(run: Path, fault: str) -> None:
    name, message = resealed(run, fault)
    with pytest.raises(ArtifactError) as caught:
        opened(run, name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "fault", ["a tensor dropped", "probes gone", "a head missing", "an adapter's other strength", IN_TOKENIZER]
)
def test_a_run_ends_where_it_is_handed_such_a_fault(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    name, message = resealed(run, fault)
    assert message in refused(config, run, capsys, *RECEIVERS[name].arguments)


@pytest.mark.parametrize("fault", RECORDED_ANEW)
def test_a_fault_with_hashes_and_records_made_anew_is_refused(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    name, plant, message = RECORDED_ANEW[fault]
    plant(run / "stages" / name)
    reseal(run / "stages" / name, recorded=True)
    if name == "sft":
        rebase(run)
    assert message in refused(config, run, capsys, *RECEIVERS[name].arguments)


def foreign(run: Path, directory: Path) -> Path:
    """The model of the stage `sft` as a directory that no stage made."""
    made = Path(shutil.copytree(run / "stages" / "sft", directory))
    for name in (FILE_NAME, "probes.json", "metrics.jsonl"):
        (made / name).unlink()
    return made


def cached(directory: Path, cache: Path) -> str:
    """A model put into the hub's cache, where large files are known by their content; returns its reference."""
    root = cache / "models--owner--name"
    for folder in (root / "blobs", root / "refs", root / "snapshots" / COMMIT):
        folder.mkdir(parents=True)
    for path in directory.iterdir():
        blob = root / "blobs" / file_sha256(path)
        shutil.copyfile(path, blob)
        (root / "snapshots" / COMMIT / path.name).symlink_to(blob)
    (root / "refs" / "main").write_text(COMMIT)
    return "hub:owner/name@main"


@pytest.mark.parametrize("place", ["directory", "hub"])
@pytest.mark.parametrize("fault", FOREIGN)
def test_a_fault_in_a_model_that_no_stage_made_is_refused(
    config: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    place: str,
) -> None:
    plant, message = FOREIGN[fault]
    directory = foreign(run, tmp_path / "model")
    plant(directory)
    reference = str(directory)
    if place == "hub":
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        reference = cached(directory, tmp_path / "hub")
    with pytest.raises(ArtifactError) as caught:
        opened(run, reference)
    assert message in str(caught.value)
    assert (COMMIT if place == "hub" else str(directory)) in str(caught.value)
    if fault in ("a tensor dropped", "another end", "no template"):
        said = refused(config, run, capsys, "--only", "dpo", f"stages.dpo.policy={reference}")
        assert message in said


def test_a_model_that_no_stage_made_is_taken_as_it_is(config: Path, run: Path, tmp_path: Path) -> None:
    directory = foreign(run, tmp_path / "model")
    assert baton(config, f"output={run}", "--only", "dpo", f"stages.dpo.policy={directory}") == 0


def test_a_model_may_begin_texts_and_pad_what_it_generates_otherwise_than_its_tokenizer(
    config: Path, run: Path, tmp_path: Path
) -> None:
    """As models of the hub do; Baton takes neither from there."""
    directory = foreign(run, tmp_path / "model")
    edited("config.json", bos_token_id=5, text_config=None)(directory)
    edited("generation_config.json", bos_token_id=6, pad_token_id=7)(directory)
    assert baton(config, f"output={run}", "--only", "dpo", f"stages.dpo.policy={directory}") == 0


def test_a_model_that_no_stage_made_is_no_reward_model(
    config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = foreign(run, tmp_path / "model")
    edited("config.json", architectures=["LlamaForSequenceClassification"], num_labels=3)(directory)
    said = refused(config, run, capsys, "--only", "ppo", f"stages.ppo.reward={directory}")
    assert f"{directory}: `{directory}` is a model, `reward` needs a reward" in said


def test_stages_whose_directories_changed_places_are_refused(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = run / "stages"
    for old, new in (("sft", "between"), ("base", "sft"), ("between", "base")):
        (stages / old).rename(stages / new)
    said = refused(config, run, capsys, "--only", "dpo", "--force", "dpo")
    assert "stages/sft: holds the stage `base`, expected `sft`" in said


@pytest.mark.parametrize("field", ["seed", "kind", "adaptation", "tokenizer", "metrics", "started"])
def test_a_manifest_that_was_edited_is_refused(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    path = run / "stages" / "sft" / FILE_NAME
    fields = json.loads(path.read_text())
    fields[field] = {"seed": 7, "kind": "adapter", "started": "yesterday", "metrics": {}}.get(field, fields["settings"])
    if field == "adaptation":
        fields[field] = {"base": "0" * 64, "base_source": "base"}
    path.write_text(json.dumps(fields, indent=2) + "\n")
    said = refused(config, run, capsys, "--only", "dpo", "--force", "dpo")
    assert "stages/sft: damaged: manifest.json: changed since it was written, expected what its seal is of" in said


def test_a_base_that_was_made_again_otherwise_is_refused(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = manifests.load(run / "stages" / "sft").digest
    weights(lambda tensors: tensors[UP].mul_(1.01))(run / "stages" / "sft")
    new = reseal(run / "stages" / "sft").digest
    said = refused(config, run, capsys, "--only", "ppo", "--force", "ppo")
    assert f"stages/reward: its base `sft` has digest {new}, it was trained on {old}" in said


def other_base(run: Path) -> dict[str, Any]:
    """What the manifest of `dpo` would say if it had been trained on `base`."""
    manifest, base = manifests.load(run / "stages" / "dpo"), manifests.load(run / "stages" / "base")
    assert manifest.adaptation is not None
    changed = {"base": base.digest, "base_source": "base", "reference": base.digest}
    given = manifest.inputs["policy"].model_copy(update={"digest": base.digest, "source": "base"})
    return {
        "adaptation": manifest.adaptation.model_copy(update=changed),
        "inputs": {**manifest.inputs, "policy": given},
    }


def test_an_adapter_on_another_base_is_refused(config: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = other_base(run)
    reseal(run / "stages" / "dpo", adaptation=changes["adaptation"])
    said = refused(config, run, capsys, *RECEIVERS["dpo"].arguments)
    sft, base = (manifests.load(run / "stages" / name).digest for name in ("sft", "base"))
    assert f"dpo/manifest.json: its reference has digest {base}, the policy it was trained from {sft}" in said
    reseal(run / "stages" / "dpo", **changes)
    said = refused(config, run, capsys, "--only", "evaluate", "stages.evaluate.models=[dpo]")
    assert "dpo/probes.json: probe 0: recorded -" in said


def test_a_reference_that_is_not_the_parent_is_refused(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, base = manifests.load(run / "stages" / "dpo"), manifests.load(run / "stages" / "base")
    assert manifest.adaptation is not None
    other = manifest.adaptation.model_copy(update={"reference": base.digest})
    reseal(run / "stages" / "dpo", adaptation=other)
    said = refused(config, run, capsys, *RECEIVERS["dpo"].arguments)
    policy = manifest.inputs["policy"].digest
    assert f"dpo/manifest.json: its reference has digest {base.digest}, the policy it was trained from {policy}" in said


def test_a_base_that_a_manifest_names_otherwise_than_its_policy_is_refused(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, base = manifests.load(run / "stages" / "reward"), manifests.load(run / "stages" / "base")
    assert manifest.adaptation is not None
    other = manifest.adaptation.model_copy(update={"base": base.digest, "base_source": "base"})
    reseal(run / "stages" / "reward", adaptation=other)
    said = refused(config, run, capsys, *RECEIVERS["reward"].arguments)
    policy = manifest.inputs["policy"].digest
    assert f"reward/manifest.json: its base has digest {base.digest}, the policy it was trained from {policy}" in said


def test_an_adapter_applied_twice_is_refused(config: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.inputs import resolve
    from pipeline.store import RunDirectory
    from stages.core.device import choose
    from stages.core.roles import POLICY, open_base

    adapter = resolve("dpo", RunDirectory(run), ["dpo"])
    assert adapter.base is not None
    roles = open_base(adapter, choose("cpu", "float32"))
    roles.load(POLICY, adapter.directory)
    roles.merged(POLICY, adapter.base).model.save_pretrained(run / "stages" / "sft")
    reseal(run / "stages" / "sft", recorded=True)
    rebase(run)
    said = refused(config, run, capsys, *RECEIVERS["dpo"].arguments)
    assert "dpo/probes.json: probe 0: recorded -" in said
    assert "is not the one that was trained" in said


def test_a_reward_model_on_another_base_than_the_policys_is_refused(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = f"stages.ppo.reward={run}/stages/reward"  # of a stage of the run, the configuration tells
    said = refused(config, run, capsys, "--only", "ppo", "stages.ppo.policy=base", published)
    sft, base = (manifests.load(run / "stages" / name).digest[:12] for name in ("sft", "base"))
    sits = f"stages/reward: the reward model sits on {run}/stages/sft ({sft}), the policy on base ({base})"
    assert sits in said.replace("\n", "")


def test_blocks_longer_than_the_models_positions_are_refused(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = run.with_name("longer.yaml")
    text = config.read_text().partition("stages:")[0]
    renamed.write_text(
        f"{text}stages:\n  longer: {{kind: pretrain, policy: {run}/stages/sft, data: corpus, max_length: 600}}\n"
    )
    said = refused(renamed, run, capsys, code=2)
    assert "max_length: blocks of 600 tokens do not fit 512 positions" in said


def test_kept_log_probabilities_of_another_reference_are_refused(
    config: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    once = ("--only", "dpo", "stages.dpo.reference=once")
    assert baton(config, f"output={run}", *once) == 0
    for path in (tmp_path / "cache").rglob("logprobs.f4"):
        others = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32) - 1.0
        path.write_bytes(others.numpy().tobytes())
        index = json.loads((path.parent / "index.json").read_text())
        index["files"][path.name]["sha256"] = file_sha256(path)
        index["sha256"] = fingerprint.digest({name: each for name, each in index.items() if name != "sha256"})
        (path.parent / "index.json").write_text(json.dumps(index))
    said = refused(config, run, capsys, *once, "--force", "dpo")
    assert "the policy does not begin as its reference: log-probabilities a token are [-" in said
