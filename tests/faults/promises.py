"""Promises that ordinary tests keep, case by case: how many cases there are, and of how many they hold."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[2]
PROMISES: dict[str, tuple[str, ...]] = {
    "stages that are stopped again and again (TRL's at some steps, others at each), dropout on: weights, optimizers, "
    "metrics and logs byte for byte those of one that is not": (
        "test_resumption.py::test_a_stage_that_is_stopped_again_and_again_ends_as_one_that_is_not",
    ),
    "hand-over faults with hashes made anew: refused": (
        "test_handover.py::test_a_fault_with_hashes_made_anew_is_refused",
    ),
    "hand-over faults with hashes and records made anew: refused": (
        "test_handover.py::test_a_fault_with_hashes_and_records_made_anew_is_refused",
    ),
    "hand-over faults in models that no stage made: refused": (
        "test_handover.py::test_a_fault_in_a_model_that_no_stage_made_is_refused",
    ),
    "bases, references, adapters and reward models that do not belong together: refused": (
        "test_handover.py::test_stages_whose_directories_changed_places_are_refused",
        "test_handover.py::test_a_manifest_that_was_edited_is_refused",
        "test_handover.py::test_a_base_that_was_made_again_otherwise_is_refused",
        "test_handover.py::test_an_adapter_on_another_base_is_refused",
        "test_handover.py::test_a_reference_that_is_not_the_parent_is_refused",
        "test_handover.py::test_an_adapter_applied_twice_is_refused",
        "test_handover.py::test_a_reward_model_on_another_base_than_the_policys_is_refused",
        "test_handover.py::test_kept_log_probabilities_of_another_reference_are_refused",
    ),
    "NaN in the loss and infinity in the gradient at every step of pretraining, SFT, reward model, DPO, PPO and online "
    "DPO: stopped before it, the rows named, and gone on from the last good step": (
        "test_numerics.py::test_at_every_step_the_stage_stops_before_it_and_goes_on_from_the_last_good_one",
        "test_numerics.py::test_weights_that_a_step_makes_infinite_stop_the_stage_and_are_in_no_checkpoint",
    ),
    "hostile models, adapters, stages and paths: refused or read as data, no canary executed": (
        "test_foreign_models.py",
        "test_hostile_paths.py",
    ),
    "texts meant as control tokens, in every role and on every way: text": ("test_injection.py",),
    "places where a secret could come to stand: none found in any byte": ("test_secrets.py",),
}
"""What is promised -> pytest's addresses below `tests/`."""


def kept() -> Iterator[tuple[str, int, int]]:
    """Each promise, in how many cases it held, and how many were tried."""
    for what, tests in PROMISES.items():
        results = _results(tests)
        yield what, results.count(True), len(results)


def _results(tests: tuple[str, ...]) -> list[bool]:
    """Whether each case passed; one that is skipped here is not counted."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={file.name}"]
        done = subprocess.run(
            [*command, *(f"tests/{test}" for test in tests)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout}{done.stderr}")
        cases = ElementTree.parse(file.name).iter("testcase")
        outcomes = [{child.tag for child in case} for case in cases]
    return [not outcome & {"failure", "error"} for outcome in outcomes if "skipped" not in outcome]
