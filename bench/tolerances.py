"""Every tolerance: the largest difference where nothing is wrong, and what each check sees of a planted fault.

    python -m bench.tolerances --model DIRECTORY_OR_GGUF --pairs FILE.jsonl --out FILE.json
    python -m bench.tolerances --families --out FILE.json

The checks are the product's own. A line of the result is one check on one case: `value` is what the check compares with
`allowed`, and `own` is the same difference in the run's precision where the check decides in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.families import FAMILIES, LAYOUTS, tiny, tokenizer
from data import gguf
from data.batch import Layout, TreeBatch, batches, one_row, packed
from data.schema import Message, Prompt
from data.tree import Branch, Tree
from pipeline.config import DpoSettings, Lora, PpoSettings
from pipeline.contract import Artifact
from pipeline.durable import file_sha256
from pipeline.errors import ArtifactError, ConfigError
from pipeline.manifest import Adaptation, Manifest
from reward.head import ScalarHead
from stages.core import export, layout, models, norms, preference, probes, rollout, scoring
from stages.core.device import Compute
from stages.core.forward import token_logprobs
from stages.core.layout import choose_layout
from stages.core.models import LanguageModel, load_model
from stages.core.reference import in_each_step, pair_logprobs
from stages.core.rl import experience, preflight
from stages.core.rl.experience import Collector
from stages.core.rl.prompts import EncodedPrompt
from stages.core.rl.rewards import Rewards
from stages.core.rl.sampling import Sampler
from stages.core.roles import POLICY, REFERENCE, REWARD, Roles, open_base, open_role

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LORA = Lora()
STEPS, PAIRS_A_STEP, RATE = 4, 8, 1e-4
"""Of the light training that the probes must recognise; the rate is the default of the DPO stage."""
Line = dict[str, Any]
Fault = Callable[[], AbstractContextManager[Any]]


@dataclass
class Subject:
    """A base, the model that supervised training made of it, and an adapter and a reward model on that."""

    name: str
    base: Artifact
    tuned: Artifact
    policy: Artifact
    reward: Artifact
    trees: list[Tree]
    layout: Layout


def line(tolerance: str, case: str, value: float, allowed: float, refused: bool, **more: Any) -> Line:
    """One result."""
    found = {"tolerance": tolerance, "case": case, "value": value, "allowed": allowed, "refused": refused, **more}
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    return found


# Preparation


def prepare(name: str, base: Artifact, trees: list[Tree], laid_out: Layout, work: Path, rate: float = RATE) -> Subject:
    """Train a model, and an adapter on it, for a few steps each; the reward model has the adapter and a random head."""
    roles, train = open_role(base, POLICY, LORA, _compute("bfloat16")), trees[8:]
    _train(roles, scoring.negative_mean(roles.base, 4096, laid_out), [tree.split()[0] for tree in train], 2 * rate)
    roles.merged(POLICY, base).save(_made(work / "tuned"))
    tuned = Artifact(work / "tuned", "model", "tuned", source="tuned")
    roles = open_role(tuned, POLICY, LORA, _compute("bfloat16"))
    settings = DpoSettings(policy="p", data="d")
    _train(roles, preference.objective(roles, settings, laid_out, in_each_step(roles)), train, rate)
    roles.save(POLICY, _made(work / "policy"))
    torch.manual_seed(1)
    roles.heads[POLICY] = ScalarHead(roles.base.hidden_size)
    nn.init.normal_(roles.heads[POLICY].linear.weight, std=0.02)
    roles.save(POLICY, _made(work / "reward"))
    manifest = Manifest.model_construct(
        adaptation=Adaptation(base="tuned", base_source="tuned"), inputs={}, tokenizer=models.record(roles.base)
    )
    policy, reward = (
        Artifact(work / kind, kind, kind, manifest, kind, tuned) for kind in ("policy", "reward")
    )
    return Subject(name, base, tuned, replace(policy, kind="adapter"), reward, trees, laid_out)


def _train(roles: Roles, objective: Any, examples: list[Tree], rate: float) -> None:
    optimizer = torch.optim.AdamW([each for _, each in roles.parameters(POLICY)], lr=rate, weight_decay=0.0)
    for step in range(STEPS):
        first = step * PAIRS_A_STEP % len(examples)
        with roles.use(POLICY):
            for part in objective(examples[first : first + PAIRS_A_STEP]):
                part.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def _compute(precision: str) -> Compute:
    return Compute(torch.device("cpu"), PRECISIONS[precision])


def _opened(subject: Subject, precision: str, base: Artifact | None = None) -> Roles:
    """The adapter as the role `policy` on its base, or on another."""
    roles = open_base(base or subject.tuned, _compute(precision))
    roles.load(POLICY, subject.policy.directory)
    return roles


# Faults


@contextmanager
def twice(roles: Roles, role: str = POLICY, factor: float = 2.0) -> Iterator[None]:
    """The adapter's update counts twice, or not at all."""
    layers = [layer for layer in roles._layers() if role in layer.scaling]
    before = [layer.scaling[role] for layer in layers]
    for layer in layers:
        layer.scaling[role] *= factor
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[role] = scaling


@contextmanager
def wrong_matrix(roles: Roles) -> Iterator[None]:
    """One layer's keys are computed with the next layer's weights."""
    layers = models.decoder_layers(roles.base.model)
    middle = len(layers) // 2
    first, second = (_smallest(layers[index]) for index in (middle - 1, middle))
    before, first.data = first.data, second.data
    try:
        yield
    finally:
        first.data = before


def _smallest(layer: nn.Module) -> nn.Parameter:
    """Of matrices of the base, the one with the fewest values: that of the keys, where heads share them."""
    named = [(each.numel(), name) for name, each in layer.named_parameters() if each.ndim == 2 and "lora_" not in name]
    return layer.get_parameter(min(named)[1])


def shifted(batch: TreeBatch) -> TreeBatch:
    """Second branches stand one position too far."""
    positions, start = batch.positions.clone(), 0
    for tree in batch.trees:
        second = start + len(tree.prompt) + len(tree.branches[0].tokens)
        positions[0, second : start + tree.length] += 1
        start += tree.length
    return replace(batch, positions=positions)


def half_hidden(batch: TreeBatch) -> TreeBatch:
    """Branches do not see the first half of their prompt."""

    def change(mask: Tensor, start: int, tree: Tree) -> None:
        prompt = start + len(tree.prompt)
        mask[prompt : start + tree.length, start : start + len(tree.prompt) // 2] = False

    return _masked(batch, change)


def neighbour_visible(batch: TreeBatch) -> TreeBatch:
    """Trees see the last token of the one before."""

    def change(mask: Tensor, start: int, tree: Tree) -> None:
        if start:
            mask[start : start + tree.length, start - 1] = True

    return _masked(batch, change)


def _masked(batch: TreeBatch, change: Callable[[Tensor, int, Tree], None]) -> TreeBatch:
    row = one_row(batch.trees)
    assert row.mask is not None
    mask, start = row.mask.clone(), 0
    for tree in batch.trees:
        change(mask[0, 0], start, tree)
        start += tree.length
    return replace(row, mask=mask)


def _later_positions(batch: Any, following: Tensor, done: list[bool]) -> None:
    _ADVANCE(batch, following, done)
    batch.positions += len(batch.tokens[0]) == 1


def _hidden_prompt(batch: Any, following: Tensor, done: list[bool]) -> None:
    _ADVANCE(batch, following, done)
    batch.mask[:, : batch.width // 2] = 0


_ADVANCE = rollout._Batch._advance


# Checks


def layouts(language_model: LanguageModel, trees: list[Tree], expected: str = "packed") -> Iterator[Line]:
    """`choose_layout`, and each layout beside plain rows of a copy in float32, tree by tree."""
    pairs = sorted(trees, key=lambda tree: tree.length)[:2]
    verdict = choose_layout(language_model, trees, lambda text: None)[0]
    yield line("layout", f"verdict {verdict}", 0.0, 0.0, verdict != expected, right=verdict == expected)
    if expected == "plain":
        return
    with torch.no_grad():
        trial = layout._Trial.of(language_model, pairs)
    truth = _truth(language_model, pairs)
    sound = packed if expected == "packed" else one_row
    cases = {"nothing": sound, "positions off by one": shifted, "half of the prompt hidden": half_hidden}
    for case, fault in {**cases, "neighbour visible": neighbour_visible}.items():

        def laid_out(trees: Any, fault: Any = fault) -> TreeBatch:
            return fault(trees) if fault is sound else fault(sound(trees))

        with torch.no_grad(), layout.in_float32(language_model.model):
            values = trial._computed(laid_out(pairs))
            leak = trial._leak(values, laid_out)
        with torch.no_grad(), language_model.compute.autocast():
            own = layout._gap(trial._computed(laid_out(pairs)), truth)
        gap = layout._gap(values, truth)
        with patch.object(layout, "packed", laid_out), patch.object(layout, "one_row", laid_out):
            refused = choose_layout(language_model, trees, lambda text: None)[0] == "plain"
        yield line("layout", case, gap, layout.TOLERANCE, refused, own=own)
        if case in ("nothing", "neighbour visible"):
            yield line("leak", case, leak, layout.LEAK_TOLERANCE, refused)


def _truth(language_model: LanguageModel, trees: list[Tree]) -> layout.Values:
    model = copy.deepcopy(language_model.model).float()
    found = {}
    with torch.no_grad():
        for tree in trees:
            for index, part in enumerate(tree.split()):
                found[tree.number, index] = token_logprobs(model, next(iter(batches([part], 1 << 20, "plain"))))
    return found


def replays(subject: Subject, precision: str) -> Iterator[Line]:
    """Probes of the adapter, recorded in this precision and replayed."""
    roles, directory = _opened(subject, precision), subject.policy.directory
    kept = subject.trees[:8]
    with roles.use(POLICY):
        scoring.record_probes(directory, kept, roles.base)
    other = _opened(subject, "float32" if precision == "bfloat16" else "bfloat16")
    before = _opened(subject, precision, subject.base)
    merged = Roles(replace(roles.merged(POLICY, subject.tuned), compute=roles.base.compute))
    cases: dict[str, tuple[Roles, Fault, str]] = {
        "nothing": (roles, nullcontext, POLICY),
        "nothing, in plain rows": (roles, _in_plain_rows, POLICY),
        "nothing, in the other precision": (other, nullcontext, POLICY),
        "adapter applied twice": (roles, lambda: twice(roles), POLICY),
        "adapter missing": (roles, lambda: twice(roles, factor=0.0), POLICY),
        "wrong base: a matrix of another layer": (roles, lambda: wrong_matrix(roles), POLICY),
        "wrong base: before supervised training": (before, nullcontext, POLICY),
        "adapter merged in the stored precision": (merged, nullcontext, REFERENCE),
    }
    for case, (computing, fault, role) in cases.items():
        with fault(), computing.use(role):
            yield _replayed("probes", case, directory, computing.base, lambda trees, base=computing.base: (
                scoring.mean_logprobs(base, trees)
            ))
    yield from _templates(subject, roles)
    yield from _rewards(subject, precision)
    yield from _beginning(subject, precision)


def _replayed(tolerance: str, case: str, directory: Path, base: LanguageModel, score: probes.Scorer) -> Line:
    content = json.loads((directory / probes.FILE_NAME).read_text())
    inputs = probes.trees(directory)
    weights = base.compute.dtype
    exact = content[probes.IN_FLOAT32].get(str(weights)[6:]) or content[probes.IN_FLOAT32]["bfloat16"]
    rounded = weights if str(weights)[6:] in content[probes.IN_FLOAT32] else torch.bfloat16
    value = _largest(probes.computed_in_float32(base, inputs, score, rounded), exact)
    own = _largest(score(inputs), content["outputs"])
    refused = _refuses(lambda: probes.replay(directory, score, base))
    return line(tolerance, case, value, probes.SAME, refused, own=own, own_allowed=probes.ROUNDED)


@contextmanager
def _in_plain_rows() -> Iterator[None]:
    plain = scoring.logprobs
    with patch.object(scoring, "logprobs", lambda model, trees: plain(model, trees, layout="plain")):
        yield


def _templates(subject: Subject, roles: Roles) -> Iterator[Line]:
    """The manifest's digests decide; the values are what probes would see of prompts in the other template."""
    template = roles.base.tokenizer.chat_template
    kept = subject.trees[:8]
    changes = {"newline": template + "{{ '\\n' }}", "system text missing": template.replace("You are a ", "")}
    for case, changed in changes.items():
        if changed == template:
            continue
        tokenizer = copy.deepcopy(roles.base.tokenizer)
        tokenizer.chat_template = changed
        extra = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"])
        moved = [replace(tree, prompt=tree.prompt + extra) if case == "newline" else tree for tree in kept]
        with roles.use(POLICY):
            first, second = (
                probes.computed_in_float32(roles.base, probes.choose(each), lambda t: scoring.mean_logprobs(roles.base, t))
                for each in (kept, moved)
            )
        directory = Path(tempfile.mkdtemp())
        tokenizer.save_pretrained(directory)
        changed_stage = replace(subject.policy, directory=directory)
        refused = _refuses(lambda stage=changed_stage: models.handover.open_tokenizer(stage))
        yield line("template", case, _largest(first, second), 0.0, refused)


def _rewards(subject: Subject, precision: str) -> Iterator[Line]:
    roles = open_base(subject.reward, _compute(precision))
    roles.load(REWARD, subject.reward.directory)
    directory = subject.reward.directory

    def score(trees: Any) -> list[float]:
        return scoring.reward_scores(roles, REWARD, trees)

    probes.record(directory, subject.trees[:8], score, roles.base)
    yield _replayed("probes of rewards", "nothing", directory, roles.base, score)
    with twice(roles, REWARD):
        yield _replayed("probes of rewards", "adapter applied twice", directory, roles.base, score)
    with wrong_matrix(roles):
        yield _replayed("probes of rewards", "wrong base: a matrix of another layer", directory, roles.base, score)
    same = [replace(tree, branches=(tree.branches[0],) * 4) for tree in subject.trees[:8]]
    groups = torch.tensor(list(scoring.scores(roles, REWARD, same).values()))
    spread = float((groups.amax(1) - groups.amin(1)).max())
    alike = bool(experience.all_alike(groups).all())
    yield line("ties of rewards", "the same response four times", spread, experience.SAME, not alike)
    apart = torch.tensor(list(scoring.scores(roles, REWARD, subject.trees[:32]).values()))
    gaps = (apart[:, 0] - apart[:, 1]).abs()
    yield line("ties of rewards", "two responses, the least apart", float(gaps.min()), experience.SAME, False)


def _beginning(subject: Subject, precision: str) -> Iterator[Line]:
    """The policy begins as a copy of its reference, the adapter."""
    roles = open_role(subject.policy, POLICY, LORA, _compute(precision))
    pairs = subject.trees[8:16]
    current, plain = in_each_step(roles), in_each_step(_opened(subject, precision))

    def check(reference: Any) -> bool:
        return _refuses(lambda: preference.require_beginning(roles, reference, pairs, 4096, subject.layout))

    def distance(role: str, reference: Any, exactly: bool) -> float:
        gaps = []
        for batch in scoring.on_device(roles.base, pairs, 4096, subject.layout):
            with torch.no_grad(), roles.use(role), _exact(roles, exactly):
                value = pair_logprobs(roles.base, batch) / preference.read_tokens(batch)
            with torch.no_grad(), _exact(roles, exactly):
                gaps.append(value - reference(batch) / preference.read_tokens(batch))
        return torch.cat(gaps).square().mean().sqrt().item()

    for case, fault, reference in (
        ("nothing", nullcontext(), current),
        ("adapter of the policy applied twice", twice(roles), current),
        ("log-probabilities of the base", nullcontext(), plain),
    ):
        with fault:
            value, own = (distance(POLICY, reference, exactly) for exactly in (True, False))
            yield line("beginning", case, value, probes.SAME, check(reference), own=own)


def _exact(roles: Roles, exactly: bool) -> AbstractContextManager[None]:
    return layout.in_float32(roles.base.model) if exactly else nullcontext()


def sampling(subject: Subject, precision: str) -> Iterator[Line]:
    """The preflight's comparison of sampling with training, faults being in sampling alone."""
    roles = open_role(subject.policy, POLICY, LORA, _compute(precision))
    settings = PpoSettings(policy="p", reward="r", data="d", max_new_tokens=16, samples_per_prompt=2)
    prompts = [EncodedPrompt(tree.prompt, Prompt((), origin="row")) for tree in subject.trees[:8]]
    sampler, plain = Sampler(roles, settings), rollout.sample
    collector = Collector(roles, settings, Rewards(roles, settings.model_copy(update={"reward": None})), subject.layout)

    def during(fault: Fault) -> Any:
        def faulty(*arguments: Any, **options: Any) -> Any:
            with fault():
                return plain(*arguments, **options)

        return faulty

    cases: dict[str, Fault] = {
        "nothing": nullcontext,
        "positions off by one": lambda: patch.object(rollout._Batch, "_advance", _later_positions),
        "half of the prompt hidden": lambda: patch.object(rollout._Batch, "_advance", _hidden_prompt),
        "adapter applied twice": lambda: twice(roles),
        "wrong base: a matrix of another layer": lambda: wrong_matrix(roles),
    }
    for case, fault in cases.items():
        with patch.object(rollout, "sample", during(fault)), patch("stages.core.rl.sampling.sample", during(fault)):
            drawn = sampler.rollout(prompts, 0)
            found = collector.collect(drawn, drawn.trees(), [0.0] * len(drawn.samples))
            check = preflight._gap(roles, found, settings)
            exact = preflight._gap_in_float32(roles, found, settings)
        gaps = torch.cat([each.sampled - each.logprobs for each in found])
        own, unreached = gaps.square().mean().sqrt().item(), 1 - gaps.neg().exp().mean().item()
        more = {"own": own, "own_allowed": preflight.DIFFERENCE[PRECISIONS[precision]], "unreached": unreached}
        yield line("preflight", case, exact, preflight.DIFFERENCE[torch.float32], not check.passed, **more)


def exports(subject: Subject) -> Iterator[Line]:
    """What `baton export` writes of the adapter."""
    plain = Roles.merged

    def merged(factor: float) -> Any:
        def faulty(roles: Roles, *arguments: Any) -> LanguageModel:
            with twice(roles, export.ADAPTED, factor):
                return _with_scaling(plain, roles, factor, *arguments)

        return faulty

    for case, factor in (("nothing", 1.0), ("adapter applied twice", 2.0), ("adapter missing", 0.0)):
        with patch.object(Roles, "merged", merged(factor)), tempfile.TemporaryDirectory() as directory:
            written: list[export.Parity] = []
            parity = export._parity

            def noted(*arguments: Any, parity: Any = parity, written: Any = written) -> export.Parity:
                written.append(parity(*arguments))
                return written[-1]

            with patch.object(export, "_parity", noted):
                refused = _refuses(lambda: export.write(subject.policy, Path(directory)))
        for each in written:
            share = each.difference / max(each.largest, export.LEAST)
            lost, allowed = (share, export.SAME) if each.dtype == "float32" else (each.lost, export.LOST)
            yield line("export", f"{case}, written in {each.dtype}", lost, allowed, refused, share=share)


def _with_scaling(merge: Any, roles: Roles, factor: float, role: str, *arguments: Any) -> LanguageModel:
    """The merge of an adapter whose second matrices are multiplied by a factor."""
    plain = Roles._tensors

    def scaled(self: Roles, name: str) -> dict[str, Tensor]:
        return {key: each * factor if "lora_B" in key else each for key, each in plain(self, name).items()}

    with patch.object(Roles, "_tensors", scaled):
        result: LanguageModel = merge(roles, role, *arguments)
    return result


def heads(language_model: LanguageModel) -> Iterator[Line]:
    """Logits of the head alone beside the model's, as they are, scaled and capped."""
    model, tokens = language_model.model, torch.arange(8)[None]
    plain = type(model).forward
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "nothing": lambda logits: logits,
        "logits times 1.05": lambda logits: 1.05 * logits,
        "logits times 1.2": lambda logits: 1.2 * logits,
        "logits capped at 30": lambda logits: 30 * torch.tanh(logits / 30),
    }
    for case, change in changes.items():

        def changed(self: Any, *arguments: Any, change: Any = change, **options: Any) -> Any:
            output = plain(self, *arguments, **options)
            output.logits = change(output.logits)
            return output

        with torch.no_grad(), patch.object(type(model), "forward", changed):
            states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            own = model(input_ids=tokens, use_cache=False).logits.float()
            gap = (models.logits_of(model, states) - own).abs()
            value = float((gap / (1 + own.abs())).max())
            refused = _refuses(lambda: models.require_plain_head(model))
        yield line("head", case, value, models.HEAD_TOLERANCE, refused, own=float(gap.max()))


def normalisations(language_model: LanguageModel) -> Iterator[Line]:
    """The fast normalisation beside the model's own, on the rows of the check."""
    for module in language_model.model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            weight: Any = module.weight
            rows = torch.linspace(-3, 3, norms.SIZE * len(weight), dtype=weight.dtype).view(norms.SIZE, -1)
            own = type(module).forward(module, rows)
            gap = (norms._forward(module, rows) - own).abs() / (1 + own.abs())
            value, allowed = float(gap.max()), max(1e-5, 4 * torch.finfo(weight.dtype).eps)
            yield line("normalisation", "nothing", value, allowed, "forward" not in vars(module))
            return


# Running


def _refuses(check: Callable[[], Any]) -> bool:
    try:
        check()
    except (ArtifactError, ConfigError):
        return True
    return False


def _largest(found: list[float], expected: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


def measured(subject: Subject) -> Iterator[Line]:
    """All checks in both precisions."""
    for precision in PRECISIONS:
        language_model = load_model(subject.tuned, _compute(precision))
        lines = [layouts(language_model, subject.trees, subject.layout), heads(language_model)]
        lines += [normalisations(language_model), replays(subject, precision), sampling(subject, precision)]
        for of_check in lines:
            for each in of_check:
                yield {"model": subject.name, "precision": precision, **each}
    for each in exports(subject):
        yield {"model": subject.name, "precision": "float32", **each}


def _pairs(path: Path, language_model: LanguageModel, count: int) -> list[Tree]:
    """Rows with a prompt, a chosen and a rejected response."""
    template, trees = language_model.template, []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines()[:count]):
        row = json.loads(text)
        branches = tuple(Branch.of(template.response(row[side])) for side in ("chosen", "rejected"))
        prompt = tuple(template.prompt([Message("user", row["prompt"])]))
        trees.append(Tree(prompt, branches, number, origin=f"row {number}"))
    return trees


def _random_pairs(count: int, vocabulary: int) -> list[Tree]:
    chance = random.Random(0)

    def tokens() -> tuple[int, ...]:
        return tuple(chance.randrange(5, vocabulary) for _ in range(chance.randint(4, 20)))

    return [
        Tree(tokens(), (Branch.of(tokens()), Branch.of(tokens())), number, origin=f"row {number}")
        for number in range(count)
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tolerances", description=__doc__)
    parser.add_argument("--model", type=Path, help="a model directory, or a GGUF file")
    parser.add_argument("--pairs", type=Path, help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--families", action="store_true", help="tiny models with random weights instead")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.families:
            for family in FAMILIES:
                tiny(family, torch.float32).save(_made(work / family / "base"))
                base = Artifact(work / family / "base", "model", "base", source="base")
                trees = _random_pairs(40, len(tokenizer()))
                found += measured(prepare(family, base, trees, LAYOUTS[family], work / family, 10 * RATE))
        else:
            path = options.model
            if path.is_file():
                path = gguf.converted(path, file_sha256(path))
            base = Artifact(path, "model", "base", source=str(options.model))
            trees = _pairs(options.pairs, load_model(base, _compute("bfloat16")), 40)
            found += measured(prepare(options.model.stem, base, trees, "packed", work))
    record = {"seconds": round(time.perf_counter() - began), "threads": torch.get_num_threads(), "lines": found}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
