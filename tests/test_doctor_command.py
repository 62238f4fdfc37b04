"""`baton doctor`: how it is called, whose tokens it counts, and what it prints and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_doctor import pair, pairs, write

from data.findings import LEAK_EXACT
from pipeline import cli
from pipeline.doctor import patients
from pipeline.errors import ConfigError

Doctor = Callable[..., tuple[int, str, str]]

RUN = """\
output: run
data:
  corpus: {source: corpus.jsonl}
  pairs: {source: pairs.jsonl}
  prompts: {source: prompts.jsonl}
stages:
  base: {kind: pretrain, policy: MODEL, data: corpus, max_length: 16, steps: 1}
  reward: {kind: reward, policy: base, data: pairs, max_length: 80, steps: 1}
  dpo: {kind: dpo, policy: base, data: pairs, max_length: 48, steps: 1}
  ppo: {kind: ppo, policy: base, reward: reward, data: prompts, max_length: 64, max_new_tokens: 40, steps: 1}
  evaluate: {kind: evaluate, models: [dpo], prompts: prompts, text: corpus, max_length: 56, max_new_tokens: 24}
"""


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Calls `baton doctor` in an empty directory; gives the exit code, what it printed, and what it complained of."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.execute(cli.app, ["doctor", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a run, with its data, that starts from a model directory."""
    monkeypatch.chdir(tmp_path)
    texts = [f"a document of several words, number {n}" for n in range(30)]
    tiny.save_model(tmp_path / "model", "qwen2", texts)
    write(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
    write(tmp_path / "pairs.jsonl", pairs(20))
    write(tmp_path / "prompts.jsonl", [{"prompt": f"prompt {n}"} for n in range(20)])
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace("MODEL", "model"))
    return path


def finding(record: dict[str, Any], name: str) -> list[str]:
    return [example["where"] for example in record["findings"].get(name, {"examples": []})["examples"]]


def test_the_files_of_an_unquoted_glob_are_no_settings(doctor: Doctor, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", pairs(2))
    code, printed, complaint = doctor("a.jsonl", "b.jsonl")
    assert (code, printed) == (ConfigError.exit_code, "")
    assert "b.jsonl: expected a setting of the data source, as in `format=explicit`" in complaint
    assert "quote the glob, as in 'data/*.jsonl'" in complaint
    assert "stages" not in complaint
    assert doctor("*.jsonl", "format=explicit")[0] == 0


def test_other_data_is_read_with_settings_of_its_own(doctor: Doctor, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pairs(5))
    asked = [{"question": f"question {n}", "reply": "so"} for n in (3, 7)]
    write(tmp_path / "the suite.jsonl", asked)
    assert doctor("a.jsonl", "--against", "'the suite.jsonl'")[0] == 3, "no format fits"
    settings = "columns.prompt=question columns.completion=reply format=conversation"
    code, printed, _ = doctor("a.jsonl", "--json", "--against", f"'the suite.jsonl' {settings}")
    (record,) = json.loads(printed)
    assert code == 3
    assert finding(record, LEAK_EXACT.name) == ["a.jsonl:4 and the suite.jsonl:1"]


def test_all_of_other_data_counts_unless_its_settings_say_otherwise(doctor: Doctor, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", pairs(40))

    def leaks(*settings: str) -> int:
        _, printed, _ = doctor("a.jsonl", "held_out=0", "--json", "--against", " ".join(["b.jsonl", *settings]))
        (record,) = json.loads(printed)
        return int(record["findings"].get(LEAK_EXACT.name, {"count": 0})["count"])

    assert leaks() == 40
    assert 0 < leaks("held_out=0.5") < 40
    assert leaks("rows=3") == 3


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no data"),
        ("'b.jsonl", "no data"),
        ("b.jsonl c.jsonl", "c.jsonl: expected a setting of the data source"),
        ("b.jsonl colour=red", "colour: unknown setting"),
    ],
)
def test_other_data_that_is_named_wrongly_is_refused_at_once(text: str, complaint: str, doctor: Doctor) -> None:
    code, printed, said = doctor("missing.jsonl", "--against", text)
    assert (code, printed) == (ConfigError.exit_code, "")
    assert complaint in said


def test_json_is_one_document_that_also_says_what_was_written(doctor: Doctor, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [*pairs(3), pair("equal", "b", "b")])
    code, printed, _ = doctor("a.jsonl", "--json", "--fix", "clean.jsonl")
    (record,) = json.loads(printed)
    assert code == 0
    assert record["usable"] == 3
    assert record["written"] == {
        "path": "clean.jsonl",
        "dropped_path": "clean.jsonl.dropped.jsonl",
        "kept": 3,
        "dropped": 1,
        "columns_left_out": [],
    }
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == 3


def test_the_clean_file_is_fit_for_the_same_settings(doctor: Doctor, tmp_path: Path) -> None:
    rows = [*pairs(3), pair("equal", "b", "b")]
    write(tmp_path / "a.jsonl", [{"question": row.pop("prompt"), **row} for row in rows])
    assert doctor("a.jsonl", "columns.prompt=question", "--fix", "b.jsonl")[0] == 0
    code, printed, _ = doctor("b.jsonl", "columns.prompt=question")
    assert code == 0
    assert printed.endswith("fit for training\n")


def test_columns_that_are_left_out_are_named_once(doctor: Doctor, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{**row, "image": b"\xff", "sound\x1b": b"\0"} for row in pairs(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    code, printed, _ = doctor("a.parquet", "--fix", "b.jsonl")
    assert code == 0
    assert [line for line in printed.splitlines() if "left out the columns" in line] == [
        "left out the columns image, sound\\x1b, which JSON cannot hold"
    ]
    assert "wrote 3 rows to b.jsonl; 0 left out" in printed


def test_the_limit_of_a_source_is_the_tightest_of_the_stages_that_do_not_pack_it(run: Path) -> None:
    limits = {each.source.name: each.limit for each in patients(str(run), [])}
    assert limits["corpus.jsonl"] is None, "its documents are cut into blocks"
    assert limits["pairs.jsonl"]
    assert limits["prompts.jsonl"]
    assert (limits["pairs.jsonl"].tokens, limits["pairs.jsonl"].kinds) == (48, ("preference",))
    assert (limits["prompts.jsonl"].tokens, limits["prompts.jsonl"].kinds) == (64 - 40, ("prompt",))
    shorter = {each.source.name: each.limit for each in patients(str(run), ["stages.evaluate.max_length=40"])}
    assert shorter["prompts.jsonl"]
    assert shorter["prompts.jsonl"].tokens == 40 - 24


def test_rows_of_a_configuration_are_measured_by_the_tokenizer_of_its_stages(doctor: Doctor, run: Path) -> None:
    code, printed, _ = doctor(run, "--json", "stages.dpo.max_length=12", "stages.reward.max_length=12")
    corpus, chosen, prompts = json.loads(printed)
    assert (code, chosen["usable"]) == (3, 0)
    assert corpus["lengths"]["whole"]["50%"] > 5
    assert prompts["lengths"]["prompt"]["50%"] > 5
    assert chosen["figures"]["over_long_share"] == 1.0
    _, whole, _ = doctor("pairs.jsonl", "--json", "--tokenizer", "model")
    assert json.loads(whole)[0]["lengths"] == chosen["lengths"]
    assert "--tokenizer" not in doctor(run)[1]


def test_a_tokenizer_that_is_named_goes_before_that_of_the_stages(doctor: Doctor, run: Path, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "other", "qwen2", ["question answer good bad"] * 9)
    lengths = [
        json.loads(doctor(data, "--json", "--tokenizer", name)[1])[at]["lengths"]
        for data, at, name in ((run, 1, "other"), ("pairs.jsonl", 0, "other"), ("pairs.jsonl", 0, "model"))
    ]
    assert lengths[0] == lengths[1] != lengths[2]


def test_without_a_tokenizer_that_is_there_one_line_says_how_to_get_lengths(doctor: Doctor, run: Path) -> None:
    run.write_text(RUN.replace("MODEL", "hub:example/model@main"))
    code, printed, _ = doctor(run)
    assert code == 0
    assert [line for line in printed.splitlines() if "--tokenizer" in line] == [
        "lengths in tokens need `--tokenizer`: that of the stages is not there yet, for pairs.jsonl, prompts.jsonl"
    ]
    assert all(record["lengths"] == {} for record in json.loads(doctor(run, "--json")[1]))
    code, _, complaint = doctor(run, "--max-length", "64")
    assert code == ConfigError.exit_code
    assert "`--max-length` counts tokens" in complaint


def test_the_chat_template_that_a_stage_sets_is_the_one_that_counts(doctor: Doctor, run: Path, tmp_path: Path) -> None:
    header = "the one who speaks now: "
    wordy = tiny.CHATML.replace("<|im_start|>' +", f"<|im_start|>{header}' +").replace(
        "assistant", f"{header}assistant"
    )
    (tmp_path / "wordy.jinja").write_text(wordy)
    run.write_text(
        "output: run\ndata: {pairs: {source: pairs.jsonl}}\n"
        "stages: {sft: {kind: sft, policy: model, data: pairs, steps: 1}}\n"
    )
    plain, longer = (
        json.loads(doctor(run, "--json", *settings)[1])[0]["lengths"]["whole"]["50%"]
        for settings in ([], ["stages.sft.chat_template=wordy.jinja"])
    )
    assert longer > plain + 10
    code, _, complaint = doctor(run, "stages.sft.chat_template=gone.jinja")
    assert code == ConfigError.exit_code
    assert "gone.jinja: cannot be read: No such file" in complaint


def test_a_first_row_of_many_turns_is_shown_by_its_ends(doctor: Doctor, tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"turn {n} of the {role}"} for n in range(50) for role in ("user", "assistant")]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    _, printed, _ = doctor("long.jsonl")
    assert "turn 0 of the user" in printed
    assert "turn 49 of the assistant" in printed
    assert "... 90 more ..." in printed
    assert len(printed.splitlines()) < 30
