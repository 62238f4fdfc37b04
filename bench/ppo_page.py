"""The PPO comparison as a page for those who decide whether to believe it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from bench import processes
from bench.figures import memory, ratios

Run = Mapping[str, Any]
NAMES = {"ours": "Baton", "ppo": "TRL {trl} PPOTrainer", "rloo": "TRL {trl} RLOOTrainer"}
PHASES = ("rollout", "scoring", "training")
HELD = ("MiB on the device", "MiB resident", "above imports", "parameters in memory", "of them trained")

MEASURES = """\
How it is counted. An iteration is one rollout and all updates on it; time is that between the end of the last warm-up
iteration and the end of the last one. Rollout is sampling; scoring is everything until advantages are there; training
is the rest. Tokens are those that were sampled. Memory is the most that was resident (VmHWM) until the last iteration,
and by how much that is more than after the imports. Parameters are those of all models that a process holds at the end,
each storage once. Reward and KL (summed over a response) are those of the last iteration, before its updates; the
reward is the same function on both sides. Explained variance is 1 - Var(returns - values) / Var(returns)."""

EQUAL = (
    "The base: `{model}`{bits}, {parameters:,.1f} million parameters, and the reward model on it"
    " ({accuracy}; the peers are given it with its adapter merged).",
    "The prompts and their order: {prompts} a step, {prompt_tokens:,.0f} tokens on average, at most {prompt}; compared"
    " with those drawn when they reach either side's sampling, where a difference ends the run.",
    "The responses' length: {responses} an iteration, {new_tokens} tokens each. No token ends a response, which both"
    " sides make sure of.",
    "Optimizer steps: one a pass over the rollout. Micro-batches: {micro} padded rows for the peer, as many tokens for"
    " Baton.",
    "KL coefficient, GAE, clipping, temperature 1, a constant learning rate of {learning_rate}; {threads} threads.",
)

UNEQUAL = {
    "ppo": (
        "PPOTrainer puts an adapter on the policy alone and trains all of the value model, in float32, at the policy's"
        " learning rate; Baton trains an adapter and a head, at its own default rate. Compare the explained variance.",
        "PPOTrainer does not clip gradients, and takes one optimizer step of policy and value together.",
        "PPOTrainer keeps the log-probabilities of its sampling as those of the old policy; Baton computes them again.",
    ),
    "rloo": (
        "RLOOTrainer's advantages, ratios and clipping are of whole responses, which cost the same to compute.",
        "The reward is computed in a function that TRL calls.",
    ),
}
OTHER_WORK = (
    "Settings of Baton's stage that are not its defaults: `{settings}`. The peer's adapter has `lora.top_layers` too; "
    "others it does not know, and where they leave work out, a ratio is not that of equal work."
)
"""Said of what was set."""


def write(record: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    options, method = record["options"], record["options"]["method"]
    names = {"ours": NAMES["ours"], "peer": NAMES[method].format(trl=record["trl"])}
    alone = next(iter(names.values())) if len(record["sides"]) == 1 else ""
    parts = [
        f"# {method}: {names[record['sides'][0]] + ' alone' if alone else ' beside '.join(names.values())}",
        "" if alone else summary(record),
        *(_section(int(epochs), runs, names, record) for epochs, runs in record["runs"].items()),
        _tried(record),
        "\n".join(["Equal on both sides:", "", *(f"* {line.format(**_equal(record))}" for line in EQUAL)]),
        "" if alone else "\n".join(["Not equal:", "", *(f"* {line}" for line in UNEQUAL[method])]),
        "" if options["set"] == "[]" else OTHER_WORK.format(settings=options["set"]),
        MEASURES.replace("\n", " "),
        "To repeat it:",
        f"    {record['command']}",
        f"Computed {record['device']}, {options['threads']} threads. {processes.sentence(record['machine'])}",
    ]
    return "\n\n".join(part for part in parts if part)


def summary(record: Mapping[str, Any]) -> str:
    said = []
    for epochs, runs in record["runs"].items():
        faster = [1 / each for each in ratios(runs["ours"], runs["peer"], "seconds")]
        said.append(
            f"{processes.spread(faster, 2)} times the speed, {memory(runs['ours'], runs['peer'])} with "
            f"{_passes(int(epochs))}"
        )
    pairs = len(next(iter(record["runs"].values()))["ours"])
    return (
        f"**{'; '.join(said)}**: median [least, most] of the ratios of {pairs} pairs of runs, each a process of its "
        "own, taking turns."
    )


def _section(
    epochs: int, runs: Mapping[str, Sequence[Run]], names: Mapping[str, str], record: Mapping[str, Any]
) -> str:
    """The figures of both sides with so many passes over every rollout."""
    titles = {side: names[side] + (f", `{record['variant']}`" if side == "peer" else "") for side in runs}
    speed = processes.table(
        ["", "seconds per iteration", *PHASES, "tokens per second"],
        [[titles[side], *_speed(found)] for side, found in runs.items()],
    )
    on_device = all("device_mib" in run for found in runs.values() for run in found)
    held = processes.table(
        ["", *(HELD if on_device else HELD[1:])],
        [[titles[side], *_held(found, on_device=on_device)] for side, found in runs.items()],
    )
    learned = processes.table(
        ["the last iteration's", "reward", "KL in nats", "explained variance"],
        [[titles[side], *_learned(found)] for side, found in runs.items()],
    )
    tables = [f"## {_passes(epochs).capitalize()} over every rollout", speed, held, _one_copy(runs, record), learned]
    return "\n\n".join(part for part in tables if part)


def _speed(runs: Sequence[Run]) -> list[str]:
    phases = [[mean(step[name] for step in run["timed"]) for run in runs] for name in PHASES]
    return [
        processes.spread([run["seconds"] for run in runs], 2),
        *(processes.spread(each, 2) for each in phases),
        processes.spread([run["tokens_per_second"] for run in runs], 0),
    ]


def _held(runs: Sequence[Run], *, on_device: bool) -> list[str]:
    return [
        *([processes.spread([run["device_mib"] for run in runs], 0)] if on_device else []),
        processes.spread([run["resident_mib"] for run in runs], 0),
        processes.spread([run["resident_mib"] - run["imports_mib"] for run in runs], 0),
        f"{runs[0]['parameters'] / 1e6:,.1f} million, {runs[0]['parameter_bytes'] / 2**20:,.0f} MiB",
        f"{runs[0]['trained'] / 1e6:,.2f} million",
    ]


def _one_copy(runs: Mapping[str, Sequence[Run]], record: Mapping[str, Any]) -> str:
    """How much of Baton's memory is the base."""
    if "ours" not in runs:
        return ""
    found = runs["ours"][0]["base_bytes"]
    each = found / record["material"]["parameters"]
    return (
        f"The base's own weights take {found / 2**20:,.1f} MiB of Baton's, {each:.2g} bytes a parameter: all roles "
        "share one copy."
    )


def _learned(runs: Sequence[Run]) -> list[str]:
    def spread(name: str) -> str:
        values = [run["last"][name] for run in runs if name in run["last"]]
        return processes.spread(values, 3) if values else "no value function"

    return [spread("reward"), spread("kl"), spread("explained_variance")]


def _tried(record: Mapping[str, Any]) -> str:
    """How the peer's ways compare."""
    tried = {name: said for name, said in record["tried"].items() if said}
    if not tried:
        return ""
    rows = []
    for name, said in tried.items():
        if "failed" in said:
            rows.append((f"`{name}`", f"does not run: {said['failed']}", "", "", ""))
            continue
        above = said["resident_mib"] - said["imports_mib"]
        parameters = f"{said['parameters'] / 1e6:,.1f} million"
        rows.append(
            (f"`{name}`", f"{said['seconds']:.2f}", f"{above:,.0f}", parameters, f"{said['trained'] / 1e6:,.1f}")
        )
    said = (
        f"The peer's ways, each tried once on a few iterations with {_passes(int(next(iter(record['runs']))))} "
        f"(`bench/{record['options']['method']}_peer.py` says what they are); `{record['variant']}` was taken, the "
        "fastest that trains an adapter."
    )
    headings = ["way", "seconds per iteration", "MiB above imports", "parameters in memory", "of them trained"]
    return said + "\n\n" + processes.table(headings, rows)


def _equal(record: Mapping[str, Any]) -> dict[str, Any]:
    options, material = record["options"], record["material"]
    accuracy = material["reward_accuracy"]
    judged = "not judged" if accuracy is None else f"right about {accuracy:.0%} of held-out pairs"
    counts = {name: record["counts"][name] for name in ("prompts", "responses")}
    given = {**options, **material, **counts, "accuracy": judged}
    bits = "" if options["quantization"] == "none" else f" in {options['quantization']}, as Baton's SFT stage adapts it"
    shaped = {"model": options["model"], "parameters": material["parameters"] / 1e6, "bits": bits}
    return given | shaped | {"micro": options["micro_batch"]}


def _passes(epochs: int) -> str:
    return "one pass" if epochs == 1 else f"{epochs} passes"
