"""The gate: its grammar, what holds by intervals, and what is said of what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import gate, loader
from pipeline.errors import ConfigError
from pipeline.manifest import Metric

CLEAR = Metric(value=0.2, low=0.15, high=0.25, n=100)
FIGURES = {
    "dpo.gold": Metric(value=0.8, low=0.75, high=0.85, n=100),
    "dpo.gold_gain": CLEAR,
    "dpo.perplexity": Metric(value=7.0, low=6.5, high=7.5, n=100),
    "dpo.perplexity_ratio": Metric(value=1.02, low=0.99, high=1.05, n=100),
    "dpo.accuracy.sums_gain": Metric(value=-0.01, low=-0.03, high=0.01, n=100),
    "dpo.accuracy_gain": Metric(value=0.0, low=0.0, high=0.0, n=100),
    "dpo.steps": Metric(value=4.0),
    "one.gold_gain": Metric(value=0.2, n=1),
    "Qwen2.5.gold": Metric(value=0.8, low=0.75, high=0.85, n=100),
}


def verdict(metric: str, required: str, model: str = "dpo") -> gate.Check:
    """One requirement held against the figures."""
    (found,) = gate.check({model: {metric: required}}, FIGURES)
    return found


@pytest.mark.parametrize(
    ("metric", "required", "holds"),
    [
        ("gold", "> parent", True),
        ("gold", ">parent", True),
        ("gold", "> parent + 0.1", True),
        ("gold", "> parent + 0.15", False),
        ("gold", ">= parent + 0.15", True),
        ("gold", "< parent", False),
        ("gold", "< parent + 0.3", True),
        ("gold", "> 0.7", True),
        ("gold", "> 0.78", False),  # the value is, the interval may not be
        ("gold", ">= 0.75", True),
        ("gold", "> 0.75", False),
        ("gold", "<= 8.5e-1", True),
        ("perplexity", "< 1.1 x parent", True),
        ("perplexity", "< 1.05 x parent", False),
        ("perplexity", "<= 1.05x parent", True),
        ("perplexity", "< 1.03 x parent", False),
        ("perplexity", "< parent", False),
        ("perplexity", "> .98 x parent", True),
        ("accuracy.sums", "> parent - 0.05", True),
        ("accuracy.sums", "> parent - 0.02", False),
        ("accuracy.sums", "> parent", False),
        ("accuracy", ">= parent", True),
        ("accuracy", "> parent", False),
        ("steps", "<= 4", True),
        ("steps", "> 4", False),
        ("steps", "> -1", True),
    ],
)
def test_a_requirement_holds_when_the_whole_interval_does(metric: str, required: str, holds: bool) -> None:
    assert verdict(metric, required).holds == holds


def test_a_figure_s_model_may_have_dots_in_its_name() -> None:
    assert verdict("gold", "> 0.7", "Qwen2.5").holds


@pytest.mark.parametrize(
    ("model", "metric", "required", "said"),
    [
        (
            "dpo",
            "gold",
            "< parent",
            "dpo.gold should be `< parent`, but its difference from the parent's is 0.2 [",
        ),
        ("dpo", "gold", "> 0.9", "dpo.gold should be `> 0.9`, but is 0.8 [0.75, 0.85]"),
        ("dpo", "perplexity", "< 1 x parent", "but its ratio to the parent's is 1.02 [0.99, 1.05]"),
        ("sft", "gold", "> 1", "sft.gold should be `> 1`, but was not measured"),
        ("dpo", "glod", "> parent", "but no such figure was measured; did you mean `gold`?"),
        ("dpo", "glod", "> 0.5", "but no such figure was measured; did you mean `gold`?"),
        (
            "dpo",
            "reward",
            "> 1",
            "but no such figure was measured (known: gold, perplexity, steps)",
        ),
        ("dpo", "steps", "> parent", "dpo.steps should be `> parent`, but was not compared with a parent's"),
        ("dpo", "gold", "> 1.1 x parent", "dpo.gold should be `> 1.1 x parent`, but was not compared with a parent's"),
        ("sft", "gold", "> parent", "sft.gold should be `> parent`, but was not compared with a parent's"),
        ("one", "gold", "> parent", "but its difference from the parent's is 0.2, without an interval"),
    ],
)
def test_what_does_not_hold_says_what_was_found(model: str, metric: str, required: str, said: str) -> None:
    found = verdict(metric, required, model)
    assert not found.holds
    assert said in str(found)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "parent",
        "> ",
        "== 1",
        "=> 1",
        "> parents",
        "> 1.05 parent",
        "> 1.05 x parent + 1",
        "> parent * 2",
        "> parent + x",
        "> parent - -0.1",
        "> nan",
        "> 1e",
        "> 0.5 or < 0.1",
        "< 0 x parent",
        "< -1 x parent",
        "> 1" * 10_000,
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"should be a (comparison|positive number)"):
        gate.parse(text)


CONFIG = """\
output: run
data: {prompts: {source: "world:prompts", rows: 20}}
stages:
  evaluate:
    kind: evaluate
    models: [runs/a/stages/sft, "hub:owner/Qwen2.5-0.5B@main"]
    prompts: prompts
    gold: world
    require:
      sft:
        gold: "> parnet"
        perplexity: 1.2
        reward: "> parent"
      ppo: {gold: "> parent"}
      Qwen2.5-0.5B: {gold: "> 0.5 x"}
"""


def test_every_mistake_in_a_gate_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    with pytest.raises(ConfigError) as caught:
        loader.load(path)
    said = str(caught.value).splitlines()
    assert [line for line in said if "no stage and no path" not in line] == [
        f"{path}:11: stages.evaluate.require.sft.gold: should be a comparison as in `> 0.5`, `> parent`, "
        "`> parent - 0.02` or `< 1.05 x parent` (with >, >=, < or <=), not `> parnet`",
        f"{path}:12: stages.evaluate.require.sft.perplexity: input should be a valid string, not 1.2",
        f"{path}:14: stages.evaluate.require.ppo: no model `ppo` is evaluated (known: Qwen2.5-0.5B, sft)",
        f"{path}:15: stages.evaluate.require.Qwen2.5-0.5B.gold: should be a comparison as in `> 0.5`, `> parent`, "
        "`> parent - 0.02` or `< 1.05 x parent` (with >, >=, < or <=), not `> 0.5 x`",
    ]
