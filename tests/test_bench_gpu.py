"""All measurements of a GPU in a limited time: what fits is run, what fails is recorded, and all of it is saved."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, ppo, processes
from bench.gpu import Measurement, Outcome

COMPARED = ["sft", "dpo", "reward", "ppo", "ppo-large", "ppo-large-4bit", "rloo"]


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def taken(measurements: Sequence[Measurement], seconds: float, durations: dict[str, float]) -> tuple[Any, Any, Any]:
    """Outcomes, limits and saved lists of runs that last so long; one without a duration fails at once."""
    clock, limits, saved = Clock(), {}, []

    def run(measurement: Measurement, limit: float) -> Outcome:
        limits[measurement.name] = limit
        if measurement.name not in durations:
            return Outcome(measurement.name, "failed", "RuntimeError: no", "python", 0.0)
        clock.now += durations[measurement.name]
        return Outcome(measurement.name, "measured", "fast", "python", durations[measurement.name])

    def save(outcomes: Sequence[Outcome]) -> None:
        saved.append([(each.name, each.state) for each in outcomes])

    return gpu.take(measurements, seconds, run, save, clock), limits, saved


def test_what_no_longer_fits_is_skipped_and_smaller_ones_still_run() -> None:
    measurements = [Measurement(name, "dpo", gpu.ALONE, budget) for name, budget in (("a", 60), ("b", 50), ("c", 10))]

    outcomes, limits, saved = taken(measurements, 100, {"a": 70, "c": 5})

    assert [(each.name, each.state) for each in outcomes] == [("a", "measured"), ("b", "skipped"), ("c", "measured")]
    assert outcomes[1].text == "takes about 50 s, 30 s left"
    assert limits == {"a": 100, "c": 20}  # twice the budget, and never more than the time left
    assert saved[0] == [("a", "measured"), ("b", "not begun"), ("c", "not begun")]
    assert len(saved) == 3


def test_a_comparison_that_fails_is_recorded_and_run_without_the_peer_at_the_end() -> None:
    measurements = [Measurement("ppo", "ppo", (), 40), Measurement("large", "ppo", gpu.ALONE, 30)]

    outcomes, _, _ = taken(measurements, 100, {"large": 30, "ppo-alone": 20})

    assert [(each.name, each.state) for each in outcomes] == [
        ("ppo", "failed"),
        ("large", "measured"),
        ("ppo-alone", "measured"),
    ]
    assert outcomes[0].text == "RuntimeError: no"
    assert outcomes[2].text == "fast (without the peer: the comparison failed)"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_is_one_that_its_benchmark_takes(device: str) -> None:
    for old_trl in (True, False):
        measurements = gpu.plan(device, "llama-0.5b", "llama-8b", old_trl=old_trl)
        names = [each.name for each in measurements]
        assert names == (COMPARED if old_trl else [name if name != "ppo" else "ppo-alone" for name in COMPARED])
        for each in measurements:
            if each.bench == "ppo":
                options = ppo._parser().parse_args(each.arguments)
                ppo._require_groups(options)
                assert options.quantization == "none" or options.only == "ours"
                assert options.variant in ("", *ppo.VARIANTS[options.method])
            else:
                work = import_module(f"bench.{each.bench}").WORK
                options = import_module("bench.comparison")._parser(work, None).parse_args(each.arguments)
                assert options.variant in work.variants
            assert options.device == device
    assert sum(each.budget for each in gpu.plan("cuda", "a", "b", old_trl=True)) - 85 <= 8 * 60  # all but the last


def processes_that_run(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Have benchmarks be this program, whose last argument is the folder of results."""
    real = gpu.subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return real([sys.executable, "-S", "-c", program, command[-1]], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", start)


FAILS = """import sys
sys.stderr.write('''Traceback (most recent call last):
  File "a", line 1
torch.OutOfMemoryError: CUDA out of memory
Traceback (most recent call last):
subprocess.CalledProcessError: Command
''')
sys.exit(1)
"""
REPORTS = """import json, pathlib, sys
run = {"seconds": 2.5, "device_mib": 1234.4}
record = {"kind": "ppo", "sides": ["ours"], "runs": {"1": {"ours": [run]}}}
pathlib.Path(sys.argv[1], "ppo.json").write_text(json.dumps(record))
"""


@pytest.mark.parametrize(
    ("program", "limit", "state", "text"),
    [
        (REPORTS, 60, "measured", "2.50 s per iteration, 1,234 MiB on the device"),
        (FAILS, 60, "failed", "torch.OutOfMemoryError: CUDA out of memory"),
        ("import sys; sys.exit('the peer did not run: no')", 60, "failed", "the peer did not run: no"),
        ("import time; time.sleep(60)", 0.2, "failed", "stopped after 0 s"),
    ],
)
def test_a_process_is_measured_or_its_error_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, limit: float, state: str, text: str
) -> None:
    processes_that_run(monkeypatch, program)
    outcome = gpu.run_process(Measurement("x", "ppo", gpu.ALONE, 1), limit, ["--cache", "/somewhere/bases"], tmp_path)
    assert (outcome.state, outcome.text) == (state, text)
    assert outcome.command == "python -m bench.ppo --only ours --cache bases"


def test_a_run_writes_its_list_and_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    processes_that_run(monkeypatch, REPORTS)
    monkeypatch.setattr(ppo, "install", lambda kept: kept)
    data = tmp_path / "pairs.jsonl"
    data.write_text("")
    options = ["--device", "cpu", "--measure", "ppo-large", "ppo-large-4bit", "--minutes", "1", "--threads", "1"]

    gpu.main([*options, "--data", str(data), "--out", str(tmp_path / "results")])

    listed = json.loads((tmp_path / "results" / "gpu.json").read_text())["measurements"]
    assert [(each["name"], each["state"]) for each in listed] == [
        ("ppo-large", "measured"),
        ("ppo-large-4bit", "measured"),
    ]
    text = (tmp_path / "results" / "gpu.md").read_text()
    assert capsys.readouterr().out == text
    assert "| ppo-large | measured | 2.50 s per iteration, 1,234 MiB on the device |" in text
    assert "--quantization 4bit" in text
    assert str(tmp_path) not in text


def test_without_the_old_release_ppo_is_measured_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(kept: Path) -> Path:
        raise SystemExit("pip could not fetch")

    monkeypatch.setattr(ppo, "install", fails)
    assert not gpu._has_old_trl(tmp_path)
    alone = next(each for each in gpu.plan("cuda", "a", "b", old_trl=False) if each.name == "ppo-alone")
    assert alone.arguments[-2:] == gpu.ALONE
    slow = gpu.plan("cuda", "a", "b", old_trl=False, pace=3.0)
    assert next(each.budget for each in slow if each.name == "ppo-alone") == 3 * alone.budget
    assert alone.note == "without the peer: TRL 1.12.0 is not in the cache and could not be fetched"


def test_ratios_are_those_of_the_measurement_s_own_page() -> None:
    runs = {
        "ours": [{"tokens_per_second": 300.0, "device_mib": 500.0}],
        "peer": [{"tokens_per_second": 100.0, "device_mib": 1000.0}],
    }
    assert gpu.headline({"kind": "dpo", "runs": runs}) == (
        "3.00 [3.00, 3.00] times the speed, 0.50 [0.50, 0.50] times the device's peak memory"
    )
    del runs["peer"]
    assert gpu.headline({"kind": "dpo", "runs": runs}) == "300 tokens per second, 500 MiB on the device"
    assert processes.RESULTS.name == "results"
