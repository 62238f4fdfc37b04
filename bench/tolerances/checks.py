"""The product's own checks, on sound models and on planted faults.

A line is one check on one case: `value` is what the check compares with `allowed`, and `own` is the same difference in
the run's precision where the check decides in float32.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.tolerances.faults import (
    half_hidden,
    hidden_prompt,
    later_positions,
    neighbour_visible,
    shifted,
    twice,
    wrong_matrix,
)
from bench.tolerances.subjects import LORA, PRECISIONS, Subject, compute, opened
from data.batch import TreeBatch, batches, one_row, packed
from data.schema import Prompt
from data.tree import Tree
from pipeline.config import PpoSettings
from pipeline.errors import ArtifactError, ConfigError
from stages.core import export, layout, models, norms, preference, probes, rollout, scoring
from stages.core.forward import token_logprobs
from stages.core.layout import choose_layout
from stages.core.models import LanguageModel
from stages.core.reference import in_each_step, pair_logprobs
from stages.core.rl import experience, preflight, rewards
from stages.core.rl.experience import Collector
from stages.core.rl.prompts import EncodedPrompt
from stages.core.rl.rewards import Rewards
from stages.core.rl.sampling import Sampler
from stages.core.roles import POLICY, REFERENCE, REWARD, Roles, open_base, open_role

Line = dict[str, Any]
Fault = Callable[[], AbstractContextManager[Any]]


def line(tolerance: str, case: str, value: float, allowed: float, refused: bool, **more: Any) -> Line:
    """One result."""
    found = {"tolerance": tolerance, "case": case, "value": value, "allowed": allowed, "refused": refused, **more}
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    return found


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
    roles, directory = opened(subject, precision), subject.policy.directory
    kept = subject.trees[:8]
    with roles.use(POLICY):
        scoring.record_probes(directory, kept, roles.base)
    other = opened(subject, "float32" if precision == "bfloat16" else "bfloat16")
    before = opened(subject, precision, subject.base)
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
            yield _replayed(
                "probes",
                case,
                directory,
                computing.base,
                lambda trees, base=computing.base: scoring.mean_logprobs(base, trees),
            )
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
    with patch.object(scoring, "logprobs", lambda model, trees, **_: plain(model, trees, layout="plain")):
        yield


def _templates(subject: Subject, roles: Roles) -> Iterator[Line]:
    """The manifest's digests decide; the values are what probes would see of prompts in the other template."""
    template, kept = roles.base.tokenizer.chat_template, subject.trees[:8]
    newline = tuple(roles.base.tokenizer("\n", add_special_tokens=False)["input_ids"])
    changes = {
        "a newline more": (template + "{{ '\n' }}", [replace(tree, prompt=tree.prompt + newline) for tree in kept]),
        "system text missing": (template.replace("You are a ", ""), [_without_first_turn(tree) for tree in kept]),
    }
    for case, (changed, moved) in changes.items():
        if changed == template:
            continue
        tokenizer = copy.deepcopy(roles.base.tokenizer)
        tokenizer.chat_template = changed
        with roles.use(POLICY):
            first, second = (_exact_probes(roles.base, trees) for trees in (kept, moved))
        with tempfile.TemporaryDirectory() as directory:
            tokenizer.save_pretrained(directory)
            changed_stage = replace(subject.policy, directory=Path(directory))
            refused = _refuses(lambda stage=changed_stage: models.handover.open_tokenizer(stage))
        yield line("template", case, _largest(first, second), 0.0, refused)


def _exact_probes(base: LanguageModel, trees: list[Tree]) -> list[float]:
    return probes.computed_in_float32(base, probes.choose(trees), lambda chosen: scoring.mean_logprobs(base, chosen))


def _without_first_turn(tree: Tree) -> Tree:
    """The prompt from its second turn on, which begins with the same token as the first."""
    return (
        replace(tree, prompt=tree.prompt[tree.prompt.index(tree.prompt[0], 1) :])
        if (tree.prompt.count(tree.prompt[0]) > 1)
        else tree
    )


def _rewards(subject: Subject, precision: str) -> Iterator[Line]:
    roles = open_base(subject.reward, compute(precision))
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
    groups = torch.tensor(list(scoring.scores(roles, REWARD, same, layout=subject.layout).values()))
    own = float((groups.amax(1) - groups.amin(1)).max())
    numbers = rewards.first_of_equals(same)
    groups = groups.flatten()[numbers].view(len(same), -1)
    spread, alike = float((groups.amax(1) - groups.amin(1)).max()), bool(experience.all_alike(groups).all())
    yield line("ties of rewards", "the same response four times", spread, experience.SAME, not alike, own=own)
    apart = torch.tensor(list(scoring.scores(roles, REWARD, subject.trees[:32], layout=subject.layout).values()))
    gaps = (apart[:, 0] - apart[:, 1]).abs()
    yield line("ties of rewards", "two responses, the least apart", float(gaps.min()), experience.SAME, False)


def _beginning(subject: Subject, precision: str) -> Iterator[Line]:
    """The policy begins as a copy of its reference, the adapter."""
    roles = open_role(subject.policy, POLICY, LORA, compute(precision))
    pairs = subject.trees[8:16]
    current, plain = in_each_step(roles), in_each_step(opened(subject, precision))

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
    roles = open_role(subject.policy, POLICY, LORA, compute(precision))
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
        "positions off by one": lambda: patch.object(rollout._Batch, "_advance", later_positions),
        "half of the prompt hidden": lambda: patch.object(rollout._Batch, "_advance", hidden_prompt),
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
        yield line("head", case, value, models.HEAD_TOLERANCE[model.dtype], refused, own=float(gap.max()))


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


def _refuses(check: Callable[[], Any]) -> bool:
    try:
        check()
    except (ArtifactError, ConfigError):
        return True
    return False


def _largest(found: list[float], expected: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))
