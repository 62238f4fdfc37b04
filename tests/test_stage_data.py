"""Users' own data in whole stages: mixtures, bad rows, templates, adapters, and what the manifests say of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from data import cache
from data.tree import Tree
from pipeline import cli
from pipeline import manifest as manifests
from pipeline.manifest import DataCard, Manifest
from stages.core import rows as stage_rows

pytestmark = [pytest.mark.chain, pytest.mark.usefixtures("report_of_one_line")]

OWN = """\
output: {root}/run
device: cpu
dtype: float32
data:
  chats: {{source: {root}/chats.jsonl, held_out: 0.2}}
  pairs: {{source: {root}/pairs.jsonl, held_out: 0.2}}
  notes: {{source: {root}/notes.jsonl, held_out: 0.2, prepare: {{min_words: 3, decontaminate: [chats]}}}}
stages:
  longer: {{kind: pretrain, policy: {root}/model, data: notes, max_length: 16, steps: 2, examples_per_step: 2}}
  sft: {{kind: sft, policy: {root}/model, data: chats, steps: 2, examples_per_step: 4, max_length: 256}}
  dpo: {{kind: dpo, policy: sft, data: pairs, steps: 2, examples_per_step: 4, max_length: 256}}
  evaluate: {{kind: evaluate, models: [sft, dpo], prompts: chats, pairs: pairs, rows: 4, max_new_tokens: 4}}
"""
HOUSE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + ':' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chats(count: int, what: str = "Question") -> list[dict[str, str]]:
    return [{"prompt": f"{what} {number}?", "completion": f"Answer {number}."} for number in range(count)]


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {each}?", "chosen": f"Answer {each}.", "rejected": "Why?"} for each in range(count)]


@pytest.fixture
def own(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run on data of the user's own, from a small foreign model."""
    foreign = tmp_path_factory.getbasetemp() / "foreign"
    if not foreign.exists():
        tiny.save_model(foreign, "qwen2", ["Question 12? Answer 34. Why?"] * 3)
    shutil.copytree(foreign, tmp_path / "model")
    write(tmp_path / "chats.jsonl", chats(40))
    write(tmp_path / "pairs.jsonl", pairs(40))
    write(
        tmp_path / "notes.jsonl",
        [{"text": f"Note {number} says what happened on day {number}."} for number in range(40)],
    )
    config = tmp_path / "own.yaml"
    config.write_text(OWN.format(root=tmp_path))
    return config


def manifest(config: Path, stage: str) -> Manifest:
    return manifests.load(config.parent / "run" / "stages" / stage)


def card(config: Path, stage: str) -> DataCard:
    (found,) = manifest(config, stage).data
    return found


def test_the_doctor_s_findings_stand_in_the_manifest(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs(40)
    write(own.parent / "pairs.jsonl", [*rows, rows[0], {**rows[1], "rejected": rows[1]["chosen"]}])
    assert baton("run", own, "--until", "dpo") == 0
    found = card(own, "dpo")
    assert found.dropped == {"equal responses": 1}
    assert found.diagnosis["rows"] == 42
    assert found.diagnosis["usable"] == 41
    assert found.diagnosis["findings"]["duplicate row"]["count"] == 1
    assert found.diagnosis["findings"]["equal responses"]["examples"][0]["where"].endswith("pairs.jsonl:42")
    assert found.diagnosis["figures"]["longer_wins"] == 1.0
    said = capsys.readouterr().out
    assert "pairs.jsonl: read as `explicit`" in said
    assert "pairs.jsonl: 1 rows dropped: equal responses" in said
    assert "pairs.jsonl: warning: length bias" in said


def test_a_malformed_row_stops_a_stage_with_its_place_unless_told_to_skip(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [*pairs(40), {"prompt": "A?", "chosen": None, "rejected": "Why?"}]
    write(own.parent / "pairs.jsonl", rows)
    assert baton("run", own, "--until", "dpo") == 3
    said = capsys.readouterr().err
    assert f"{own.parent}/pairs.jsonl:41: chosen: null (expected text or messages); 1 of 41 rows rejected" in said
    assert not (own.parent / "run" / "stages" / "dpo").exists()
    assert baton("run", own, "data.pairs.on_bad_row=skip", "--until", "dpo") == 0
    assert card(own, "dpo").dropped == {"wrong type": 1}


def test_a_mixture_takes_each_source_in_its_share_and_has_a_card_for_each(own: Path) -> None:
    write(own.parent / "more.jsonl", chats(12, "Riddle"))
    own.write_text(
        own.read_text().replace(
            "  pairs: {", f"  more: {{source: {own.parent}/more.jsonl, held_out: 0.2}}\n  pairs: {{"
        )
    )
    mixture = "stages.sft.data={chats: {epochs: 1}, more: {epochs: 2.5}}"
    assert baton("run", own, mixture, "stages.sft.steps=null", "stages.sft.examples_per_step=1", "--until", "sft") == 0
    cards = {each.role: each for each in manifest(own, "sft").data}
    assert sorted(cards) == ["data.chats", "data.more"]
    log = (own.parent / "run" / "stages" / "sft" / "metrics.jsonl").read_text().splitlines()
    rows = {role: each.rows for role, each in cards.items()}
    assert len(log) == rows["data.chats"] + round(2.5 * rows["data.more"])
    held_out = {role: each.diagnosis["held_out"] for role, each in cards.items()}
    assert sum(rows.values()) + sum(held_out.values()) == 52
    assert manifest(own, "sft").data_settings["data.more"]["share"] == {"epochs": 2.5, "weight": None}


@pytest.mark.slow
def test_tokens_are_made_once_and_not_for_another_template(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    publish = cache._publish
    monkeypatch.setattr(
        cache, "_publish", lambda work, place, say: made.append(place.name) or publish(work, place, say)
    )
    monkeypatch.setenv("BATON_CACHE", str(own.parent / "cache"))
    assert baton("run", own, "--until", "sft") == 0
    assert len(made) == 1
    assert baton("run", own, "stages.sft.optimizer.learning_rate=0.001", "--until", "sft") == 0
    assert len(made) == 1
    (own.parent / "house.jinja").write_text(HOUSE)
    assert baton("run", own, f"stages.sft.chat_template={own.parent}/house.jinja", "--until", "sft") == 0
    assert baton("run", own, "stages.sft.max_length=200", "--until", "sft") == 0
    write(own.parent / "chats.jsonl", chats(41))
    assert baton("run", own, "--until", "sft") == 0
    assert len(made) == len(set(made)) == 4


def test_a_given_template_goes_from_sft_to_every_later_stage(own: Path) -> None:
    template = own.parent / "house.jinja"
    template.write_text(HOUSE)
    assert baton("run", own, f"stages.sft.chat_template={template}") == 0
    digests = {name: manifest(own, name).tokenizer["chat_template"] for name in ("longer", "sft", "dpo")}
    assert digests["sft"] == digests["dpo"] != digests["longer"]
    assert (own.parent / "run/stages/dpo/chat_template.jinja").read_text() == HOUSE


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ strftime_now('%d') }}" + HOUSE, "date"),
        ("{% for message in messages %}{{ message['content'] }}{% endfor %}", "not with a control token"),
        ("{{ messages[", "template"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused_with_its_file(
    own: Path, capsys: pytest.CaptureFixture[str], template: str, said: str
) -> None:
    path = own.parent / "house.jinja"
    path.write_text(template)
    assert baton("run", own, f"stages.sft.chat_template={path}", "--until", "sft") == 2
    message = capsys.readouterr().err
    assert f"error: {path}: " in message
    assert said in message


def test_text_is_prepared_on_its_way_into_pretraining(own: Path) -> None:
    notes = [{"text": f"Note {number} says what happened on day {number}."} for number in range(40)]
    write(own.parent / "notes.jsonl", [*notes, notes[0], {"text": "Too short."}])
    assert baton("run", own, "--until", "longer") == 0
    found = card(own, "longer")
    assert found.prepared["documents"] == 42
    assert found.prepared["kept"] == 40
    assert sum(found.dropped.values()) == 2


def test_an_adapter_runs_only_when_it_is_named(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (own.parent / "house_rows.py").write_text(
        "def votes(row):\n    return {'prompt': row['q'], 'chosen': row['good'], 'rejected': row['bad']}\n"
    )
    monkeypatch.syspath_prepend(own.parent)
    rows = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in pairs(40)]
    write(own.parent / "pairs.jsonl", rows)
    command = ["run", own, "data.pairs.format=house_rows:votes", "--until", "dpo"]
    assert baton(*command) == 2
    assert "--adapter house_rows:votes" in capsys.readouterr().err
    assert baton(*command, "--adapter", "house_rows:votes") == 0
    assert card(own, "dpo").format.startswith("house_rows:votes")
    assert "--adapter house_rows:votes" in manifest(own, "dpo").command


def test_a_configuration_s_sources_are_examined_with_what_they_are_evaluated_on(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(own.parent / "chats.jsonl", [*chats(40), {"prompt": "question 7", "completion": "Answer 7."}])
    assert baton("doctor", own, "--json") == 0
    found = {Path(each["source"]).name: each for each in json.loads(capsys.readouterr().out)}
    assert sorted(found) == ["chats.jsonl", "notes.jsonl", "pairs.jsonl"]
    assert found["chats.jsonl"]["rows"] == 41


def test_the_doctor_writes_what_can_stay(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [*pairs(10), {"prompt": "A?", "chosen": None, "rejected": "B"}, pairs(1)[0]]
    path, clean = own.parent / "pairs.jsonl", own.parent / "clean.jsonl"
    write(path, rows)
    assert baton("doctor", path, "--fix", clean) == 3
    assert [json.loads(line) for line in clean.read_text().splitlines()] == pairs(10)
    left_out = [json.loads(line) for line in Path(f"{clean}.dropped.jsonl").read_text().splitlines()]
    assert [(each["where"], each["reason"]) for each in left_out] == [
        (f"{path}:11", "wrong type"),
        (f"{path}:12", "duplicate row"),
    ]
    capsys.readouterr()
    assert baton("doctor", clean) == 0
    assert baton("doctor", path, "--fix", clean) == 6
    assert "exists already" in capsys.readouterr().err


def test_rows_without_a_trained_token_are_refused_by_the_view(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own.parent / "pairs.jsonl"
    write(path, [*pairs(1), {"prompt": "A?", "chosen": "B" * 2000, "rejected": "C"}])
    assert baton("tokens", path, "--tokenizer", own.parent / "model", "--max-length", "64") == 3
    printed = capsys.readouterr()
    assert f"{path}:1: " in printed.out
    assert f"error: {path}:2: trained part longer than max_length" in printed.err
    assert baton("tokens", path) == 2
    assert "add `--tokenizer`" in capsys.readouterr().err


def test_a_row_that_the_template_refuses_is_malformed(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = own.parent / "house.jinja"
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    template.write_text(strict + HOUSE)
    rows: list[dict[str, Any]] = [*chats(40), {**chats(1)[0], "system": "Be brief."}]
    write(own.parent / "chats.jsonl", rows)
    command = ["run", own, f"stages.sft.chat_template={template}", "--until", "sft"]
    assert baton(*command) == 3
    assert f"{own.parent}/chats.jsonl:41: the chat template refuses the turns" in capsys.readouterr().err
    assert baton(*command, "data.chats.on_bad_row=skip") == 0
    assert card(own, "sft").dropped == {"refused by the chat template": 1}


def test_the_stage_s_doctor_counts_tokens(own: Path) -> None:
    long = {"prompt": "word " * 300, "chosen": "Yes.", "rejected": "<|im_end|>"}
    write(own.parent / "pairs.jsonl", [*pairs(40), long])
    assert baton("run", own, "--until", "dpo") == 0
    found = card(own, "dpo").diagnosis
    assert found["lengths"]["whole"]
    assert found["findings"]["prompt cut to fit"]["count"] == 1
    assert found["findings"]["control tokens in content"]["count"] == 1


def test_a_test_set_is_evaluated_whole_and_never_trained_on(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = own.parent / "test.jsonl"
    write(test, [{"prompt": f"Puzzle {number}?", "completion": "Answer."} for number in range(3)])
    own.write_text(own.read_text().replace("  pairs: {", f"  test: {{source: {test}, held_out: 1}}\n  pairs: {{"))
    evaluated = "stages.evaluate.prompts=test"
    assert baton("run", own, evaluated, "--until", "evaluate") == 0
    prompts = {each.role: each for each in manifest(own, "evaluate").data}["prompts"]
    assert (prompts.rows, prompts.split) == (3, "held-out")
    assert baton("plan", own, "stages.sft.data=test") == 2
    assert "all of `test` is held out: only evaluate stages can read it" in capsys.readouterr().err
    write(test, chats(3))
    assert baton("run", own, evaluated, "--until", "sft") == 0
    assert baton("run", own, evaluated) == 3
    assert f"{own.parent}/chats.jsonl:1" in capsys.readouterr().err
    assert baton("run", own, evaluated, "--until", "sft", "--force", "sft") == 3
    assert "prompt on both sides" in capsys.readouterr().err


def test_responses_are_judged_by_the_answers_of_the_user_s_own_rows(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    puzzles = [{"prompt": f"Puzzle {number}?", "answer": str(number)} for number in range(3)]
    test = own.parent / "test.jsonl"
    write(test, [{**puzzles[0], "task": "sums"}, {**puzzles[1], "task": "sums"}, puzzles[2]])
    own.write_text(own.read_text().replace("  pairs: {", f"  test: {{source: {test}, held_out: 1}}\n  pairs: {{"))
    assert baton("run", own, "stages.evaluate.gold=numeric", "stages.evaluate.prompts=test") == 0
    found = manifest(own, "evaluate").metrics
    assert found["dpo.accuracy"].n == 3
    assert found["dpo.accuracy.sums"].n == 2
    assert "dpo.gold_gain" in found
    tasks = {name for name in found if name.startswith("dpo.accuracy.")}
    assert tasks == {"dpo.accuracy.sums", "dpo.accuracy.sums_gain"}
    assert baton("run", own, "stages.evaluate.gold=exact") == 0
    assert "dpo.accuracy" in manifest(own, "evaluate").metrics
    assert baton("run", own, "stages.evaluate.gold=world") == 3
    said = capsys.readouterr().err
    assert "chats.jsonl:" in said
    assert "the prompt has no `declined`, which the rule `world` needs" in said


def test_a_source_of_which_a_mixture_takes_nothing_is_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(own.parent / "more.jsonl", chats(12, "Riddle"))
    more = f"  more: {{source: {own.parent}/more.jsonl, held_out: 0.2}}\n  pairs: {{"
    own.write_text(own.read_text().replace("  pairs: {", more))
    assert baton("run", own, "stages.sft.data={chats: {epochs: 1}, more: {epochs: 0.01}}", "--until", "sft") == 3
    assert "more.jsonl: its share of the mixture is less than one of its " in capsys.readouterr().err
    assert baton("run", own, "stages.sft.data={chats: {epochs: 1}, more: {epochs: 0.5}}", "--until", "sft") == 0
    assert {each.role: each.epochs for each in manifest(own, "sft").data} == {"data.chats": 1.0, "data.more": 0.5}


def test_tokens_of_a_branch_that_moves_are_made_again(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data import sources

    served = chats(40)
    commits = iter(["a" * 40, "b" * 40, None, None])
    now: list[str | None] = [None]
    fingerprint, records = sources.fingerprint, sources.records

    def serve(source: Any, findings: Any) -> Any:
        if source.scheme != "hub":
            return records(source, findings)
        return iter([sources.Located(f"hub:row {number}", row) for number, row in enumerate(served, 1)])

    monkeypatch.setattr(sources, "records", serve)
    monkeypatch.setattr(sources, "fingerprint", lambda source: "f" if source.scheme == "hub" else fingerprint(source))
    monkeypatch.setattr(sources, "commit", lambda source: now[0])
    digests = []
    for commit in commits:
        now[0] = commit
        served.append({"prompt": f"New {len(served)}?", "completion": "Yes."})
        source = "data.chats.source='hub:owner/name@main'"
        assert baton("run", own, source, "stages.evaluate.prompts=pairs", "--until", "sft", "--force", "sft") == 0
        digests.append(card(own, "sft").diagnosis["rows"])
    assert digests == [41, 42, 43, 44]


def seen(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[dict[str, Any]]:
    """What `baton tokens` shows, as JSON."""
    capsys.readouterr()
    assert baton("tokens", *arguments, "--json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def shown_tree(view: dict[str, Any]) -> tuple[list[int], list[list[int]], list[list[bool]], int]:
    prompt, *branches = [passage["tokens"] for passage in view["passages"]]
    ids = [[token["id"] for token in branch] for branch in branches]
    return (
        [token["id"] for token in prompt],
        ids,
        [[token["trained"] for token in each] for each in branches],
        view["cut"],
    )


def trained_tree(tree: Tree) -> tuple[list[int], list[list[int]], list[list[bool]], int]:
    ids = [list(branch.tokens) for branch in tree.branches]
    return list(tree.prompt), ids, [list(branch.read) for branch in tree.branches], tree.cut


@pytest.mark.parametrize("lengths", [[], ["stages.sft.max_length=24", "stages.dpo.max_length=24"]])
def test_a_stage_s_tokens_are_shown_before_it_runs_as_it_will_make_them(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lengths: list[str]
) -> None:
    (own.parent / "house.jinja").write_text(HOUSE)
    rankings = [{"prompt": f"Question {each}?", "responses": [f"Answer {each}.", "Hm.", "Why?"]} for each in range(40)]
    write(own.parent / "pairs.jsonl", rankings)
    overrides = [f"stages.sft.chat_template={own.parent}/house.jinja", *lengths]
    before = {name: seen(capsys, own, *overrides, "--stage", name, "--rows", "40") for name in ("sft", "dpo")}
    made: dict[str, stage_rows.Examples] = {}
    original = stage_rows.examples

    def examples(context: Any, *given: Any) -> stage_rows.Examples:
        made[context.name] = original(context, *given)
        return made[context.name]

    monkeypatch.setattr(stage_rows, "examples", examples)
    assert baton("run", own, *overrides, "--until", "dpo") == 0
    for name, views in before.items():
        sides = {False: made[name].train, True: made[name].held_out}
        expected = {tree.origin: (trained_tree(tree), side) for side, trees in sides.items() for tree in trees}
        assert {view["origin"]: (shown_tree(view), view["held_out"]) for view in views} == expected
        assert len(expected) == 40
        assert seen(capsys, own, *overrides, "--stage", name, "--rows", "40") == views
        assert any(view["cut"] for view in views) == bool(lengths)


def test_a_published_stage_does_not_hide_the_template_that_is_given_now(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert baton("run", own, "--until", "sft") == 0
    (own.parent / "house.jinja").write_text(HOUSE)
    override = f"stages.sft.chat_template={own.parent}/house.jinja"
    for stage in ("sft", "dpo", "evaluate"):
        (first, *_) = seen(capsys, own, override, "--stage", stage)
        assert "user:Question" in "".join(token["text"] for token in first["passages"][0]["tokens"])
        (first, *_) = seen(capsys, own, "--stage", stage)
        assert "user\nQuestion" in "".join(token["text"] for token in first["passages"][0]["tokens"])


def test_tokens_need_the_stage_that_makes_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.write_chain(tmp_path)
    assert baton("tokens", config, "--stage", "dpo") == 2
    said = capsys.readouterr().err
    assert "the tokenizer's stage, `tokenizer`, has not run" in said
    assert "--until tokenizer" in said
    assert baton("run", config, "--until", "tokenizer") == 0
    (first, *_) = seen(capsys, config, "--stage", "dpo")
    assert [passage["name"] for passage in first["passages"]] == ["prompt", "chosen", "rejected"]
    assert first["max_length"] == 512  # the positions of the model, of which there is none yet
    (first, *_) = seen(capsys, config, "--stage", "ppo")
    assert first["max_length"] == 512 - 8


def test_a_document_that_preparation_leaves_out_is_shown_with_the_reason(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = own.parent / "notes.jsonl"
    write(notes, [{"text": "A note\u0007 on e\u0301."}, {"text": "Too short."}, {"text": "a NOTE on \u00e9."}])
    first, second, third = seen(capsys, own, "--stage", "longer")
    text = "".join(token["text"] for token in first["passages"][0]["tokens"][:-1])
    assert text == r"A note on \xc3\xa9."
    assert (second["origin"], second["left_out"]) == (f"{notes}:2", "2 words (min_words: 3)")
    assert third["left_out"]
    assert baton("tokens", own, "--stage", "longer") == 0
    said = capsys.readouterr().out
    assert f"{notes}:2: left out: 2 words (min_words: 3)" in said
    assert "`decontaminate` is not applied here" in said
    model = own.parent / "model"
    assert seen(capsys, notes, "prepare.min_words=3", "--tokenizer", model)[1]["left_out"] == second["left_out"]
    assert baton("tokens", own.parent / "chats.jsonl", "prepare.min_words=3", "--tokenizer", model) == 3
    assert "`prepare` is for text" in capsys.readouterr().err


def test_every_source_of_a_stage_is_shown_under_its_role(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    riddles = own.parent / "more.jsonl"
    write(riddles, chats(12, "Riddle"))
    own.write_text(own.read_text().replace("  pairs: {", f"  more: {{source: {riddles}, held_out: 0.2}}\n  pairs: {{"))
    mixture = "stages.sft.data={chats: {epochs: 1}, more: {epochs: 2.5}}"
    views = seen(capsys, own, mixture, "--stage", "sft", "--rows", "2")
    assert [view["role"] for view in views] == ["data.chats"] * 2 + ["data.more"] * 2
    assert [view["source"] for view in views[1:3]] == [f"{own.parent}/chats.jsonl", str(riddles)]
    assert baton("tokens", own, mixture, "--stage", "sft") == 0
    said = capsys.readouterr().out
    assert f"\ndata.chats: {own.parent}/chats.jsonl\n{own.parent}/chats.jsonl:1: " in said
    assert f"\ndata.more: {riddles}\n{riddles}:1: " in said


def test_an_evaluation_s_rows_are_those_held_out_and_its_text_has_no_end(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    views = seen(capsys, own, "stages.evaluate.text=notes", "--stage", "evaluate", "--rows", "40")
    assert {view["role"] for view in views} == {"prompts", "pairs", "text"}
    assert all(view["held_out"] for view in views)
    (document, *_) = [view for view in views if view["role"] == "text"]
    assert document["passages"][1]["tokens"][-1]["text"] == "."
    assert baton("tokens", own, "--stage", "evaluate") == 0
    assert "scored, not trained on" in capsys.readouterr().out
    assert baton("tokens", own, "--stage", "evaluate", "--as", "text") == 2
    assert "leave out `--as`" in capsys.readouterr().err


def test_rows_that_the_template_refuses_are_named(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own.parent / "house.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + HOUSE
    )
    told = {"messages": [{"role": role, "content": "Hi"} for role in ("system", "user", "assistant")]}
    asked = {"messages": told["messages"][1:]}
    write(own.parent / "chats.jsonl", [asked, told])
    override = f"stages.sft.chat_template={own.parent}/house.jinja"
    assert baton("tokens", own, override, "--stage", "sft") == 3
    printed = capsys.readouterr()
    assert f"{own.parent}/chats.jsonl:1: " in printed.out
    assert f"error: {own.parent}/chats.jsonl:2: " in printed.err
    assert "'no system'" in printed.err
