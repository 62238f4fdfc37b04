"""The configuration as users write it: YAML 1.2, overrides, and every mistake with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline.config import RunSettings
from pipeline.document import parse
from pipeline.errors import ConfigError
from pipeline.loader import data_source, load, resolved, write_resolved


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value).splitlines()


def edit(config: Path, old: str, new: str) -> Path:
    text = config.read_text()
    assert text.count(old) == 1
    config.write_text(text.replace(old, new))
    return config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2026-01-02", "2026-01-02"),
        ("world:corpus", "world:corpus"),
        ("'true'", "true"),
        ("<<", "<<"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    read = parse(text, "test").values
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/name:os.system ''", "test:1: the tag `tag:yaml.org,2002:python/name:os.system`"),
        ("a: !!binary aGk=", "the tag"),
        ("a: [", "test:1: not YAML"),
        ("a: \x07", "not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("? [a]\n: b", "test:1: a key must be text"),
        ("a: 1\n---\nb: 2", "test:2: not YAML"),
        ("# " + "x" * 1_000_000, "larger than 1,000,000 bytes"),
        ("a: &a [1]\nb: [" + "*a, " * 101 + "]", "more than 100 aliases"),
        ("a: &a [*a]", "too many or too deeply nested values"),
        ("a: &a {b: *missing}", "not YAML"),
        ("!!python/object/apply:os.system [touch canary]", "the tag `tag:yaml.org,2002:python/object/apply:os.system`"),
        ("a: !!python/object/new:os.system [touch canary]", "the tag"),
        ("a: !<tag:yaml.org,2002:python/module:os> ''", "the tag"),
        ("a: !include /etc/passwd", "test:1: the tag `!include`"),
        ("a: !!set {b}", "the tag"),
        ("a: !!int x", "the tag"),
        ("a: " + "9" * 5_000, "test:1: a number of too many digits"),
        ("a: 0x" + "f" * 9_000, "test:1: a number of too many digits"),
        ("a: \0", "not YAML"),
    ],
)
def test_hostile_yaml_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "test")
    assert message in str(caught.value)


def test_aliases_cannot_blow_up() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="too many"):
        parse("\n".join(lines), "test")


def test_a_good_file_loads(config: Path) -> None:
    settings = load(config)
    assert list(settings.stages) == ["tok", "base", "sft", "rm", "dpo"]
    assert settings.stages["dpo"].roles() == {"policy": "sft"}


def test_every_mistake_is_reported_at_once_each_with_its_line(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        """\
output: run
sede: 3
data:
  pairs: {source: world:preferences, formt: hh}
stages:
  base: {kind: pretrain, policy: ., data: pair}
  sft:
    kind: sft
    policy: bas
    data: pairs
    lora: {rank: 1.5}
    optimizer:
      learning_rat: 2e-5
  rm: {kind: rewrd, policy: sft, data: pairs}
  dpo: {kind: dpo, policy: sft, data: pairs, beta: no, beta: no}
  ppo: {kind: ppo, policy: sft, data: pairs, reward: base}
  nameless: {policy: sft}
  hub: {kind: dpo, policy: "hub:me/model", data: pairs}
"""
    )
    found = problems(config)
    expected = [
        (2, "sede: unknown setting; did you mean `seed`?"),
        (4, "data.pairs.formt: unknown setting; did you mean `format`?"),
        (6, "stages.base.data: no data source `pair`; did you mean `pairs`?"),
        (9, "stages.sft.policy: no stage and no path `bas`; did you mean `base`?"),
        (11, "stages.sft.lora.rank: input should be a valid integer, not 1.5"),
        (13, "stages.sft.optimizer.learning_rat: unknown setting; did you mean `learning_rate`?"),
        (14, "stages.rm: unknown kind `rewrd`; did you mean `reward`?"),
        (15, "duplicate key `beta`"),
        (15, "stages.dpo.beta: input should be a valid number"),
        (16, "stages.ppo.reward: the stage `base` makes a model, this needs a reward"),
        (17, "stages.nameless: `kind` is missing"),
        (18, "stages.hub.policy: `hub:me/model` is not of the form `hub:owner/name@revision`"),
    ]
    assert len(found) == len(expected)
    for line, (number, message) in zip(found, expected, strict=True):
        assert line.startswith(f"{config}:{number}: {message}")


def test_a_missing_setting_is_placed_at_its_stage(config: Path) -> None:
    edit(config, "    policy: base\n", "")
    assert problems(config) == [f"{config}:10: stages.sft.policy: missing"]


def test_a_rule_over_several_settings_is_placed_at_its_stage(config: Path) -> None:
    edit(config, "    policy: base\n", "    policy: base\n    quantization: 4bit\n    lora: null\n")
    assert problems(config) == [f"{config}:10: stages.sft: a quantized base cannot be trained itself: give `lora`"]


def test_a_circle_of_stages_is_named(config: Path) -> None:
    found = problems(config, "stages.sft.policy=dpo")
    assert "stages wait for each other: dpo -> sft -> dpo" in "\n".join(found) or "sft -> dpo -> sft" in found[0]


def test_a_stage_can_be_a_directory_that_exists(config: Path, tmp_path: Path) -> None:
    assert load(config, [f"stages.dpo.policy={tmp_path}"]).stages["dpo"].roles() == {"policy": str(tmp_path)}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", ["seed"], 7),
        ("output=runs/x", ["output"], "runs/x"),
        ("stages.dpo.beta=2e-1", ["stages", "dpo", "beta"], 0.2),
        ("stages.sft.lora=null", ["stages", "sft", "lora"], None),
        ("stages.sft.lora.rank=4", ["stages", "sft", "lora", "rank"], 4),
        ("stages.sft.optimizer={name: muon}", ["stages", "sft", "optimizer", "name"], "muon"),
        (
            "stages.sft.lora.targets=[q_proj, v_proj]",
            ["stages", "sft", "lora", "targets"],
            ["q_proj", "v_proj"],
        ),
        ("data.text={source: 'a=b'}", ["data", "text", "source"], "a=b"),
    ],
)
def test_overrides_are_yaml(config: Path, override: str, path: list[str], value: object) -> None:
    found = resolved(load(config, [override]))
    for key in path:
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.data={chats: {epocs: 2}}", "stages.sft.data.chats.epocs: unknown setting; did you mean `epochs`?"),
        ("stages.sft.data={chats: {}}", "stages.sft.data.chats: give either `epochs` or `weight`"),
        ("stages.sft.data={}", "stages.sft.data: dictionary should have at least 1 item"),
        (
            "stages.sft.data={chats: {epochs: 2}, pairs: {weight: 2}}",
            "give all sources of a mixture `epochs`, or all of them `weight`",
        ),
        ("stages.sft.data={chat: {epochs: 2}}", "no data source `chat`; did you mean `chats`?"),
        ("stages.tok.data=[text, chat]", "no data source `chat`; did you mean `chats`?"),
        ("data.text.prepare={decontaminate: [chat]}", "no data source `chat`; did you mean `chats`?"),
        ("data.text.prepare={unicod: NFC}", "data.text.prepare.unicod: unknown setting; did you mean `unicode`?"),
        ("data.text.source=[]", "data.text.source: list should have at least 1 item"),
        ("data.text.format='os.system:'", "data.text.format: string should match pattern"),
        ("stages.dpo.betta=0.2", "stages.dpo.betta: unknown setting; did you mean `beta`?"),
        (
            "stages.dpo.learning_rate=1e-5",
            "stages.dpo.learning_rate: unknown setting; did you mean `optimizer.learning_rate`?",
        ),
        ("stages.sft.rank=8", "stages.sft.rank: unknown setting; did you mean `lora.rank`?"),
        ("stages.sft.weight=8", "stages.sft.weight: unknown setting (known: "),
        ("stages.sft.name=x", "stages.sft.name: unknown setting (known: "),
        ("held_out=0.1", "held_out: unknown setting (known: "),
        ("stages.dop.beta=0.2", "no `stages.dop`; did you mean `dpo`?"),
        ("sed=1", "sed: unknown setting; did you mean `seed`?"),
        ("seed", "expected `setting=value`"),
        ("seed=[", "not YAML"),
        ("stages.dpo.beta.x=1", "`stages.dpo.beta` has no element `x`"),
        ("seed=1e3", "seed: input should be a valid integer, not 1000.0"),
        ("stages.dpo.policy=sfd", "no stage and no path `sfd`; did you mean `sft`?"),
        ("stages.sft.optimizer.learning_rate=nan", "stages.sft.optimizer.learning_rate"),
        ("stages.sft.optimizer.learning_rate=.nan", "stages.sft.optimizer.learning_rate"),
    ],
)
def test_a_wrong_override_is_quoted(config: Path, override: str, message: str) -> None:
    (line,) = problems(config, override)
    assert line.startswith(f"command line: {override}: ")
    assert message in line


QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("overrides", [["stages.ppo.policy=base"], ["stages.reward.policy=base"]])
def test_a_reward_model_on_another_base_than_the_policys_is_refused_before_anything_is_trained(
    overrides: list[str],
) -> None:
    with pytest.raises(ConfigError, match=r"stages\.ppo\.reward: the reward model sits on `(sft|base)`, the policy on"):
        load(QUICKSTART, overrides)


@pytest.mark.parametrize("overrides", [
    ["stages.ppo.policy=dpo"],
    ["stages.sft.quantization=4bit", "stages.ppo.policy=base"],  # an adapter that is not merged sits on it, too
])  # fmt: skip
def test_adapters_on_one_model_have_one_base(overrides: list[str]) -> None:
    load(QUICKSTART, overrides)


def test_control_characters_in_a_configuration_do_not_reach_the_terminal(config: Path) -> None:
    assert "\x1b" not in "\n".join(problems(config, "stages.dpo.policy=\x1b[31mred"))


def test_unreadable_files_are_configuration_errors(tmp_path: Path) -> None:
    assert "No such file" in problems(tmp_path / "missing.yaml")[0]
    assert "Is a directory" in problems(tmp_path)[0]
    (tmp_path / "latin.yaml").write_bytes(b"output: caf\xe9")
    assert "byte 11 is not UTF-8" in problems(tmp_path / "latin.yaml")[0]
    (tmp_path / "empty.yaml").write_text("")
    assert problems(tmp_path / "empty.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    assert problems(tmp_path / "list.yaml")


def test_resolved_settings_read_back_as_they_were(config: Path, tmp_path: Path) -> None:
    tricky = ["1e5", "no", "010", "null", "~", "12:30", "é: [", "0x1F", "1_000", " a ", "a\nb", "'", ""]
    settings = load(config, ["stages.sft.lora.targets=[a]", "stages.sft.optimizer.learning_rate=2e-5"])
    lora = settings.stages["sft"].lora.model_copy(update={"targets": tricky})
    stages = {**settings.stages, "sft": settings.stages["sft"].model_copy(update={"lora": lora})}
    settings = settings.model_copy(update={"stages": stages})
    write_resolved(settings, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == settings


def test_the_schema_documents_every_setting() -> None:
    schema = RunSettings.model_json_schema()
    for name, definition in schema["$defs"].items():
        for setting, field in definition["properties"].items():
            assert field.get("description"), f"{name}.{setting} has no description"


def test_a_data_source_outside_a_configuration_is_checked_as_one_inside() -> None:
    found = data_source("pairs.jsonl", ["columns.chosen=better", "rows=5", "on_bad_row=skip"])
    assert (found.source, found.columns, found.rows, found.on_bad_row) == (
        "pairs.jsonl",
        {"chosen": "better"},
        5,
        "skip",
    )
    with pytest.raises(ConfigError) as raised:
        data_source("pairs.jsonl", ["rowz=5", "on_bad_row=stopp"])
    first, second = sorted(str(raised.value).splitlines())
    assert first.startswith("command line: on_bad_row=stopp: on_bad_row: input should be 'stop' or 'skip'")
    assert second == "command line: rowz=5: rowz: unknown setting; did you mean `rows`?"
    with pytest.raises(ConfigError, match="a list holds files"):
        data_source("pairs.jsonl", ["source=['world:corpus']"])
