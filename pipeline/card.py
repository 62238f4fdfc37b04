"""The model card of an exported stage, from manifests alone.

Whatever comes from data, configurations or stages stands in code spans and code blocks that it cannot end, or in YAML
that is written by a library: a name is never markup, a link or a mention.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline import inspection
from pipeline import manifest as manifests
from pipeline.contract import Artifact
from pipeline.figures import GAIN, LENGTH_CONTROLLED, RATIO, WIN_RATE
from pipeline.manifest import DataCard, InputRecord, Manifest, Metric
from pipeline.references import HUB, model_name
from pipeline.terminal import printable

if TYPE_CHECKING:
    from stages.core.export import Parity

FILE_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("card.j2")
HEADLINES = ("gold", "accuracy", "reward", "perplexity")
"""What the card's metadata repeats of the evaluation, beside win rates."""
AGAINST_PARENT = ("kl", "frontier_gap", "pair_accuracy")
"""Metrics, beside ratios and win rates, of which a child's and its parent's are against different models, and have no
difference."""
WIN_RATES = tuple(each.removesuffix(".") for each in (WIN_RATE, LENGTH_CONTROLLED))
"""What the names of win rates begin with; evaluations of before there were several judges name none."""
LIBRARIES = ("torch", "transformers", "peft")

_NOTHING = "none"


@dataclass(frozen=True)
class Ancestor:
    """A stage, or a model from elsewhere, that the model was made from."""

    role: str
    kind: str
    manifest: Manifest | None
    """None for a model from elsewhere, and for a stage that is no longer where it was."""
    source: str
    digest: str
    manifest_sha256: str = ""

    @property
    def name(self) -> str:
        """Of the stage, or where a model from elsewhere was found; of a directory, its name alone."""
        if self.manifest:
            return self.manifest.stage
        return self.source if self.source.startswith("hub:") else Path(self.source).name


@dataclass(frozen=True)
class Evaluation:
    """What an evaluate stage of the same run measured of the model and of its parent."""

    manifest: Manifest
    own: Mapping[str, Metric]
    parent: str
    """Name of the parent among the evaluated models; empty when it is not there."""
    before: Mapping[str, Metric]


def write(artifact: Artifact, *, name: str, parity: Parity) -> str:
    """The card as markdown with its metadata.

    Args:
        artifact: The verified stage.
        name: Of the exported model.
        parity: How the exported model compares with the stage's.
    """
    from huggingface_hub import ModelCard, ModelCardData

    manifest = artifact.manifest
    assert manifest is not None
    chain = list(ancestors(artifact.directory))
    found = evaluations(artifact.directory, manifest)
    is_reward = artifact.kind == "reward"
    results = [result for each in found for result in _results(each)]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if is_reward else "text-generation",
        tags=["baton", manifest.stage_kind],
        base_model=_repositories(each.source for each in chain if each.manifest is None),
        datasets=_repositories(card.source for each in chain if each.manifest for card in each.manifest.data),
        model_name=printable(name) if results else None,
        eval_results=results or None,
    )
    return str(
        ModelCard.from_template(
            metadata,
            template_path=str(TEMPLATE),
            title=code(name),
            kind="Reward model" if is_reward else "Language model",
            stage=code(manifest.stage),
            stage_kind=manifest.stage_kind,
            version=pipeline.__version__,
            usage=_usage(is_reward),
            compared="scores" if is_reward else "logits",
            difference=f"{parity.difference:.2g}",
            largest=f"{parity.largest:.3g}",
            offset=f"{parity.offset:.6g}" if parity.offset else "",
            stops=_stops(manifest, is_reward),
            evaluations=[_evaluation(each) for each in found],
            chain=[_link(each) for each in chain],
            data=[_data(each.manifest, card) for each in chain if each.manifest for card in each.manifest.data],
            warnings=[f"{code(each.name)}: {code(text, None)}" for each in chain for text in _warnings(each)],
            settings=json.dumps(manifest.settings, indent=2, sort_keys=True),
            environment=_environment(manifest),
            cost=f"{manifest.cost.seconds:,.1f} s, {manifest.cost.tokens:,} tokens",
            commands=_commands(chain),
        )
    )


def ancestors(directory: Path) -> Iterator[Ancestor]:
    """A stage and everything it was made from, nearest first; what was reached in several ways, once."""
    manifest = manifests.load(directory)
    own = Ancestor("", manifest.kind, manifest, "", manifest.digest, manifests.sha256(directory))
    waiting = [(own, directory)]
    seen = set()
    while waiting:
        ancestor, place = waiting.pop(0)
        if ancestor.digest in seen:
            continue
        seen.add(ancestor.digest)
        yield ancestor
        for role, record in ancestor.manifest.inputs.items() if ancestor.manifest else ():
            where = inspection.locate(place, record)
            sha256 = record.manifest_sha256 or ""
            waiting.append(
                (Ancestor(role, record.kind, _made(where, record), record.source, record.digest, sha256), where)
            )


def evaluations(directory: Path, manifest: Manifest) -> list[Evaluation]:
    """What evaluate stages beside a stage measured of exactly this model."""
    policy = manifest.inputs.get("policy")
    found = []
    for path in sorted(directory.parent.glob(f"*/{manifests.FILE_NAME}")):
        each = manifests.load(path.parent)
        names = {record.digest: model_name(record.source) for record in each.inputs.values()}
        if each.kind != "evaluation" or manifest.digest not in names:
            continue
        parent = names.get(policy.digest, "") if policy else ""
        own = _metrics_of(each, names[manifest.digest])
        if own:
            found.append(Evaluation(each, own, parent, _metrics_of(each, parent)))
    return found


def code(text: str, limit: int | None = 120) -> str:
    """Text as a code span that it cannot leave, also within a table."""
    shown = printable(text, limit).replace("`", "\\x60").replace("|", "\\x7c").strip()
    return f"`{shown}`" if shown else "(empty)"


def _made(directory: Path, record: InputRecord) -> Manifest | None:
    """The manifest of a stage that was an input, unless another has taken its place."""
    if not (directory / manifests.FILE_NAME).is_file():
        return None
    found = manifests.load(directory)
    return found if found.digest == record.digest else None


def _metrics_of(evaluation: Manifest, name: str) -> dict[str, Metric]:
    """A model's figures by their plain names; `a.b.gold` is none of the model `a` where there is a model `a.b`."""
    prefix = f"{name}."
    known = (f"{model_name(each.source)}." for each in evaluation.inputs.values())
    longer = tuple(each for each in known if each != prefix and each.startswith(prefix))
    return {
        metric.removeprefix(prefix): value
        for metric, value in evaluation.metrics.items()
        if metric.startswith(prefix) and not metric.startswith(longer)
    }


def _evaluation(found: Evaluation) -> dict[str, Any]:
    return {
        "stage": code(found.manifest.stage),
        "digest": code(found.manifest.digest),
        "parent": code(found.parent) if found.parent else "",
        "lines": list(_lines(found)),
    }


def _lines(found: Evaluation) -> Iterator[list[str]]:
    """Each metric beside the parent's; gains have no line of their own."""
    gains = {name.removesuffix(GAIN): gain for name, gain in found.own.items() if name.endswith(GAIN)}
    for name, metric in sorted(found.own.items()):
        if name.endswith(GAIN) and name.removesuffix(GAIN) in found.own:
            continue
        line = [code(name), _number(metric.value), _interval(metric)]
        if found.parent:
            against_parent = name in AGAINST_PARENT or name.endswith(RATIO) or name.startswith(WIN_RATES)
            before, gain = None if against_parent else found.before.get(name), gains.get(name)
            change = gain.value if gain else metric.value - before.value if before else None
            line += [_number(before.value) if before else "", "" if change is None else _number(change, signed=True)]
            line.append(_interval(gain, signed=True) if gain else "")
        yield [*line, f"{metric.n:,}" if metric.n else ""]


def _results(found: Evaluation) -> Iterator[Any]:
    """`EvalResult`s of the headline metrics."""
    from huggingface_hub import EvalResult

    prompts = next((card.source for card in found.manifest.data if card.role == "prompts"), found.manifest.stage)
    for name in (*HEADLINES, *(each for each in found.own if each.startswith(WIN_RATE))):
        if name in found.own:
            yield EvalResult(
                task_type="text-generation",
                dataset_type="baton",
                dataset_name=printable(prompts),
                metric_type=name,
                metric_value=found.own[name].value,
            )


def _link(ancestor: Ancestor) -> list[str]:
    made_by = ancestor.manifest.stage_kind if ancestor.manifest else "elsewhere"
    kind = f"{ancestor.kind} ({made_by})"
    sha256 = code(ancestor.manifest_sha256) if ancestor.manifest_sha256 else _NOTHING
    return [
        code(ancestor.name),
        code(ancestor.role) if ancestor.role else "this model",
        kind,
        code(ancestor.digest),
        sha256,
    ]


def _data(manifest: Manifest, card: DataCard) -> list[str]:
    findings = card.diagnosis.get("findings", {})
    said = [f"{found['count']:,} {code(kind)}" for kind, found in findings.items()]
    left_out = [f"{count:,} {code(reason)}" for reason, count in sorted(card.dropped.items())]
    return [
        code(manifest.stage),
        code(card.source),
        f"{card.rows:,} ({card.split})",
        ", ".join(left_out) or _NOTHING,
        code(card.digest),
        ", ".join(said) or _NOTHING,
    ]


def _warnings(ancestor: Ancestor) -> Sequence[str]:
    return ancestor.manifest.warnings if ancestor.manifest else ()


def _commands(chain: Sequence[Ancestor]) -> list[str]:
    """Parents first."""
    made = [each.manifest.command for each in reversed(chain) if each.manifest]
    return [code(command, None) for command in dict.fromkeys(made) if command]


def _environment(manifest: Manifest) -> str:
    libraries = manifest.environment.get("libraries", {})
    versions = [f"{name} {libraries[name]}" for name in LIBRARIES if name in libraries]
    return ", ".join(code(each) for each in [f"Python {manifest.environment.get('python', '')}".strip(), *versions])


def _stops(manifest: Manifest, is_reward: bool) -> str:
    stop = manifest.tokenizer.get("stop_id")
    return "" if is_reward or stop is None else f"token {stop}"


def _repositories(sources: Iterator[str]) -> list[str] | None:
    """`owner/name` of those that are on the hub."""
    matches = (HUB.match(source) for source in sources)
    return sorted({match["repository"] for match in matches if match}) or None


def _usage(is_reward: bool) -> str:
    kind = "AutoModelForSequenceClassification" if is_reward else "AutoModelForCausalLM"
    lines = [
        f"from transformers import AutoTokenizer, {kind}",
        "",
        'path = "."  # this directory',
        "tokenizer = AutoTokenizer.from_pretrained(path)",
        f"model = {kind}.from_pretrained(path)",
    ]
    if is_reward:
        lines += [
            'turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]',
            'tokens = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)',
            "score = model(**tokens).logits[0, 0]",
        ]
    else:
        lines += [
            'turns = [{"role": "user", "content": "Hello"}]',
            "tokens = tokenizer.apply_chat_template(",
            '    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
            "response = model.generate(**tokens, max_new_tokens=64)[0, tokens.input_ids.shape[1] :]",
            "text = tokenizer.decode(response, skip_special_tokens=True)",
        ]
    return "\n".join(lines)


def _number(value: float, *, signed: bool = False) -> str:
    return re.sub("^-", "\N{MINUS SIGN}", f"{value:{'+' if signed else ''},.4g}")


def _interval(metric: Metric, *, signed: bool = False) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return f"{_number(metric.low, signed=signed)} to {_number(metric.high, signed=signed)}"
