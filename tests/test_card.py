"""The model card: from manifests alone, without empty sections, and nothing in it is markup that came from data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reports
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from pipeline import card
from pipeline import manifest as manifests
from pipeline.contract import Artifact
from pipeline.manifest import Manifest, Metric
from stages.core.export import Parity

PARITY = Parity(difference=1e-6, largest=12.5, values=100, dtype="float32", lost=0.0)
SECTIONS = ["How to load it", "Evaluation", "What it was made from", "Data", "Settings", "Make it again"]


def written(directory: Path, parity: Parity = PARITY) -> str:
    manifest = manifests.load(directory)
    return card.write(Artifact(directory, manifest.kind, manifest.digest, manifest), name="mine", parity=parity)


def parsed(text: str) -> tuple[dict[str, Any], list[Token]]:
    """The metadata, and every token of the markdown, inline ones included."""
    _, metadata, body = text.split("---\n", 2)
    blocks = MarkdownIt("commonmark").enable("table").parse(body)
    return yaml.safe_load(metadata), [each for block in blocks for each in (block, *(block.children or ()))]


def headings(tokens: list[Token]) -> list[str]:
    return [
        tokens[place + 1].content
        for place, token in enumerate(tokens)
        if token.type == "heading_open" and token.tag == "h2"
    ]


def cells(tokens: list[Token]) -> list[str]:
    return [tokens[place + 1].content for place, token in enumerate(tokens) if token.type in ("td_open", "th_open")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of manifests in which each stage's inputs say where they are."""
    for name, parents in reports.PARENTS.items():
        inputs = {
            role: {
                "source": parent,
                "kind": reports.KINDS[parent][1],
                "digest": reports.digest(parent),
                "manifest_sha256": manifests.sha256(tmp_path / "stages" / parent),
                "directory": f"stages/{parent}",
            }
            for role, parent in parents.items()
        }
        metrics = {}
        if name == "check":
            measured = {"sft": (0.5, 0.1), "ppo": (0.7, 0.2)}
            for model, (gold, gain) in measured.items():
                metrics |= {f"{model}.gold": reports.metric(gold), f"{model}.gold_gain": reports.metric(gain)}
            for against_parent in ("win_rate", "win_rate.gold", "win_rate_length_controlled.gold", "perplexity_ratio"):
                metrics |= {f"ppo.{against_parent}": reports.metric(0.8), f"sft.{against_parent}": reports.metric(0.6)}
        reports.write_stage(tmp_path, name, schema_version=manifests.SCHEMA_VERSION, inputs=inputs, metrics=metrics)
    return tmp_path


def change(directory: Path, **fields: Any) -> None:
    path = directory / manifests.FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_chain_is_there_with_digests_down_to_the_tokenizer(run: Path) -> None:
    _, tokens = parsed(written(run / "stages" / "ppo"))
    found = cells(tokens)
    for name in ("ppo", "sft", "judge", "base", "words"):
        assert f"`{name}`" in found
        assert f"`{reports.digest(name)}`" in found
        assert f"`{manifests.sha256(run / 'stages' / name)}`" in found
    assert f"`{reports.digest('rows')}`" in found
    assert "7 `identical responses`" in found


def test_figures_stand_beside_the_parent_s_with_the_interval_of_the_change(run: Path) -> None:
    metadata, tokens = parsed(written(run / "stages" / "ppo"))
    found = cells(tokens)
    start = found.index("`gold`")
    assert found[start : start + 7] == ["`gold`", "0.7", "0.68 to 0.72", "0.5", "+0.2", "+0.18 to +0.22", "100"]
    # the parent's is against another
    for name in ("`win_rate`", "`win_rate.gold`", "`win_rate_length_controlled.gold`", "`perplexity_ratio`"):
        start = found.index(name)
        assert found[start : start + 7] == [name, "0.8", "0.78 to 0.82", "", "", "", "100"]
    results = metadata["model-index"][0]["results"][0]["metrics"]
    values = {each["type"]: each["value"] for each in results}
    assert values == {"gold": 0.7, "win_rate.gold": 0.8}


def test_no_section_is_empty_and_none_without_content_is_there(run: Path) -> None:
    text = written(run / "stages" / "ppo")
    _, tokens = parsed(text)
    assert headings(tokens) == SECTIONS
    kinds = [token.type for token in tokens]
    for place, kind in enumerate(kinds):
        if kind == "heading_close":
            assert kinds[place + 1] in ("paragraph_open", "table_open", "fence", "bullet_list_open")
    assert not [word for word in ("None", "Undefined", "[More Information Needed]", "null") if word in text]
    change(run / "stages" / "check", metrics={})
    change(run / "stages" / "sft", warnings=["rewards fell"])
    for name in reports.PARENTS:
        change(run / "stages" / name, data=[])
    metadata, tokens = parsed(written(run / "stages" / "ppo"))
    assert headings(tokens) == ["How to load it", "What it was made from", "Warnings", "Settings", "Make it again"]
    assert "model-index" not in metadata


def test_a_stage_that_was_replaced_since_is_named_by_what_was_used(run: Path) -> None:
    change(run / "stages" / "base", digest=reports.digest("another"))
    found = cells(parsed(written(run / "stages" / "ppo"))[1])
    assert f"`{reports.digest('base')}`" in found
    assert f"`{reports.digest('another')}`" not in found


def test_a_hub_model_and_a_hub_data_set_are_in_the_metadata(run: Path) -> None:
    inputs = {"policy": {"source": "hub:owner/model@main", "kind": "model", "digest": "d" * 64}}
    change(run / "stages" / "sft", inputs=inputs)
    cards = [
        {"role": "data", "source": "hub:owner/rows@v1", "digest": "", "format": "text", "rows": 1, "split": "train"}
    ]
    change(run / "stages" / "ppo", data=cards)
    metadata, _ = parsed(written(run / "stages" / "ppo"))
    assert (metadata["base_model"], metadata["datasets"]) == (["owner/model"], ["owner/rows"])


def test_a_reward_model_s_card_loads_a_classifier_and_names_the_offset(run: Path) -> None:
    text = written(run / "stages" / "judge", Parity(1e-6, 3.0, 8, "float32", 0.0, offset=-0.25))
    assert "AutoModelForSequenceClassification.from_pretrained(path)" in text
    assert "plus -0.25" in text
    assert parsed(text)[0]["pipeline_tag"] == "text-classification"


HOSTILE = [
    *reports.HOSTILE,
    "`</code><script>alert(1)</script>",
    "``` \n# heading\n```",
    "| a | <b>b</b> |",
    "\\| <img src=x onerror=alert(1)> \\",
    "[x](javascript:alert(1)) ![y](http://evil.example/y.png) <http://evil.example>",
    "\n---\nlicense: mit\n---\n",
    "@everyone #1 https://evil.example",
    "~~~\n* item",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_came_from_data_is_markup(run: Path, text: str) -> None:
    plain_metadata, plain = parsed(written(run / "stages" / "ppo"))
    finding = {"severity": "warning", "count": 3, "fix": text, "examples": []}
    cards = [
        {
            **{"role": "data", "source": text, "digest": text, "format": text, "rows": 1},
            **{"dropped": {text: 2}, "diagnosis": {"findings": {text: finding}}},
        }
    ]
    settings = {"template": text, text: {"nested": [text]}}
    for name in ("ppo", "sft"):
        change(run / "stages" / name, data=cards, settings=settings, warnings=[text], command=text, stage=text)
    check = manifests.load(run / "stages" / "check")
    metrics = {**check.metrics, f"ppo.{text}": Metric(value=1.0)}
    change(run / "stages" / "check", metrics={name: metric.model_dump() for name, metric in metrics.items()})
    metadata, tokens = parsed(written(run / "stages" / "ppo"))
    assert headings(tokens) == [*SECTIONS[:4], "Warnings", *SECTIONS[4:]]
    assert not [token for token in tokens if token.type.startswith(("html", "link", "image", "autolink"))]
    assert [token.type for token in tokens].count("tr_open") == [token.type for token in plain].count("tr_open") + 1
    rows = [cells(tokens[place:]) for place, token in enumerate(tokens) if token.type == "table_open"]
    assert len(rows) == 3
    assert metadata.keys() == plain_metadata.keys()
    kinds = {token.type for token in tokens if token.type.endswith(("_open", "_inline")) or token.type == "text"}
    spoken = " ".join(token.content for token in tokens if token.type == "text")
    assert "evil" not in spoken
    assert "alert" not in spoken
    assert "s_open" not in kinds


def test_a_manifest_is_all_that_is_read(run: Path) -> None:
    """Nothing but manifests is there, and the card can be written."""
    assert {path.name for path in run.rglob("*") if path.is_file()} == {manifests.FILE_NAME}
    assert isinstance(manifests.load(run / "stages" / "ppo"), Manifest)
    assert written(run / "stages" / "ppo") == written(run / "stages" / "ppo")
