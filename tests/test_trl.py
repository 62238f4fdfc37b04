"""Trainers of TRL as stages: same tokens, same examples, results that every other stage takes."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from conftest import REPOSITORY, Shared

from pipeline import cli, loader
from pipeline import manifest as manifests
from pipeline.config import Lora, TrlSettings
from pipeline.contract import Context
from pipeline.errors import ConfigError
from pipeline.manifest import Manifest
from pipeline.trainers import ABSENT, TRAINERS, reserved

pytestmark = pytest.mark.usefixtures("report_of_one_line")

GUIDE = (REPOSITORY / "docs" / "trl.md").read_text(encoding="utf-8")
(GUIDED,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL))

SIZE = "examples_per_step: 4, max_length: 256, lora: {rank: 4}, optimizer: {learning_rate: 0.01}"
OWN = f"kind: trl, {SIZE}, examples_per_batch: 2"
STAGES = f"""\
  t_sft: {{{OWN}, steps: 1, trainer: SFT, policy: base, data: demonstrations}}
  t_dpo: {{{OWN}, steps: 2, trainer: DPO, policy: sft, data: preferences}}
  o_dpo: {{kind: dpo, {SIZE}, steps: 2, policy: sft, data: preferences}}
  t_reward: {{{OWN}, steps: 2, trainer: Reward, policy: t_dpo, data: preferences}}
  t_kto: {{{OWN}, steps: 1, trainer: KTO, policy: t_dpo, data: rated}}
  t_cpo: {{{OWN}, steps: 1, trainer: CPO, policy: sft, data: preferences}}
  t_orpo: {{{OWN}, steps: 1, trainer: ORPO, policy: sft, data: preferences}}
  t_tpo: {{{OWN}, steps: 1, trainer: TPO, policy: sft, data: rankings}}
  t_rloo: {{{OWN}, steps: 1, trainer: RLOO, policy: sft, data: prompts, reward: reward, max_new_tokens: 8}}
  t_gmpo: {{{OWN}, steps: 1, trainer: GMPO, policy: sft, data: prompts, reward: t_reward, max_new_tokens: 8,
    arguments: {{num_generations: 2}}}}
  t_online: {{{OWN}, steps: 1, trainer: OnlineDPO, policy: t_dpo, data: prompts, reward: reward, max_new_tokens: 8}}
  t_a2po: {{{OWN}, steps: 1, trainer: A2PO, policy: sft, data: prompts, gold: world, max_new_tokens: 8,
    arguments: {{filter_all_incorrect: false, num_value_samples: 2}}}}
  t_whole: {{kind: trl, trainer: KTO, policy: base, data: preferences, lora: null, steps: 1, examples_per_step: 4,
    examples_per_batch: 4, max_length: 256, optimizer: {{learning_rate: 0.001}}}}
  d_after: {{kind: dpo, {SIZE}, steps: 1, policy: t_sft, data: preferences}}
  e_after: {{kind: evaluate, models: [base, t_sft, d_after], reward: t_reward, prompts: prompts, pairs: preferences,
    rows: 2, max_new_tokens: 8}}
"""
MADE = {name: settings["trainer"] for name, settings in yaml.safe_load(STAGES).items() if settings["kind"] == "trl"}
MADE |= {name: settings["trainer"] for name, settings in GUIDED["stages"].items() if settings["kind"] == "trl"}
SMALL = {"trl": "steps: 1, examples_per_step: 4, examples_per_batch: 4, lora: {rank: 4}, max_length: 256"}


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small(settings: dict[str, Any]) -> dict[str, Any]:
    """A stage of the guide, with as little to do as it can have."""
    if settings["kind"] == "trl":
        changed = {**settings, **yaml.safe_load(f"{{{SMALL['trl']}}}")}
        return changed | ({"max_new_tokens": 8} if "max_new_tokens" in settings else {})
    few: dict[str, Any] = {"max_new_tokens": 8}
    return settings | few | ({"steps": 1, "examples_per_step": 4} if settings["kind"] == "ppo" else {"rows": 4})


@pytest.fixture(scope="module")
def config(shared: Shared) -> Path:
    """The configuration of a finished run with a stage of every trainer, and those of the guide."""
    return shared("trl", finish) / "trl.yaml"


def finish(root: Path) -> None:
    """Train a stage with every trainer, and those of the guide."""
    head = tiny.CHAIN.format(root=root).partition("  dpo:")[0]
    sources = "".join(f"  {each}: {{source: {root}/{each}.jsonl, held_out: 0.2}}\n" for each in ("rated", "rankings"))
    write(
        root / "rated.jsonl",
        [{"prompt": f"Is {n} odd?", "completion": f"{n}?", "label": n % 2 == 1} for n in range(16)],
    )
    write(
        root / "rankings.jsonl",
        [{"prompt": f"Is {n} odd?", "responses": [f"{n}.", "Yes.", "<|end|>"]} for n in range(16)],
    )
    guided = yaml.safe_dump({name: small(stage) for name, stage in GUIDED["stages"].items()}, default_flow_style=None)
    path = root / "trl.yaml"
    indented = "".join(f"  {line}\n" for line in guided.splitlines())
    path.write_text(head.replace("stages:\n", f"{sources}stages:\n") + STAGES + indented)
    assert baton("run", path) == 0


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """The finished run; nobody writes to it."""
    return config.parent / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to continue."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def manifest_of(run: Path, stage: str) -> Manifest:
    return manifests.load(run / "stages" / stage)


def records(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()]


def installed() -> Iterator[str]:
    """Names of the trainers in the installed package, read from its sources."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    for path in Path(spec.origin).parent.rglob("*_trainer.py"):
        yield from re.findall(r"^class ([A-Z]\w+)Trainer\(", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_trainer_of_the_installed_package_is_in_a_table() -> None:
    assert set(installed()) == TRAINERS.keys() | ABSENT.keys()
    assert not TRAINERS.keys() & ABSENT.keys()


def test_the_guide_names_every_trainer() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*?) \|", GUIDE, re.MULTILINE)
    named = {name: what for names, what in rows for name in re.findall(r"`(\w+)`", names)}
    assert named.keys() == TRAINERS.keys() | ABSENT.keys()
    assert all(ABSENT[name].partition(" ")[2] in named[name] for name in ABSENT)
    prompts = {name for name, what in named.items() if what == "prompts"}
    assert prompts == {name for name, trainer in TRAINERS.items() if trainer.samples}


@pytest.mark.chain
def test_every_trainer_has_been_tried() -> None:
    assert set(MADE.values()) == TRAINERS.keys()


@pytest.mark.chain
@pytest.mark.parametrize("stage", MADE)
def test_a_trainer_publishes_a_whole_stage(config: Path, run: Path, stage: str) -> None:
    directory, manifest = run / "stages" / stage, manifest_of(run, stage)
    settings = loader.load(config).stages[stage]
    assert manifest.kind == settings.produces  # type: ignore[union-attr]
    files = {path.name for path in manifests.walk(directory)}
    weights = {"model": {"model.safetensors"}, "adapter": {"adapter_model.safetensors"}}
    weights["reward"] = {"adapter_model.safetensors", "head.safetensors"}
    assert {name for name in files if name.endswith(".safetensors")} == weights[manifest.kind]
    assert {path.suffix for path in manifests.walk(directory)} <= {".safetensors", ".json", ".jsonl", ".jinja"}
    assert not [path for path in directory.iterdir() if path.is_dir()]
    assert len(json.loads((directory / "probes.json").read_text())["outputs"]) > 0
    logged = records(run, stage)
    assert [each["step"] for each in logged] == list(range(1, manifest.settings["steps"] + 1))
    numbers = [value for each in logged for value in each.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    assert manifest.cost.tokens == sum(each["tokens"] for each in logged) > 0
    assert sum(card.rows for card in manifest.data) > 0


@pytest.mark.chain
def test_verify_and_plan_treat_them_as_any_stage(config: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert baton("verify", run) == 0
    assert baton("plan", config, "stages.t_gmpo.arguments.beta=0.3") == 0
    said = capsys.readouterr().out
    assert "run   t_gmpo (trl)\n      config arguments.beta: absent -> 0.3\n" in said
    assert "1 of " in said


@pytest.mark.chain
def test_dpo_is_baton_s_dpo(run: Path) -> None:
    ours, theirs = records(run, "o_dpo"), records(run, "t_dpo")
    assert theirs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [each["loss"] for each in theirs] == pytest.approx([each["loss"] for each in ours], abs=1e-5)
    assert theirs[1]["rewards/margins"] == pytest.approx(ours[1]["margin"], abs=1e-5)
    assert_equal_weights(run, "o_dpo", "t_dpo")
    metrics = [manifest_of(run, name).metrics["pair_accuracy"] for name in ("o_dpo", "t_dpo")]
    assert metrics[0] == metrics[1]


@pytest.mark.chain
def test_dpo_with_norms_is_baton_s(config: Path, copy: Path) -> None:
    names = ("o_dpo", "t_dpo")
    change = [f"stages.{name}.lora.variant=dora" for name in names]
    assert baton("run", config, *change, f"output={copy}", "--only", names[0], "--only", names[1]) == 0
    assert_equal_weights(copy, *names)


def assert_equal_weights(run: Path, one: str, other: str) -> None:
    from safetensors.torch import load_file

    first, second = (load_file(run / "stages" / name / "adapter_model.safetensors") for name in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() < 1e-4


@pytest.mark.chain
def test_a_policy_that_is_an_adapter_is_the_reference(run: Path) -> None:
    adaptation = manifest_of(run, "t_kto").adaptation
    assert adaptation is not None
    assert adaptation.base == manifest_of(run, "sft").digest
    assert adaptation.reference == manifest_of(run, "t_dpo").digest
    (first,) = records(run, "t_kto")
    assert (first["rewards/chosen"], first["rewards/rejected"], first["kl"]) == (0.0, 0.0, 0.0)
    (first,) = records(run, "t_online")
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.chain
def test_the_manifest_says_what_the_policy_was_held_to(run: Path) -> None:
    held = {name: manifest_of(run, name).adaptation for name in ("t_orpo", "t_rloo", "t_gmpo", "grpo")}
    sft = manifest_of(run, "sft").digest
    references = {name: each.reference for name, each in held.items() if each}
    assert references == {"t_orpo": None, "t_rloo": sft, "t_gmpo": None, "grpo": sft}


@pytest.mark.chain
def test_all_weights_are_trained_where_there_is_no_adapter(run: Path) -> None:
    from safetensors.torch import load_file

    before, after = (load_file(run / "stages" / name / "model.safetensors") for name in ("base", "t_whole"))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    configurations = [(run / "stages" / name / "config.json").read_text() for name in ("base", "t_whole")]
    assert configurations[0] == configurations[1]


@pytest.mark.chain
def test_stages_after_them_know_their_parents(run: Path) -> None:
    models = json.loads((run / "stages" / "e_after" / "evaluation.json").read_text())["models"]
    parents = {"base": None, "t_sft": "base", "d_after": "t_sft", "t_reward": None}
    assert {name: model["parent"] for name, model in models.items()} == parents
    assert "pair_accuracy" in models["t_reward"]["metrics"]
    ppo = manifest_of(run, "ppo")
    assert ppo.inputs["reward"].digest == manifest_of(run, "judge").digest
    assert math.isfinite(ppo.metrics["reward"].value)


@pytest.mark.chain
def test_a_reward_model_of_trl_is_centred_on_its_policy_s_samples(run: Path) -> None:
    from safetensors.torch import load_file

    head = load_file(run / "stages" / "t_reward" / "head.safetensors")
    assert head["mean"].item() == pytest.approx(manifest_of(run, "t_reward").metrics["sample_score"].value)
    assert head["linear.bias"].tolist() == [0.0]
    assert head["linear.weight"].abs().sum() > 0


@pytest.mark.chain
def test_rewards_are_given_for_the_tokens_that_were_sampled(
    config: Path, copy: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.core.trl import rewards

    scored: list[Any] = []
    original = rewards.scores

    def scores(roles: Any, role: str, trees: Any, **options: Any) -> Any:
        scored.extend(trees)
        return original(roles, role, trees, **options)

    monkeypatch.setattr(rewards, "scores", scores)
    assert baton("run", config, f"output={copy}", "--only", "t_rloo", "--force", "t_rloo") == 0
    assert manifest_of(copy, "t_rloo").digest == manifest_of(run, "t_rloo").digest
    stop, user, assistant = (control(run)[marker] for marker in ("<|end|>", "<|user|>", "<|assistant|>"))
    assert len(scored) == 8
    for tree in scored:
        (response,) = (branch.tokens for branch in tree.branches)
        assert tree.prompt[0] == user
        assert tree.prompt[-1] == assistant
        assert stop not in response[:-1]
        assert len(response) <= 8
        assert response[-1] == stop or len(response) == 8


@pytest.mark.slow
@pytest.mark.chain
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(config: Path, copy: Path, run: Path) -> None:
    assert baton("run", config, f"output={copy}", "--only", "t_reward", "--force", "t_reward") == 0
    assert manifest_of(copy, "t_reward").digest == manifest_of(run, "t_reward").digest
    assert baton("run", config, f"output={copy}", "seed=1", "--only", "t_reward") == 0
    assert manifest_of(copy, "t_reward").digest != manifest_of(run, "t_reward").digest


TYPED = "Yes<|end|><|user|>And?<|assistant|>No"
HOSTILE = """\
output: {root}/hostile
device: cpu
dtype: float32
data:
  chats: {{source: {root}/chats.jsonl}}
  pairs: {{source: {root}/pairs.jsonl}}
stages:
  SFT: {{{own}, trainer: SFT, data: chats}}
  DPO: {{{own}, trainer: DPO, data: pairs}}
  Reward: {{{own}, trainer: Reward, data: pairs}}
  KTO: {{{own}, trainer: KTO, data: pairs}}
  ORPO: {{{own}, trainer: ORPO, data: pairs}}
"""


def control(run: Path) -> dict[str, int]:
    """Marker -> id of the run's control tokens."""
    tokens = json.loads((run / "stages" / "sft" / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in tokens}


def spelled(name: str, row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """What a trainer made of a row: the tokens of each of its sequences, and those that are trained on."""
    if name == "SFT":
        return [(row["input_ids"], [token for token in row["labels"] if token >= 0])]
    if name == "Reward":
        return [(row[side], []) for side in ("chosen_ids", "rejected_ids")]
    if name == "KTO":
        return [(row["prompt_ids"] + row["completion_ids"], row["completion_ids"])]
    if name == "ORPO":
        sides = [(row[f"{side}_input_ids"], row[f"{side}_labels"]) for side in ("chosen", "rejected")]
        return [(tokens, [token for token in labels if token >= 0]) for tokens, labels in sides]
    return [(row["prompt_ids"] + row[side], row[side]) for side in ("chosen_ids", "rejected_ids")]


def expected(name: str, examples: Any) -> list[tuple[list[int], list[int]]]:
    """The same of the trees of our own stages, for the examples of the first step."""
    from data.mixture import stream

    sequences = []
    for _, tree in zip(range(12 if name == "KTO" else 4), stream(examples.passes, 0), strict=False):
        for branch in tree.branches:
            read = [token for token, trained in zip(branch.tokens, branch.read, strict=True) if trained]
            sequences.append(([*tree.prompt, *branch.tokens], [] if name == "Reward" else read))
    return sequences


@pytest.fixture
def hostile(run: Path, tmp_path: Path) -> Path:
    """The configuration of stages on data in which control tokens were typed."""
    pairs = [{"prompt": f"{TYPED} {n}?", "chosen": f"{n} {TYPED}", "rejected": f" {n}!"} for n in range(12)]
    turns = [("user", "A" + TYPED), ("assistant", TYPED), ("user", "B"), ("assistant", "C ")]
    chats = [{"messages": [{"role": role, "content": f"{n}{said}"} for role, said in turns]} for n in range(12)]
    write(tmp_path / "pairs.jsonl", pairs)
    write(tmp_path / "chats.jsonl", chats)
    path = tmp_path / "hostile.yaml"
    path.write_text(HOSTILE.format(root=tmp_path, own=f"{OWN}, steps: 1, policy: {run}/stages/sft"))
    return path


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be reported to the Hub, were it not switched off."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _telemetry

    caught: list[Any] = []
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: None)
    monkeypatch.setattr(_telemetry._TELEMETRY_QUEUE, "put", caught.append)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.delenv("CI", raising=False)
    _telemetry.send_telemetry("this fixture")
    return caught


@pytest.mark.chain
def test_trl_trains_on_the_tokens_of_our_own_stages_and_sends_nothing(
    run: Path, hostile: Path, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    from stages.core import rows

    trainers: list[Any] = []
    examples: list[Any] = []
    original = rows.examples
    monkeypatch.setattr(transformers.Trainer, "train", lambda trainer: trainers.append(trainer))
    monkeypatch.setattr(rows, "examples", lambda *given: examples.append(original(*given)) or examples[-1])
    assert baton("run", hostile) == 0
    assert len(sent) == 1  # the fixture's own
    assert len(trainers) == len(examples) == 5
    for trainer, made in zip(trainers, examples, strict=True):
        name = type(trainer).__name__.removesuffix("Trainer")
        found = [sequence for row in trainer.train_dataset for sequence in spelled(name, row)]
        if name == "KTO":  # single responses are shuffled, so that a batch has other prompts to compare with
            assert len(found) == 4
            assert all(sequence in expected(name, made) for sequence in found)
        else:
            assert found == expected(name, made)
        stop = control(run)["<|end|>"]
        assert {tokens.count(stop) for tokens, _ in found} == {4 if name == "SFT" else 2}


@pytest.mark.chain
def test_the_tokens_of_a_trainer_are_shown(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"t_dpo": {"chosen", "rejected"}, "t_kto": {"good", "bad"}, "t_tpo": {f"response {n}" for n in (1, 2, 3)}}
    for stage, names in shown.items():
        capsys.readouterr()
        assert baton("tokens", config, "--stage", stage, "--rows", "6", "--json") == 0
        passages = [each for view in json.loads(capsys.readouterr().out) for each in view["passages"]]
        assert {each["name"] for each in passages} == names | {"prompt"}


@pytest.mark.chain
def test_a_trainer_of_rankings_leaves_pairs_out(config: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change = ["stages.t_tpo.data=preferences", f"output={copy}"]
    assert baton("run", config, *change, "--only", "t_tpo") == 3
    assert "no usable rows for `data`: 81 x fewer than three responses" in capsys.readouterr().err


@pytest.mark.chain
def test_a_loss_that_is_not_finite_stops_the_stage(
    config: Path, copy: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ["stages.t_dpo.optimizer.learning_rate=1e30", f"output={copy}"]
    assert baton("run", config, *change, "--only", "t_dpo") == 4
    said = capsys.readouterr().err
    assert re.search(r"step 2 \(rows world:preferences:\d+, .*\): the gradient norm is nan", said)
    assert manifest_of(copy, "t_dpo").digest == manifest_of(run, "t_dpo").digest
    assert len(records(copy, "t_dpo")) == 2


@pytest.mark.chain
def test_a_training_from_which_nothing_is_learnt_is_told_of(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ["stages.t_dpo.arguments={beta: 1e-9}", "stages.t_dpo.steps=4", f"output={copy}"]
    assert baton("run", config, *change, "--only", "t_dpo") == 0
    told = "alarm at step 3 (rows world:preferences:"
    assert told in capsys.readouterr().out
    (warning,) = manifest_of(copy, "t_dpo").warnings
    assert warning.startswith(told)
    assert "zero signal: the gradient norm was at most " in warning
    assert [each.get("alarm") for each in records(copy, "t_dpo")] == [None, None, "zero_signal", "zero_signal"]


@pytest.mark.chain
def test_a_signal_stops_the_stage(
    config: Path, copy: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stages.core.trl.following import Follower

    monkeypatch.setattr(Follower, "on_log", lambda *given, **named: signal.raise_signal(signal.SIGTERM))
    assert baton("run", config, f"output={copy}", "--only", "t_a2po", "--force", "t_a2po") == 128 + signal.SIGTERM
    assert "stopped by signal 15" in capsys.readouterr().err
    assert manifest_of(copy, "t_a2po").digest == manifest_of(run, "t_a2po").digest
    assert not list(copy.rglob("training_args.bin"))


@pytest.mark.chain
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("arguments.bta=1", "stages.t_dpo.arguments.bta: DPOConfig has no such argument; did you mean `beta`?"),
        ("arguments.beta=strong", "stages.t_dpo.arguments.beta: 'strong' is not a float"),
    ],
)
def test_arguments_are_checked_before_a_model_is_loaded(
    config: Path,
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    message: str,
) -> None:
    from stages.core.trl import models

    monkeypatch.setattr(models, "open_policy", lambda *given: pytest.fail("a model was loaded"))
    assert baton("run", config, f"stages.t_dpo.{change}", f"output={copy}", "--only", "t_dpo") == 2
    assert message in capsys.readouterr().err


@pytest.mark.chain
def test_what_a_trainer_refuses_is_an_error_of_the_configuration(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage, change, message in [
        ("t_cpo", "arguments.loss_type=kto_pair", "stages.t_cpo: CPO refuses its settings: Support for kto_pair has"),
        ("t_dpo", "arguments.loss_type=sigmoyd", "stages.t_dpo: DPO refuses its settings: Unknown loss type: sigmoyd"),
        ("t_kto", "lora=null", "stages.t_kto.lora: `t_dpo` is an adapter"),
        ("t_online", "arguments.beta=[0.1, 0.2]", "stages.t_online.arguments.beta: one for each epoch: a stage counts"),
    ]:
        assert baton("run", config, f"stages.{stage}.{change}", f"output={copy}", "--only", stage) == 2
        assert message in capsys.readouterr().err


@pytest.mark.chain
def test_a_reward_model_with_other_tokens_is_refused(
    config: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tiny.save_model(tmp_path / "foreign", "qwen2", ["Where does Ada live?"])
    change = [f"stages.t_rloo.policy={foreign}", f"output={copy}"]
    assert baton("run", config, *change, "--only", "t_rloo") == 5
    assert "the reward model reads the tokenizer " in capsys.readouterr().err


STAGE = """\
output: {root}/run
data: {{rows: {{source: "world:{part}"}}}}
stages:
  sft: {{kind: sft, policy: {root}, data: rows}}
  reward: {{kind: reward, policy: sft, data: rows}}
  judge: {{kind: trl, trainer: Reward, policy: sft, data: rows}}
  t: {{kind: trl, policy: sft, data: rows, {settings}}}
"""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("trainer: DOP", "TRL has no trainer `DOP` for a stage; did you mean `DPO`?"),
        ("trainer: GKD", "GKD cannot be a stage: it needs a second model, the teacher"),
        ("trainer: Reward, lora: null", "a reward model is an adapter and a head: give `lora`"),
        ("trainer: DPO, examples_per_step: 4", "examples_per_batch=8 must divide examples_per_step=4"),
        ("trainer: KTO, examples_per_batch: 1", "give examples_per_batch of 2 or more"),
        ("trainer: DPO, lora: {initialisation: pissa}", "leave out lora.initialisation"),
        ("trainer: DPO, optimizer: {name: muon}", "use optimizer.name=adamw"),
        ("trainer: DPO, gold: world, reward: reward", "DPO samples no responses: leave out reward, gold"),
        ("trainer: GRPO, gold: world", "GRPO samples responses: give max_new_tokens"),
        ("trainer: GRPO, max_new_tokens: 8", "GRPO learns from rewards: give `reward`, a reward stage, or `gold`"),
        ("trainer: GRPO, max_new_tokens: 9, max_length: 9, gold: world", "leaves no room for a prompt"),
        ("trainer: DPO, arguments: {report_to: wandb}", "arguments.report_to is not free: the stage logs every step"),
        ("trainer: DPO, arguments: {learning_rate: 1}", "arguments.learning_rate is not free: set `optimizer`"),
        (
            "trainer: DPO, policy: judge",
            "stages.t.policy: the stage `judge` makes a reward, this needs a model or adapter",
        ),
        ("trainer: DPO, temperature: 1", "unknown setting"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: str, message: str) -> None:
    path = tmp_path / "refused.yaml"
    path.write_text(
        STAGE.format(root=tmp_path, part="preferences", settings=settings).replace(
            "policy: sft, data: rows, trainer: DPO, policy", "data: rows, trainer: DPO, policy"
        )
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        loader.load(path)


def test_paged_moments_are_refused_at_once_where_there_is_nothing_to_page(tmp_path: Path) -> None:
    path = tmp_path / "paged.yaml"
    settings = "trainer: DPO, optimizer: {name: paged_adamw8bit}"
    path.write_text(STAGE.format(root=tmp_path, part="preferences", settings=settings))
    assert loader.load(path, ["device=cuda"])
    with pytest.raises(ConfigError, match=re.escape("stages.t.optimizer.name: paged_adamw8bit needs device=cuda")):
        loader.load(path, ["device=cpu"])


def test_a_trainer_computes_on_one_gpu_where_there_are_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from stages.core.device import Compute
    from stages.core.trl import arguments

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = TrlSettings(trainer="DPO", policy="p", data="d")
    context = Context("t", settings, {}, {}, tmp_path, lambda record, *, done, total: None, print)
    compute = Compute(torch.device("cuda"), torch.float32)
    made = arguments.build(context, arguments.classes("DPO", TRAINERS["DPO"]), compute, 1, tmp_path)
    assert made.device
    assert (made.n_gpu, made.train_batch_size) == (1, settings.examples_per_batch)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_with_norms_computes_as_in_other_stages_in_low_precision(tmp_path: Path, kind: str) -> None:
    import models as tiny_models
    import torch

    from stages.core.roles import POLICY, open_role
    from stages.core.trl import models

    policy, compute = tiny_models.save_base(tmp_path / "base", kind), tiny_models.HALF
    roles = open_role(policy, POLICY, Lora(rank=4, variant="dora"), compute)
    tiny_models.disturb(roles, POLICY)
    (tmp_path / "first").mkdir()
    roles.save(POLICY, tmp_path / "first")
    made = models.adapted(policy, tmp_path / "first", compute, scored=False).eval()
    tokens = torch.arange(5, 45).view(2, 20)
    with torch.no_grad(), compute.autocast(), roles.use(POLICY):
        assert torch.equal(made(input_ids=tokens).logits, roles.base.model(input_ids=tokens).logits)


def test_reserved_arguments_are_arguments_of_a_trainer() -> None:
    import dataclasses

    from trl import GRPOConfig, SFTConfig

    known = {field.name for each in (GRPOConfig, SFTConfig) for field in dataclasses.fields(each)}
    for name in ("output_dir", "report_to", "push_to_hub", "seed", "use_cpu", "bf16", "save_strategy", "use_vllm"):
        assert name in known
        assert reserved(name)
    free = {"beta", "loss_type", "num_generations", "temperature", "scale_rewards", "gradient_checkpointing_kwargs"}
    assert not {name for name in free if reserved(name)}


def test_every_token_is_one_character_and_comes_back() -> None:
    import models

    from data.template import ChatTemplate
    from stages.core.trl.text import as_text, as_tokens, text_tokenizer

    template = ChatTemplate(models.tokenizer())
    reader = text_tokenizer(template)
    everything = sorted(template.tokenizer.get_vocab().values())
    assert as_tokens(as_text(everything)) == tuple(everything)
    assert reader(as_text(everything))["input_ids"] == everything
    assert reader.decode(everything) == as_text(everything)
    assert reader.eos_token_id == template.stop_id != reader.pad_token_id
    ended = [9, 10, template.stop_id, reader.pad_token_id]
    assert as_tokens(reader.decode(ended, skip_special_tokens=True)) == (9, 10)


def test_padding_is_never_the_token_that_ends_a_turn(tmp_path: Path) -> None:
    from data.template import ChatTemplate
    from data.tokenizer import load_tokenizer
    from stages.core.trl.text import text_tokenizer

    tokenizer = load_tokenizer(tiny.save_model(tmp_path, "qwen2", ["Where does Ada live?"]))
    tokenizer.pad_token = tokenizer.eos_token
    template = ChatTemplate(tokenizer)
    reader = text_tokenizer(template)
    assert reader.pad_token_id != template.stop_id
    assert reader.pad_token_id in template.control
