"""A comparison as a page for those who decide whether to believe it."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import processes
from bench.figures import memory, ratios

if TYPE_CHECKING:
    from bench.comparison import Work

MEASURES = """\
How it is counted. Time is that between the end of the last warm-up step and the end of the last step. Tokens are those
of plain rows without padding, every response behind a copy of its prompt, and the same number on both sides. The share
of the peak is of the FLOPs that a side cannot do without: {body} for each parameter of the layers and each token,
{head} for each of the head's and each predicted token; on Baton's side a prompt counts once for all its responses.
Attention's products, adapters and padding are not in it. Memory is the most that was resident (VmHWM) until the last
step, and by how much that is more than after the imports; both sides load the base and make their tokens in that
time."""


def write(work: Work, record: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    alone = "peer" not in record["runs"]
    parts = [
        f"# {work.kind}: Baton{' alone' if alone else f' beside {work.peer}'}",
        "" if alone or "ours" not in record["runs"] else summary(record),
        _table(work, record),
        _tried(record),
        _learning(record),
        _equal(work, record),
        _unequal(work, record),
        MEASURES.format(body=work.passes.body, head=work.passes.head).replace("\n", " "),
        "To repeat it:",
        f"    {record['command']}",
        f"Computed {record['device']}, {record['options']['threads']} threads. {processes.sentence(record['machine'])}",
    ]
    return "\n\n".join(part for part in parts if part)


def summary(record: Mapping[str, Any]) -> str:
    runs = record["runs"]
    faster = ratios(runs["ours"], runs["peer"], "tokens_per_second")
    return (
        f"**{processes.spread(faster, 2)} times the speed, {memory(runs['ours'], runs['peer'])}**: "
        f"median [least, most] of the ratios of {len(faster)} pairs of runs, each a process of its own, taking turns."
    )


def _table(work: Work, record: Mapping[str, Any]) -> str:
    names = {"ours": "Baton", "peer": f"{work.peer}, `{record['variant']}`"}
    peak = max(run["peak"] for runs in record["runs"].values() for run in runs)
    on_device = all("device_mib" in run for runs in record["runs"].values() for run in runs)
    headings = ["", f"{work.unit} per second", "tokens per second", "share of the matmul peak"]
    headings += ["MiB on the device"] if on_device else []
    headings += ["MiB resident", "above imports", "seconds from imports to the first step's end"]
    rows = [[names[side], *_row(runs, peak, on_device=on_device)] for side, runs in record["runs"].items()]
    said = f"The matmul peak is {peak / 1e9:,.0f} GFLOP/s in {record['options']['dtype']}, the best of all processes."
    return processes.table(headings, rows) + "\n\n" + said


def _row(runs: list[Mapping[str, Any]], peak: float, *, on_device: bool) -> list[str]:
    def spread(name: str, decimals: int) -> str:
        return processes.spread([run[name] for run in runs], decimals)

    return [
        spread("examples_per_second", 2),
        spread("tokens_per_second", 0),
        processes.spread([100 * run["flops_per_second"] / peak for run in runs]) + " %",
        *([spread("device_mib", 0)] if on_device else []),
        spread("resident_mib", 0),
        processes.spread([run["resident_mib"] - run["imports_mib"] for run in runs], 0),
        spread("first_step_after", 1),
    ]


def _tried(record: Mapping[str, Any]) -> str:
    """How the peer's ways compare."""
    tried = {name: said for name, said in record["tried"].items() if said}
    if not tried:
        return ""
    ours = median(run["tokens_per_second"] for run in record["runs"].get("ours", [])) if "ours" in record["runs"] else 0
    rows = []
    for name, said in tried.items():
        if "failed" in said:
            rows.append((f"`{name}`", f"does not run: {said['failed']}", "", "", ""))
            continue
        speed = said["tokens_per_second"]
        beside = f"{ours / speed:.2f}" if ours else ""
        figures = (f"{speed:,.0f}", beside, f"{said['resident_mib']:,.0f}", f"{said['losses'][0]:.4f}")
        rows.append((f"`{name}`", *figures))
    said = (
        "The peer's ways to compute, each tried once on a few steps (`bench/peer.py` says what they are); "
        f"`{record['variant']}` was taken, the fastest that keeps rows whole and apart from each other."
    )
    headings = ["way", "tokens per second", "Baton's median over it", "MiB resident", "first loss"]
    return said + "\n\n" + processes.table(headings, rows)


def _learning(record: Mapping[str, Any]) -> str:
    learning = record["learning"]
    if not learning:
        return ""
    first = next(iter(learning.values()))
    steps, what = len(first["losses"]), first["judged"]["name"]
    last = min(10, steps)
    rows = []
    for side, found in learning.items():
        judged, losses = found["judged"], found["losses"]
        interval = f"{judged['value']:.4f} [{judged['low']:.4f}, {judged['high']:.4f}]"
        name = "Baton" if side == "ours" else f"the peer, `{found['variant']}`"
        rows.append((name, f"{losses[0]:.4f}", f"{sum(losses[-last:]) / last:.4f}", interval))
    said = (
        f"What is learned in {steps} steps, in a run of its own whose steps hold the same rows on both sides. The "
        f"held-out {what} on {record['material']['held_out']} rows is computed for both by the same plain code "
        "(`bench/judge.py`)."
    )
    headings = ["", "first loss", f"mean of the last {last} losses", f"held-out {what} [95% interval]"]
    return said + "\n\n" + processes.table(headings, rows)


def _equal(work: Work, record: Mapping[str, Any]) -> str:
    options, material = record["options"], record["material"]
    drawn = (int(options["warmup"]) + int(options["steps"])) * int(options["batch"])
    whole = (
        f"No row is cut; {material['left_out']} longer than {options['length']} tokens, with odd turns, or of which "
        "`apply_chat_template` makes other tokens were left out."
        if "left_out" in material
        else f"Every block has {options['length']} tokens."
    )
    lines = [
        f"The base: `{options['model']}`, {material['parameters'] / 1e6:,.1f} million parameters.",
        f"The rows and their order: {drawn} {work.unit} a run, {options['batch']} a step, {options['steps']} timed "
        f"steps after {options['warmup']} that are dropped.",
        "Every token id and every trained token: compared row by row before the peer trains; a difference ends the "
        f"run. {whole}",
        f"Precision: matrix products in {options['dtype']}; trained weights and the optimizer in float32.",
        f"AdamW with betas 0.9 and 0.95, a constant learning rate of {options['learning_rate']}, no weight decay, "
        f"gradients clipped at norm 1; {options['threads']} threads.",
        "Nothing is evaluated or stored between the steps, and neither side finds tokens of an earlier run.",
    ]
    return "\n".join(["Equal on both sides:", "", *(f"* {line}" for line in lines)])


def _unequal(work: Work, record: Mapping[str, Any]) -> str:
    given = record["options"]["set"]
    set_ = [] if given == "[]" else [f"Settings of Baton's stage that are not its defaults: `{given}`."]
    return "\n".join(["Not equal:", "", *(f"* {line}" for line in [*work.differences, *set_])])
