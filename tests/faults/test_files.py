"""What is not what was written is refused before its use, with the file named."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline import manifest as manifests
from pipeline.store import RunDirectory

from . import children, files, runs


@pytest.fixture
def finished(root: Path) -> Iterator[Path]:
    runs.write_configuration(root)
    assert children.run(partial(runs.run, root), root / "output") == 0
    return root


def stages(finished: Path) -> list[Path]:
    return sorted(RunDirectory(finished / "run").stages.iterdir())


def test_flipped_bits_are_found_before_use(finished: Path) -> None:
    assert all(files.flips(stages(finished), 1000, seed=0))


def test_what_happens_to_a_file_is_refused_by_its_name(finished: Path) -> None:
    found = list(files.faults(stages(finished)[:1], finished))
    assert len(found) == len(files.HARMS) * 4
    assert [each for each in found if not each[2]] == []


@pytest.mark.parametrize("harm", files.HARMS, ids=lambda harm: harm.__name__)
def test_a_harmed_stage_is_set_aside_and_comes_out_as_it_was(finished: Path, harm: files.Harm) -> None:
    expected = runs.results(finished)
    directory = RunDirectory(finished / "run")
    stage = directory.stage("sft")
    harm(stage / "nested" / "model.safetensors", stage / "config.json")
    assert children.run(partial(runs.run, finished), finished / "output") == 0
    assert runs.results(finished) == expected
    (aside,) = directory.quarantine.iterdir()
    assert aside.name == f"sft-{manifests.sha256(aside)[:8]}"
