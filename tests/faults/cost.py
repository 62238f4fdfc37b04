"""What it costs to publish and to verify."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline import manifest as manifests
from pipeline import store
from pipeline.store import RunDirectory

from . import material

FILE = 1 << 27


@dataclass(frozen=True)
class Cost:
    """Seconds for so many bytes, all of which had been written and none of which was on the disk yet."""

    size: int
    publish: float
    """Syncing, hashing, sealing, reading back and renaming."""
    verify: float


def measure(root: Path, size: int) -> Cost:
    """Publish and verify a stage of random bytes in files of 128 MiB."""
    run = RunDirectory(root / "run")
    with store.lock(run):
        work = store.begin(run, material.STAGE)
        for number in range(size // FILE):
            (work / f"model-{number:05}.safetensors").write_bytes(os.urandom(FILE))
        began = time.perf_counter()
        directory = store.publish(work, run, material.STAGE, material.manifest(work))
        published = time.perf_counter()
        manifests.verify(directory)
        verified = time.perf_counter()
    shutil.rmtree(run.root)
    return Cost(size, published - began, verified - published)


def share(finished: Path, root: Path) -> tuple[float, float]:
    """Seconds to publish and verify again what the stages of a finished run hold, and seconds that the stages took."""
    run = RunDirectory(root / "run")
    taken = spent = 0.0
    with store.lock(run):
        for place in sorted((finished / "stages").iterdir()):
            before = manifests.load(place)
            work = store.begin(run, place.name)
            shutil.copytree(place, work, dirs_exist_ok=True)
            (work / manifests.FILE_NAME).unlink()
            began = time.perf_counter()
            manifests.verify(store.publish(work, run, place.name, material.manifest(work)))
            spent += time.perf_counter() - began
            taken += before.cost.seconds
    return spent, taken
