"""`python -m tests.faults [PART] [options]`: all that can be broken, or one part of it, and docs/reliability.md."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from tests import mutations

from . import children, cost, disks, files, killing, page, power, processes, promises, runs
from .children import Blow
from .conftest import MEMORY
from .material import CASES
from .page import Figure

Part = Callable[[argparse.Namespace, Path], Iterator[Figure]]
SECONDS_BETWEEN_LINES = 10.0
QUICKSTART = Path("runs/quickstart")
OTHERS = 5
"""Of the calls at which a run is killed, how many there are to one at which something else happens."""


WAYS: dict[str, frozenset[int]] = {
    "signal=KILL": frozenset({-9}),
    "signal=TERM": frozenset({143, -15}),
    "signal=INT": frozenset({130}),
    "signal=USR1": frozenset({75, -10}),
    "error=EIO": frozenset({0, 6}),
    "error=ENOSPC": frozenset({0, 6}),
}
"""What happens at a system call, as `strace` says it, and how a process may end then: by the signal itself only before
it holds the lock and after it let go, and in order where what failed does not matter."""


def publish(options: argparse.Namespace, root: Path) -> Iterator[Figure]:
    """Publishing, broken at every system call that changes a file system"""
    for how in ("signal=KILL", "error=EIO", "error=ENOSPC"):
        for case in CASES:
            with _place(root) as place:
                what = f"{how}, {case.name}: absent or complete, and the next process recovers"
                yield _counted(what, killing.blows(case, place, how), WAYS[how])


def run(options: argparse.Namespace, root: Path) -> Iterator[Figure]:
    """A run of five stages with checkpoints, broken at system calls that change a file system"""
    for how, codes in WAYS.items():
        every = options.every * (1 if how == "signal=KILL" else OTHERS)
        named = f"{how} at every {f'{every}th ' if every > 1 else ''}call"
        with _place(root) as place:
            what = f"{named}: all there is is complete, and the run goes on to the same bytes, metrics and logs"
            yield _counted(what, runs.blows(place, how, every), codes)


def clock(options: argparse.Namespace, root: Path) -> Iterator[Figure]:
    """A clock that is set back by a day between a kill and the next run"""
    with _place(root) as place:
        found = [runs.goes_on_from_the_newest(place, name, step) for name in runs.fakes.STAGES for step in (2, 3)]
    yield Figure("goes on from the checkpoint of the highest step", sum(found), len(found))


def cuts(options: argparse.Namespace, root: Path) -> Iterator[Figure]:
    """Power cuts, replayed from the recorded system calls"""
    for case in CASES:
        with _place(root) as place:
            found = list(_told(power.problems(case, place), case.name))
        what = f"{case.name}: states that are absent or complete, durable once it is done, and recovered from"
        yield Figure(what, sum(not problem for problem in found), len(found))
    for case in CASES:
        with _place(root) as place:
            disk, made = power.record(case, place)
            damaged = power.damaged_without(case, place, disk, made, frozenset(power.syncs(made)))
        yield Figure(f"{case.name}, if it did not sync: damage that the replay finds", damaged, 0, "states")


def disk(options: argparse.Namespace, root: Path) -> Iterator[Figure]:
    """Disks that are full, and one that cannot be written"""
    sizes = [*range(4, 96, 4), disks.LARGE]
    with _place(root) as place:
        found = disks.tried(place, sizes)
    good = [each["whole"] and each["after"] == 0 and each["code"] in (0, 6) for each in found["full"]]
    refused = [each for each in found["full"] if each["code"] == 6]
    said = sum("no space left: " in each["said"] for each in refused)
    what = "sizes of a disk: absent or complete, and with more space the next process publishes"
    yield Figure(what, sum(good), len(good))
    yield Figure("of them too small: exit code 6 and the bytes that are free", said, len(refused))
    read_only = found["read_only"]
    named = read_only["code"] == 6 and "Read-only file system" in read_only["said"]
    yield Figure("read-only: exit code 6 and the path, before anything is computed", int(named), 1)


def bits(options: argparse.Namespace, root: Path) -> Iterator[Figure]:
    """Files of published stages that are not what was written"""
    with _place(root) as place:
        runs.write_configuration(place)
        children.run(lambda: runs.run(place), place / "output")
        stages = sorted((place / "run" / "stages").iterdir())
        flips = list(_told(files.flips(stages, options.count or 10_000, options.seed), "flips"))
        faults = list(_told(files.faults(stages, place), "files"))
    yield Figure(f"single flipped bits found before use, the file named (seed {options.seed})", sum(flips), len(flips))
    for harm in files.HARMS:
        found = [refused for name, _, refused in faults if name == harm.__name__]
        yield Figure(f"{harm.__name__.replace('_', ' ')}: refused, the file named", sum(found), len(found))


def busy(options: argparse.Namespace, root: Path) -> Iterator[Figure]:
    """Several processes at one run directory"""
    rounds = []
    for number in range(20):
        with _place(root) as place:
            rounds.append(processes.at_once(place, 8) == {0: 1, 75: 7})
        _say(f"rounds: {number + 1}")
    yield Figure("rounds of 8 processes at once: one runs, seven end with 75", sum(rounds), len(rounds))
    with _place(root) as place:
        stale = list(_told((processes.stale_after_a_kill(place) for _ in range(100)), "locks"))
    what = "holders killed while a child of theirs lives on: the lock is free at once"
    yield Figure(what, len(stale) - sum(stale), len(stale))


@contextlib.contextmanager
def _place(root: Path) -> Iterator[Path]:
    """An empty directory."""
    place = root / "place"
    place.mkdir()
    yield place
    shutil.rmtree(place)


def _counted(what: str, blows: Iterable[Blow], codes: Collection[int]) -> Figure:
    """After how many blows the process ended as it should and what it left was as it should be."""
    found = list(_told(blows, what.partition(":")[0]))
    bad = [blow for blow in found if blow.problem or blow.code not in codes]
    for blow in bad:
        _say(f"{blow.point}, exit code {blow.code}: {blow.problem}")
    return Figure(what, len(found) - len(bad), len(found))


def _told(each: Iterable[Any], what: str) -> Iterator[Any]:
    """The same, saying now and then how many there were."""
    said = time.monotonic()
    for number, one in enumerate(each, 1):
        yield one
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            _say(f"{what}: {number}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def kills(options: argparse.Namespace, root: Path) -> Iterator[Figure]:
    """kill -9 at random times over tokenizer, pretraining with dropout, SFT, reward model, DPO and PPO"""
    from . import kills as killing_at_random

    count = options.count or 200
    with _place(root) as place:
        trials = []
        for trial in killing_at_random.trials(place, count, options.seed):
            trials.append(trial)
            done = sum(len(each.killed_after) for each in trials)
            _say(f"kills: {done} of {count}, runs: {len(trials)}, all alike: {all(t.alike for t in trials)}")
    killed = [trial for trial in trials if trial.killed_after]
    times = sum(len(trial.killed_after) for trial in killed)
    whole = sum(len(trial.killed_after) for trial in killed if trial.whole)
    alike = sum(len(trial.killed_after) for trial in killed if trial.alike)
    yield Figure(f"kills after which all stages and checkpoints were complete (seed {options.seed})", whole, times)
    what = f"kills in runs that came to the uninterrupted run's bytes, metrics and logs (seed {options.seed})"
    yield Figure(what, alike, times)
    yield Figure("such runs, each killed until it got through", sum(trial.alike for trial in killed), len(killed))


def promised(options: argparse.Namespace, root: Path) -> Iterator[Figure]:
    """Promises that tests keep, case by case"""
    for what, good, of in promises.kept():
        yield Figure(what, good, of)


def guards(options: argparse.Namespace, root: Path) -> Iterator[Figure]:
    """What the guards are worth: each taken out of a copy of the source"""
    unnoticed = mutations.unnoticed(mutations.MUTATIONS)
    yield Figure("a test of the fast tier fails", len(mutations.MUTATIONS) - len(unnoticed), len(mutations.MUTATIONS))


def costs(options: argparse.Namespace, root: Path) -> Iterator[Figure]:
    """What it costs"""
    with tempfile.TemporaryDirectory(prefix="faults-") as place:  # on a disk
        measured = cost.measure(Path(place), options.gib << 30)
    seconds = {"publish": measured.publish, "verify": measured.verify, "both": measured.publish + measured.verify}
    for what, taken in seconds.items():
        yield Figure(f"{what}, {options.gib} GiB that were just written", measured.size / taken / 1e9, 0, "GB/s")
    if options.run:
        with tempfile.TemporaryDirectory(prefix="faults-") as place:
            spent, taken = cost.share(options.run, Path(place))
        what = f"publish and verify all stages of a finished run, of the {taken:.0f} s that they took"
        yield Figure(what, 100 * spent / taken, 0, "%")


PARTS: dict[str, Part] = {
    **{"publish": publish, "run": run, "kills": kills, "cuts": cuts, "disk": disk, "bits": bits, "busy": busy},
    **{"clock": clock, "promises": promised, "guards": guards, "cost": costs},
}


def main() -> int:
    """Run one part or all; 1 if something did not hold."""
    options = _options()
    if children.MISSING:
        sys.stderr.write(f"{children.MISSING}: apt-get install strace\n")
        return 2
    held = True
    for name in [options.part] if options.part else PARTS:
        began = time.monotonic()
        figures = []
        root = Path(tempfile.mkdtemp(prefix="faults-", dir=MEMORY if MEMORY.is_dir() else None))
        try:
            for figure in PARTS[name](options, root):
                figures.append(figure)
                _say(f"{name}: {figure.what}: {figure.found}")
        finally:
            shutil.rmtree(root)
        held = held and all(figure.unit or figure.good == figure.of for figure in figures)
        title = (PARTS[name].__doc__ or name).strip()
        page.keep(name, title, _command(name, options), time.monotonic() - began, figures)
    page.write(list(PARTS))
    return 0 if held else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="just this part; all by default")
    parser.add_argument("--count", type=int, help="how many kills (200) or flipped bits (10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' times, or of the bits")
    parser.add_argument("--every", type=int, default=1, help="of the calls at which a run is broken, only every n-th")
    parser.add_argument("--gib", type=int, default=1, help="how much is published for its cost")
    run = QUICKSTART if QUICKSTART.is_dir() else None
    what = "a finished run, for the share of its time that publishing took (default: the quickstart's, if it is there)"
    parser.add_argument("--run", type=Path, default=run, help=what)
    options = parser.parse_args()
    if options.count is not None and options.part not in ("kills", "bits"):
        parser.error("--count is for `kills` or `bits`")
    return options


def _command(part: str, options: argparse.Namespace) -> str:
    """What finds a part's figures again."""
    given = {
        "kills": f" --count {options.count or 200} --seed {options.seed}",
        "bits": f" --count {options.count or 10_000} --seed {options.seed}",
        "run": f" --every {options.every}" if options.every > 1 else "",
        "cost": f" --gib {options.gib}" + (" --run RUN" if options.run else ""),
    }
    return f"python -m tests.faults {part}{given.get(part, '')}"


if __name__ == "__main__":
    sys.exit(main())
