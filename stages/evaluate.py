"""Compare models with their parents on held-out rows, each figure with a 95% interval.

Every model answers the same held-out prompts, sampled from its own distribution unless the settings of decoding say
otherwise. The answers are judged by a programmatic gold reward where the data has one, by a reward model, and by the
user's own rules and servers; a child is compared with its parent prompt by prompt, so the interval is that of the
paired difference; so are wins, ties and losses by each judge, and tests that are corrected for their number. The KL
divergence to the reference is estimated on the model's own samples (the mean of log pi - log pi_ref over whole
responses); other answers have none. Held-out text gives perplexity and bits per byte, held-out pairs the accuracy of
the reward model and of each policy's implicit reward. With `best_of`, best-of-n sampling from a model is the bar for
the adapters trained from it; `suites` measure what single questions ask (`stages/core/suites.py`).

    python -m stages.evaluate CONFIG [key=value ...]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.intake import refuse_trained
from data.naming import require_plain
from data.schema import Preference, Prompt, Text
from data.tree import Tree, preference_tree, usable
from pipeline.config import EvaluateSettings
from pipeline.contract import Context, Result
from pipeline.errors import DataError
from pipeline.figures import RATIO
from pipeline.manifest import DataCard, Metric
from pipeline.suites import SampledSuite
from reward.best_of_n import Frontier, divergence
from reward.intervals import mean_interval, proportion_interval, ratio_interval, share_preferred
from reward.rules import require_facts
from stages.core import device, loop, memory, rows
from stages.core.answers import PLAIN, Answers, answer, room
from stages.core.comparison import Comparison, compare, corrected_tests
from stages.core.documents import Likelihood, perplexity, text_likelihoods
from stages.core.judges import Judges, in_words
from stages.core.lineup import Contestant, Lineup, parent_digest
from stages.core.roles import REWARD, Roles
from stages.core.scoring import exponential, logprobs, scores
from stages.core.suites import Suites

Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Material:
    """The held-out rows that models are compared on."""

    prompts: Sequence[Prompt]
    pairs: Sequence[Preference]
    texts: Sequence[Text]


@dataclass
class Findings:
    """What was found, by the models' names.

    Attributes:
        answers: One response to each prompt.
        comparisons: With the parents.
        likelihoods: Of the held-out text.
        frontiers: Best-of-n's, of the models that adapters were trained from.
        metrics: The figures.
        tokens: Sampled in all.
    """

    answers: dict[str, Answers] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    likelihoods: dict[str, dict[int, Likelihood]] = field(default_factory=dict)
    frontiers: dict[str, Frontier] = field(default_factory=dict)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    tokens: int = 0


def run(context: Context) -> Result:
    """Sample, judge, compare; writes `evaluation.json` and `samples.jsonl`.

    Raises:
        DataError: There is no held-out row, or a prompt or text of a test set or suite is trained on.
        ArtifactError: A model is damaged or not what its manifest says.
        ConfigError: A model has no room for a prompt before so long a response, or names are not distinct.
        ServerError: A judge's server is out of reach from the beginning, or breaks the protocol.
    """
    compute = device.for_stage(context)
    fitted = memory.fit(context, compute)
    context, settings = fitted.context, fitted.context.settings
    loop.seed_everything(context.seed)
    learnt, texts = ([context.sources[name] for name in names] for names in (context.trained, context.pretrained))
    refuse_trained(context.data.values(), learnt, texts)
    models = {role: artifact for role, artifact in context.inputs.items() if role.startswith("models.")}
    lineup = Lineup(models, compute)
    judges = Judges.named_in(context, lineup)
    cards: list[DataCard] = []
    material = Material(
        prompts=_held_out(context, "prompts", Prompt, cards),
        pairs=_held_out(context, "pairs", Preference, cards),
        texts=_held_out(context, "text", Text, cards),
    )
    for prompt in material.prompts:
        require_facts({settings.gold}, prompt)
        require_plain(str(prompt.facts.get("task", "")), "task", prompt.origin)
    suites = Suites(context)
    _require_room(lineup, context)
    judges.try_out(material.prompts)
    suites.try_out()
    found = _evaluate(lineup, judges, material, suites, context)
    if measured := _of_reward_model(judges, material.pairs, suites, settings):
        found.metrics[judges.reward_name] = measured
    _write(context, lineup, material.prompts, found, suites)
    warnings = [*_warnings(lineup, found, settings), *_given_up(judges, suites, context.name)]
    warnings += _cut(found.answers, suites)
    for warning in warnings:
        context.say(warning)
    return Result(
        kind="evaluation",
        metrics={f"{name}.{metric}": value for name, own in found.metrics.items() for metric, value in own.items()},
        data=[*cards, *suites.cards],
        tokens=found.tokens + suites.tokens,
        compute=compute.record,
        expected_memory=fitted.expected,
        warnings=warnings,
    )


def _require_room(lineup: Lineup, context: Context) -> None:
    """See that every model has room for the prompts of all that it is asked, before the first one answers."""
    settings, stage = context.settings, f"stages.{context.name}"
    longest = {f"{stage}.max_new_tokens": settings.max_new_tokens}
    asked = ((role, suite) for role, suite in context.data.items() if isinstance(suite, SampledSuite))
    longest |= {f"{stage}.{role}.max_new_tokens": suite.max_new_tokens for role, suite in asked}
    for contestant in lineup.contestants.values():
        for where, max_new_tokens in longest.items():
            room(contestant, settings.max_length, max_new_tokens, where)


def _of_reward_model(
    judges: Judges, pairs: Sequence[Preference], suites: Suites, settings: EvaluateSettings
) -> Metrics:
    """How often the reward model is right of held-out pairs, and what the suites that are about it say."""
    if judges.reward is None:
        return {}
    own = _judge_accuracy(judges.reward, pairs, settings) if pairs else {}
    return own | suites.measure_judge(judges.reward_name, judges.reward)


def _held_out(context: Context, role: str, kind: type[rows.Item], cards: list[DataCard]) -> Sequence[rows.Item]:
    """The first held-out rows of a data role; empty when the stage was not given it."""
    if role not in context.data:
        return []
    found = rows.read_rows(context, role, kind)
    # The same prompt twice is one observation, and would make intervals look narrower than they are.
    distinct = {row.prompt if isinstance(row, Prompt) else row: row for row in reversed(found.held_out)}
    chosen = list(reversed(distinct.values()))[: context.settings.rows]
    if not chosen:
        raise DataError("no held-out rows", where=context.data[role].name, hint="raise its held_out or give more rows")
    cards.append(rows.card(context, role, found.record, len(chosen), rows.HELD_OUT))
    return chosen


def _evaluate(lineup: Lineup, judges: Judges, material: Material, suites: Suites, context: Context) -> Findings:
    settings, found, prompts = context.settings, Findings(), material.prompts
    adapted = {each.parent for each in lineup.contestants.values() if each.artifact.kind == "adapter"}
    for done, (name, contestant) in enumerate(lineup.contestants.items(), 1):
        own = answer(contestant, prompts, judges.reward, settings, context.seed)
        found.answers[name] = judges.score_by_rules(own, prompts)
        found.tokens += found.answers[name].tokens
        if settings.best_of and name in adapted:
            # Another seed: a parent's own figures and its frontier's are of different samples.
            several = answer(contestant, prompts, judges.reward, settings, context.seed + 1, settings.best_of)
            found.frontiers[name] = several.frontier()
            found.tokens += several.tokens
        if contestant.parent:
            parent = found.answers[contestant.parent]
            of_pairs = judges.compare(found.answers[name], parent, prompts)
            found.comparisons[name] = compare(found.answers[name], parent, prompts, of_pairs)
        found.metrics[name] = _metrics(contestant, lineup, found, material, settings) | suites.measure(contestant)
        context.progress({"model": name}, done=done, total=len(lineup.contestants))
    return found


def _warnings(lineup: Lineup, found: Findings, settings: EvaluateSettings) -> list[str]:
    warnings = [
        f"{name} is compared with nothing: its parent is not among `models`"
        for name, contestant in lineup.contestants.items()
        if contestant.parent is None and parent_digest(contestant.artifact)
    ]
    if settings.best_of and not found.frontiers:
        warnings.append("best_of has nothing to measure: there is no adapter among `models` together with its parent")
    if not settings.is_plain:
        warnings.append("no KL divergence is told: it is that of samples with `temperature` alone")
    warnings += [
        f"{name}: {said.unread} of {len(said.outcomes)} comparisons with its parent got no verdict of {judge} that can "
        "be read: they are in no win rate"
        for name, each in found.comparisons.items()
        for judge, said in each.judgements.items()
        if said.unread
    ]
    return warnings


def _given_up(judges: Judges, suites: Suites, stage: str) -> list[str]:
    failed = {f"judge {name}": why for name, why in judges.given_up.items()}
    failed |= {f"suite {name}": why for name, why in suites.given_up.items()}
    return [
        f"the {name} was given up, and has no further figures: {why}; `--force {stage}` measures all again"
        for name, why in failed.items()
    ]


def _cut(answers: Mapping[str, Answers], suites: Suites) -> list[str]:
    counts = {"the held-out rows": {name: each.cut for name, each in answers.items() if each.cut}}
    counts |= {f"the suite {name}": by_model for name, by_model in suites.cut.items()}
    return [
        f"{name}: {count} prompts of {source} lost their beginning, since they left no room for a response: "
        "raise max_length, if the model has the positions"
        for source, by_model in counts.items()
        for name, count in by_model.items()
    ]


def _metrics(
    contestant: Contestant, lineup: Lineup, found: Findings, material: Material, settings: EvaluateSettings
) -> Metrics:
    own = found.answers[contestant.name]
    metrics = {
        "length": mean_interval(own.lengths),
        **_judged(own, material.prompts),
    }
    if contestant.parent:
        metrics |= found.comparisons[contestant.name].metrics
    if contestant.parent and contestant.artifact.kind == "adapter":
        parent = lineup.contestants[contestant.parent]
        if settings.is_plain:
            log_ratios = _log_ratios(contestant, parent, own.trees, settings)
            metrics["kl"] = mean_interval(log_ratios)
            if parent.name in found.frontiers:
                metrics["frontier_gap"] = found.frontiers[parent.name].gap(own.judged, log_ratios)
        if material.pairs:
            metrics["pair_accuracy"] = _implicit_accuracy(contestant, parent, material.pairs, settings)
    if material.texts:
        with contestant.use() as language_model:
            own_text = text_likelihoods(language_model, material.texts, settings.max_length, settings.batch_tokens)
        found.likelihoods[contestant.name] = own_text
        metrics |= _of_text(own_text)
        if contestant.parent:
            metrics |= _of_text_against(own_text, found.likelihoods[contestant.parent])
    return metrics


def _judged(own: Answers, prompts: Sequence[Prompt]) -> Metrics:
    """Mean scores by judge, and accuracy over all prompts and by task, where the prompts name one."""
    shares = own.accuracies(prompts).items()
    return {
        **{name: mean_interval(values) for name, values in own.scores.items()},
        **{name: proportion_interval(round(sum(correct)), len(correct)) for name, correct in shares},
    }


def _log_ratios(
    contestant: Contestant, parent: Contestant, trees: Sequence[Tree], settings: EvaluateSettings
) -> list[float]:
    """log pi - log pi_ref of the policy's own responses at the sampling temperature: their mean is the divergence."""
    own = _branch_logprobs(contestant, trees, settings, settings.temperature)
    other = _branch_logprobs(parent, trees, settings, settings.temperature)
    return [own[tree.number][0] - other[tree.number][0] for tree in trees]


def _implicit_accuracy(
    contestant: Contestant, parent: Contestant, pairs: Sequence[Preference], settings: EvaluateSettings
) -> Metric:
    """Share of pairs that the implicit reward, log pi - log pi_ref, ranks as the data does."""
    trees = _pair_trees(contestant.roles, pairs, settings)
    own = _branch_logprobs(contestant, trees, settings)
    other = _branch_logprobs(parent, trees, settings)
    margins = [_first_over_last(own[tree.number]) - _first_over_last(other[tree.number]) for tree in trees]
    return share_preferred(margins)


def _first_over_last(values: Sequence[float]) -> float:
    return values[0] - values[-1]


def _branch_logprobs(
    contestant: Contestant, trees: Sequence[Tree], settings: EvaluateSettings, temperature: float = 1.0
) -> dict[int, list[float]]:
    with contestant.use() as language_model:
        return logprobs(language_model, trees, settings.batch_tokens, PLAIN, temperature)


def _pair_trees(roles: Roles, pairs: Sequence[Preference], settings: EvaluateSettings) -> list[Tree]:
    template, longest = roles.base.template, roles.base.longest(settings.max_length)
    trees, dropped = usable(preference_tree(template, row, n, longest) for n, row in enumerate(pairs))
    if not trees:
        raise DataError(f"no usable pair: {dropped}", where="pairs", hint="raise max_length")
    return trees


def _judge_accuracy(judge: Roles, pairs: Sequence[Preference], settings: EvaluateSettings) -> Metrics:
    trees = _pair_trees(judge, pairs, settings)
    found = scores(judge, REWARD, trees, settings.batch_tokens, PLAIN)
    margins = [first - max(others) for first, *others in (found[tree.number] for tree in trees)]
    return {"pair_accuracy": share_preferred(margins)}


def _of_text(own: Mapping[int, Likelihood]) -> Metrics:
    """Perplexity per token and bits per byte."""
    if not own:
        return {}
    documents = own.values()
    return {
        "perplexity": perplexity(documents),
        "bits_per_byte": ratio_interval([each.bits for each in documents], [each.bytes for each in documents]),
    }


def _of_text_against(own: Mapping[int, Likelihood], parent: Mapping[int, Likelihood]) -> Metrics:
    """Ratios to the parent's on the documents that both took; that of perplexities only for the same tokens."""
    shared = [(own[number], parent[number]) for number in own if number in parent]
    if not shared:
        return {}
    losses = [(mine.loss, theirs.loss) for mine, theirs in shared]
    metrics = {f"bits_per_byte{RATIO}": ratio_interval(*zip(*losses, strict=True))}
    if all(mine.tokens == theirs.tokens for mine, theirs in shared):
        ratio = ratio_interval([mine - theirs for mine, theirs in losses], [mine.tokens for mine, _ in shared])
        metrics[f"perplexity{RATIO}"] = exponential(ratio)
    return metrics


def _write(context: Context, lineup: Lineup, prompts: Sequence[Prompt], found: Findings, suites: Suites) -> None:
    """`evaluation.json` for the report, `samples.jsonl` with one prompt a line and every model's answer, and what the
    suites write."""
    parents = {name: contestant.parent for name, contestant in lineup.contestants.items()}
    tests = corrected_tests({name: each.tested | suites.pairs(name) for name, each in found.comparisons.items()})
    # A family of their own: into however many categories a suite is cut, whole figures stay as clear as they are.
    of_parts = corrected_tests({name: suites.parts(name) for name in found.comparisons})
    compared: dict[str, dict[str, Any]] = {
        name: {"comparison": each.as_json(tests[name] | of_parts[name])} for name, each in found.comparisons.items()
    }
    content = {
        "gold": context.settings.gold,
        "judges": in_words(context),
        "models": {
            name: {"parent": parents.get(name), "metrics": _dumped(metrics)} | compared.get(name, {})
            for name, metrics in found.metrics.items()
        },
        "frontier": {name: _points(frontier) for name, frontier in found.frontiers.items()},
        "suites": suites.record(),
    }
    suites.write(context.directory)
    (context.directory / "evaluation.json").write_text(json.dumps(content, indent=1))
    with (context.directory / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for number, prompt in enumerate(prompts):
            stream.write(json.dumps(_sample(number, prompt, found), ensure_ascii=False) + "\n")


def _dumped(metrics: Metrics) -> dict[str, Any]:
    return {name: metric.model_dump() for name, metric in metrics.items()}


def _points(frontier: Frontier) -> list[dict[str, Any]]:
    """What the best of each n is worth on average; without a gold reward there is none by it."""
    points = []
    for place, n in enumerate(frontier.counts):
        metrics = {"reward": mean_interval(frontier.rewards[place])}
        if frontier.gold is not None:
            metrics["gold"] = mean_interval(frontier.gold[place])
        points.append({"n": n, "kl": divergence(n), **_dumped(metrics)})
    return points


def _sample(number: int, prompt: Prompt, found: Findings) -> dict[str, object]:
    """One prompt: what each model answered, what the judges give that, and what they say of it and its parent's."""
    answers = found.answers
    scores = {
        judge: {name: each.by_rules[judge][number] for name, each in answers.items() if judge in each.by_rules}
        for judge in next(iter(answers.values())).by_rules
    }
    outcomes: dict[str, dict[str, float | None]] = {}
    for name, comparison in found.comparisons.items():
        for judge, said in comparison.judgements.items():
            outcomes.setdefault(judge, {})[name] = said.outcomes[number]
    return {
        "prompt": [{"role": message.role, "content": message.content} for message in prompt.prompt],
        "responses": {name: each.texts[number] for name, each in answers.items()},
        "gold": {name: each.gold[number] for name, each in answers.items() if each.gold},
        "correct": {name: float(each.correct[number] == 1.0) for name, each in answers.items() if each.correct},
        "length": {name: each.lengths[number] for name, each in answers.items()},
        "reward": {name: each.rewards[number] for name, each in answers.items() if each.rewards},
        "scores": scores,
        "outcomes": outcomes,
        "answer": prompt.facts.get("answer"),
        "task": prompt.facts.get("task"),
    }


if __name__ == "__main__":
    from pipeline.launch import main

    main("evaluate")
