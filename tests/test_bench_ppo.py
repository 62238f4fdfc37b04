"""The PPO comparison: both sides are given the same prompts and rewards, and nothing is counted twice."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benches
import pytest
import torch
from torch import nn

from bench import ppo, ppo_material, processes, rloo_peer
from bench.job import Job
from bench.ppo_given import Drawn, classifier, micro_batch
from bench.ppo_peer import Follower
from bench.processes import Measured
from bench.watch import Phases, Watch, live_parameters
from data.tree import Branch, Tree
from pipeline.config import PpoSettings
from reward.shaping import explained_variance
from stages.core.device import Compute
from stages.core.rl import sampling
from stages.core.rl.experience import Collector
from stages.core.rl.sampling import Sampler
from stages.core.roles import REWARD, open_base
from stages.core.scoring import scores
from stages.core.trl.arguments import expected_warnings

NEW_TOKENS, PROMPT = 4, 40


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A tiny training with its material."""
    folder = tmp_path_factory.mktemp("ppo")
    benches.write_folder(folder)
    made = Job(
        kind="ppo",
        material=str(folder / "material"),
        data=str(folder / "pairs.jsonl"),
        steps=2,
        examples_per_step=4,
        max_length=PROMPT + NEW_TOKENS,
        learning_rate=0.01,
        device="cpu",
        dtype="float32",
        settings={"max_new_tokens": NEW_TOKENS, "tokens_per_batch": 2 * (PROMPT + NEW_TOKENS)},
    )
    ppo_material.make(made, folder / "shape.yaml", folder / "base", for_peer=True)
    return made


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks start no processes of their own; what they change in the stage is undone."""

    def run(module: str, *arguments: str | Path, **_: str) -> Measured:
        with monkeypatch.context() as patch, redirect_stdout(StringIO()) as said:
            patch.setattr(sys, "argv", [module, *map(str, arguments)])
            for owner, name in ((sampling, "sample"), (Sampler, "rollout"), (Collector, "collect")):
                patch.setattr(owner, name, getattr(owner, name))
            import_module(module).main()
        return Measured(0.0, 0.0, 0.0, json.loads(said.getvalue().splitlines()[-1]))

    monkeypatch.setattr(processes, "run", run)


@pytest.mark.usefixtures("in_this_process")
def test_the_stage_samples_what_was_drawn_at_full_length(tmp_path: Path) -> None:
    benches.write_folder(tmp_path)
    options = ["--repeats", "1", "--steps", "2", "--responses", "4", "--new-tokens", "4", "--prompt", "40"]
    options += ["--only", "ours", "--dtype", "float32", "--threads", "1", "--epochs", "2"]
    files = ["--model", tmp_path / "shape.yaml", "--data", tmp_path / "pairs.jsonl", "--output", tmp_path]

    ppo.main([*options, *map(str, files)])

    record = json.loads((tmp_path / "ppo-float32-shape.json").read_text())
    (found,) = record["runs"]["2"]["ours"]
    assert [set(step) for step in found["timed"]] == [{"rollout", "scoring", "training"}] * 2
    assert sum(sum(step.values()) for step in found["timed"]) == pytest.approx(2 * found["seconds"], rel=0.05)
    assert found["base_bytes"] == 4 * record["material"]["parameters"] < found["parameter_bytes"]
    assert {*found["last"]} == {"reward", "kl", "explained_variance"}
    assert "all roles share one copy" in (tmp_path / "ppo-float32-shape.md").read_text()


def test_the_peer_s_reward_is_the_stage_s(job: Job) -> None:
    artifact = ppo_material.reward_artifact(job)
    roles = open_base(artifact, Compute(torch.device("cpu"), torch.float32))
    roles.load(REWARD, artifact.directory)
    prompts = Drawn(job).prompts[:4]
    trees = [Tree(tuple(prompt), (Branch.of((7, 8, 9)),), number) for number, prompt in enumerate(prompts)]

    ours = [score for (score,) in scores(roles, REWARD, trees).values()]
    model = classifier(job, torch.float32).eval()
    with torch.no_grad():
        tokens = [torch.tensor([[*prompt, 7, 8, 9]]) for prompt in prompts]
        peer = [float(model.score(model.base_model(each).last_hidden_state[:, -1])) for each in tokens]

    assert len(set(ours)) == 4
    assert peer == pytest.approx(ours, abs=1e-5)


def test_leave_one_out_takes_the_prompts_in_order(job: Job) -> None:
    settings = {**job.settings, "advantage": "rloo", "samples_per_prompt": 2, "update_epochs": 2}
    grouped = Job(**{**vars(job), "settings": settings, "variant": "float32"})
    watch = Watch(grouped)

    with expected_warnings():
        found = rloo_peer.train(grouped, watch)

    assert len(found["phases"]) == grouped.steps  # one more rollout would have found no prompts left
    assert all(set(step) == {"rollout", "scoring", "training"} for step in found["phases"])
    assert set(found["last"]) == {"reward", "kl"}


def test_other_prompts_than_drawn_end_the_run(job: Job) -> None:
    drawn = Drawn(job)
    prompts = drawn.prompts
    drawn.require_next([prompt for prompt in prompts[:4] for _ in range(3)])
    with pytest.raises(ValueError, match="step 2: 4 prompts for 4, 2 of them differ"):
        drawn.require_next([*prompts[4:6], *reversed(prompts[6:8])])


def test_the_peer_s_phases_and_values_are_read_off_its_functions(job: Job) -> None:
    values, advantages = torch.rand(4, NEW_TOKENS), torch.rand(4, NEW_TOKENS)
    mask = torch.ones(4, NEW_TOKENS, dtype=torch.bool)
    value_model = object()
    prompts = Drawn(job).prompts[:4]
    width = max(map(len, prompts))
    queries = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    whole = torch.cat([torch.zeros(4, width - 1), values, torch.zeros(4, 1)], dim=1)[..., None]
    functions = SimpleNamespace(
        batch_generation=lambda model, queries, *rest: (torch.zeros(4, width + rest[0]), None),
        get_reward=lambda model, sequences, pad, context: (whole,) if model is value_model else (whole + 1,),
        masked_whiten=lambda advantages, mask, **options: advantages * 2,
    )
    follower = Follower(job, Watch(job))
    follower.follow(functions, value_model, NEW_TOKENS, pad_id=0)

    functions.batch_generation(None, queries, NEW_TOKENS)
    for model in (value_model, object()):
        functions.get_reward(model, None, 0, width)
    assert torch.equal(functions.masked_whiten(advantages, mask), advantages * 2)
    follower.on_log(logs={"objective/scores": 1.0, "objective/kl": 2.0})
    follower.on_step_end()

    assert [set(step) for step in follower.phases.steps] == [{"rollout", "scoring", "training"}]
    expected = explained_variance(values, advantages + values, mask)
    assert follower.last == {"reward": 1.0, "kl": 2.0, "explained_variance": pytest.approx(expected)}
    with pytest.raises(ValueError, match="ended before its full length"):
        functions.batch_generation(None, torch.tensor(Drawn(job).prompts[4:8]), NEW_TOKENS - 1)


@pytest.mark.parametrize(("tokens", "responses", "expected"), [(1536, 32, 8), (1919, 32, 8), (100, 6, 1), (999, 6, 3)])
def test_a_micro_batch_fits_and_divides(tokens: int, responses: int, expected: int) -> None:
    chosen = PpoSettings(policy="p", reward="r", data="d", max_length=192, tokens_per_batch=tokens)
    assert micro_batch(chosen, responses) == expected


def test_the_warm_up_does_not_count() -> None:
    phases = [{"rollout": 9.0}, {"rollout": 1.0}, {"rollout": 2.0}]
    found = ppo.rates([10.0, 12.0, 16.0], phases, warmup=1, tokens=60)
    assert found == {"seconds": 3.0, "tokens_per_second": 20.0, "timed": phases[1:]}
    with pytest.raises(ValueError, match="1 iterations, of which 1 do not count"):
        ppo.rates([10.0], phases[:1], warmup=1, tokens=60)


def test_a_phase_lasts_from_the_one_before_to_its_own_end(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr("bench.watch.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    phases = Phases(job)
    assert phases.marking("rollout", lambda value: value + 1)(2) == 3
    phases.mark("scoring")
    phases.mark("scoring")
    phases.end("training")
    assert phases.steps == [{"rollout": 1.0, "scoring": 5.0, "training": 4.0}]


def test_weights_that_are_shared_are_held_once() -> None:
    before = live_parameters()
    first = nn.Linear(3, 5, bias=False)
    second = nn.Linear(3, 5, bias=False)
    second.weight = first.weight
    third = nn.Linear(3, 5, bias=False).requires_grad_(False)
    alias = nn.Parameter(third.weight.detach(), requires_grad=False)
    after = live_parameters()
    assert {name: after[name] - before[name] for name in after} == {
        "parameters": 30,
        "trained": 15,
        "parameter_bytes": 120,
    }
    del first, second, third, alias


def test_the_old_release_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> None:
        asked.append(command)
        Path(command[command.index("--target") + 1]).mkdir()

    monkeypatch.setattr(subprocess, "run", pip)
    assert ppo.install(tmp_path) == ppo.install(tmp_path) == tmp_path / "trl-1.12.0"
    assert (tmp_path / "trl-1.12.0").is_dir()
    assert [command[-1] for command in asked] == ["trl==1.12.0"]


def test_without_the_network_it_is_said_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(SystemExit, match="pip could not fetch trl"):
        ppo.install(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_fastest_way_that_trains_an_adapter_is_taken() -> None:
    ways = {"lora-bfloat16": {"failed": "no"}, "lora-float32": {"seconds": 3.0}, "full-float32": {"seconds": 1.0}}
    assert ppo._fastest(ways) == "lora-float32"
    with pytest.raises(SystemExit, match="the peer did not run"):
        ppo._fastest({"lora-bfloat16": {"failed": "no"}, "full-float32": {"seconds": 1.0}})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps=99", "the comparison gives it"),
        ("optimizer.learning_rate=0.5", "the comparison gives it"),
        ("update_epochs=2", "the comparison gives it"),
        ("lora=null", "set one of its parts"),
        ("gold=a/b", "a name has no `/`"),
    ],
)
def test_a_setting_that_would_not_be_what_is_measured_is_refused(tmp_path: Path, setting: str, message: str) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("")
    with pytest.raises(SystemExit, match=message):
        ppo.main(["--data", str(data), "--set", setting, "--output", str(tmp_path)])
