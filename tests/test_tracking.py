"""Trackers are mirrors: every record once, in order, and whatever happens to them, stages go on."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import sys
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fakes
import pytest
from conftest import Baton

from pipeline import loader, report, runner, tracking
from pipeline.contract import Context, Result
from pipeline.tracking import Tracked

Call = tuple[Any, ...]
STEPS = [{"step": step, "total": 5, "seconds": step / 2, "loss": 1 / step, "note": "x"} for step in range(1, 6)]


class Recorder:
    """A tracker in memory, which keeps what it was sent from one attempt to the next."""

    held: list[tuple[int, float]]

    def open(self, tracked: Tracked) -> int:
        return max((step for step, _ in self.held), default=0)

    def log(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        self.held.append((step, figures["loss"]))

    def close(self) -> None:
        pass


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    kind = type("Fresh", (Recorder,), {"held": []})
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", kind)
    monkeypatch.setattr(tracking, "require", lambda names: None)
    return kind


def tracked(root: Path, key: str = "a" * 64) -> Tracked:
    return Tracked("first", root, "sft", "sft", key, {"beta": 0.1})


def send(names: list[str], root: Path, records: list[dict[str, Any]], said: list[str] | None = None) -> None:
    told: list[str] = [] if said is None else said
    with tracking.mirrored(names, tracked(root), told.append) as mirror:
        for record in records:
            mirror(record)


def test_figures_are_the_finite_numbers() -> None:
    record = {"step": 3, "total": 9, "seconds": 1.5, "loss": 2, "kl": "nan", "name": "x", "rate": float("inf")}
    assert tracking.figures(record) == {"seconds": 1.5, "loss": 2.0}


def test_every_record_arrives_once_and_in_order(tmp_path: Path, recorder: type[Recorder]) -> None:
    send(["tensorboard"], tmp_path, STEPS[:3])
    send(["tensorboard"], tmp_path, STEPS)  # an attempt that goes on hands over all records again
    assert recorder.held == [(step["step"], step["loss"]) for step in STEPS]


class Stop(Exception):
    """What ends an attempt."""


def six_steps(context: Context, stop_after: int | None) -> Result:
    """A stage that leaves a checkpoint after each step, and may be stopped between a record and its checkpoint."""
    found = context.checkpoints.resume()
    done = int((found / "step.json").read_text()) if found else 0
    for step in range(done + 1, 7):
        context.progress({"loss": 1 / step}, done=step, total=6)
        if step == stop_after:
            raise Stop
        context.checkpoints.after(step, lambda directory, step=step: (directory / "step.json").write_text(str(step)))
    (context.directory / "weights.bin").write_text("weights")
    return Result(kind="tokenizer")


def test_an_attempt_that_goes_on_logs_no_step_twice(
    config: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = loader.load(config, ["track=[tensorboard]", "checkpoint_minutes=0"])
    for stop_after in (4, None):
        module = types.ModuleType("stages.tokenizer")
        module.run = functools.partial(six_steps, stop_after=stop_after)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "stages.tokenizer", module)
        monkeypatch.setattr(report, "write", fakes.write_report)
        with contextlib.suppress(Stop):
            runner.run(settings, only=["tok"])
        assert [step for step, _ in recorder.held] == list(range(1, (stop_after or 6) + 1))
    path = Path(settings.output) / "stages" / "tok" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("method", ["open", "log", "close"])
def test_a_tracker_that_fails_is_told_once_and_stops_nothing(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def down(*arguments: object) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(recorder, method, down)
    said: list[str] = []
    send(["tensorboard"], tmp_path, STEPS, said)
    what = "failed and gets no more of this stage, which goes on: ConnectionError: no network at all"
    assert said == [f"sft: warning: tensorboard {what}"]


def test_a_tracker_that_hangs_holds_no_record_up(
    tmp_path: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(recorder, "log", lambda *arguments: release.wait())
    monkeypatch.setattr(tracking, "PATIENCE", 0.05)
    said: list[str] = []
    send(["tensorboard"], tmp_path, STEPS, said)
    release.set()
    assert said == ["sft: warning: tensorboard did not take all records within 0 s; they are in metrics.jsonl"]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(baton: Baton, config: Path) -> None:
    done = baton("run", config, "track=[mlflow]")
    assert done.returncode == 2
    assert "track: the package mlflow is not installed" in done.stderr
    assert "fix: pip install mlflow" in done.stderr
    assert not (config.parent / "run").exists()


def test_trackers_change_no_key(config: Path, fake_stages: None, recorder: type[Recorder]) -> None:
    before = runner.run(loader.load(config, []), only=["tok"])
    after = runner.run(loader.load(config, ["track=[tensorboard]"]), only=["tok"])
    assert [outcome.ran for outcome in (*before, *after)] == [True, False]


def test_no_secret_is_handed_to_a_tracker(
    config: Path, fake_stages: None, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tracked] = []
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    monkeypatch.setattr(recorder, "open", lambda self, tracked: seen.append(tracked) or 0)
    runner.run(loader.load(config, ["track=[tensorboard]"]), only=["tok"])
    assert [each.stage for each in seen] == ["tok"]
    files = [path for path in (config.parent / "run").rglob("*") if path.is_file()]
    assert files
    assert not any(b"canary" in path.read_bytes() for path in files)
    assert "canary" not in repr(seen)


def test_tensorboard_s_files_hold_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for count in (3, 5):  # the second attempt goes on
        send(["tensorboard"], tmp_path, STEPS[:count])
    directory = tmp_path / "tensorboard" / f"sft-{'a' * 8}"
    (path,) = directory.iterdir()
    events = [(event.step, value) for event in EventFileLoader(str(path)).Load() for value in event.summary.value]
    losses = [(step, value.tensor.float_val[0]) for step, value in events if value.tag == "loss"]
    assert losses == [(step["step"], pytest.approx(step["loss"])) for step in STEPS]
    assert {value.tag for _, value in events} == {"loss", "seconds"}


def test_weights_and_biases_goes_on_after_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    logged: list[int] = []

    class Run:
        @property
        def step(self) -> int:
            return logged[-1] + 1 if logged else 0

        def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
            assert step is not None
            logged.append(step)
            calls.append(("log", step, data))

        def finish(self, exit_code: int | None = None) -> None:
            calls.append(("finish",))

    def init(
        *, project: str, id: str, name: str, job_type: str, config: dict[str, Any], dir: str, resume: str,
        reinit: str, settings: Any,
    ) -> Run:  # fmt: skip
        calls.append(("init", project, id, name, job_type, config, resume))
        return Run()

    module = types.ModuleType("wandb")
    module.init, module.Settings = init, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    send(["wandb"], tmp_path, STEPS[:2])
    send(["wandb"], tmp_path, STEPS[:3])
    begun = ("init", "first", "a" * 32, "sft-aaaaaaaa", "sft", {"beta": 0.1}, "allow")
    assert [call[:2] for call in calls if call[0] == "log"] == [("log", 1), ("log", 2), ("log", 3)]
    assert calls[0] == begun
    assert calls[1] == ("log", 1, {"seconds": 0.5, "loss": 1.0})
    assert calls.count(begun) == calls.count(("finish",)) == 2


def test_mlflow_goes_on_after_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Metric = collections.namedtuple("Metric", "key value timestamp step")
    runs: dict[str, list[Any]] = {}
    ended: list[str] = []

    class Client:
        def get_experiment_by_name(self, name: str) -> Any:
            return types.SimpleNamespace(experiment_id="7") if runs else None

        def create_experiment(self, name: str) -> str:
            assert name == "first"
            return "7"

        def search_runs(self, experiment_ids: list[str], filter_string: str = "") -> list[Any]:
            assert (experiment_ids, filter_string) == (["7"], f"tags.`baton.key` = '{'a' * 64}'")
            return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=each)) for each in runs]

        def create_run(self, experiment_id: str, tags: dict[str, str], run_name: str) -> Any:
            assert (experiment_id, tags["baton.key"], run_name) == ("7", "a" * 64, "sft-aaaaaaaa")
            runs["one"] = []
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="one"))

        def get_metric_history(self, run_id: str, key: str) -> list[Any]:
            return [metric for metric in runs[run_id] if metric.key == key]

        def log_batch(self, run_id: str, metrics: list[Any]) -> None:
            runs[run_id] += metrics

        def set_terminated(self, run_id: str) -> None:
            ended.append(run_id)

    for name, content in (("mlflow.tracking", {"MlflowClient": Client}), ("mlflow.entities", {"Metric": Metric})):
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    send(["mlflow"], tmp_path, STEPS[:2])
    send(["mlflow"], tmp_path, STEPS)
    assert list(runs) == ["one"]
    losses = [(metric.step, metric.value) for metric in runs["one"] if metric.key == "loss"]
    assert losses == [(step["step"], step["loss"]) for step in STEPS]
    assert ended == ["one", "one"]


def test_trackio_has_one_run_of_a_stage_with_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: dict[str, list[tuple[int, float]]] = {}

    class Known:
        def __init__(self, name: str) -> None:
            self.name = name

        def delete(self) -> bool:
            return stored.pop(self.name, None) is not None

    class Api:
        def runs(self, project: str) -> list[Known]:
            assert project == "first"
            if not stored:
                raise ValueError("Project 'first' does not exist")
            return [Known(name) for name in stored]

    class Run:
        def __init__(self, name: str) -> None:
            self.log = lambda metrics, step=None: stored[name].append((step, metrics["loss"]))
            self.finish = lambda: None

    def init(project: str, name: str, config: dict[str, Any], **options: bool) -> Run:
        assert options == {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        assert name not in stored
        stored[name] = []
        return Run(name)

    module = types.ModuleType("trackio")
    module.Api, module.init = Api, init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    send(["trackio"], tmp_path, STEPS[:3])
    send(["trackio"], tmp_path, STEPS)
    assert stored == {"sft-aaaaaaaa": [(step["step"], step["loss"]) for step in STEPS]}
