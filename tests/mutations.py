"""What the guards are worth: each is taken out of a copy of the source, and some test has to fail.

    python -m tests.mutations [NAME ...]

A mutation replaces one piece of source text, which must stand in its file once. First all tests named here are run on
the unchanged copy, where they must pass. The table says which test noticed; the exit code is 1 if one was not missed.
The test that is named must be in the fast tier (tests/tiers.py), so that `make test` protects every guard.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "shared", "runs", "bench", "__pycache__", ".*_cache")
FINISHED = "FINISHED_CHAIN"
"""The variable by which tests/conftest.py finds a finished chain."""
PASSED, FAILED = 0, 1
"""Exit codes of pytest; others mean that no test ran."""


@dataclass(frozen=True)
class Mutation:
    """A guard, and what would be there without it.

    Attributes:
        name: What is no longer noticed.
        file: Where the guard is.
        text: The guard.
        without: What stands in its place.
        test: A test that must fail, by pytest's address below `tests/`.
    """

    name: str
    file: str
    text: str
    without: str
    test: str


LIMIT = "DIFFERENCE[torch.float32]"
GAP = f"difference <= most and exact <= {LIMIT} and reaches"
HANDOVER = "test_handover.py::"
RESEALED = f"{HANDOVER}test_a_fault_with_hashes_made_anew_is_refused"
ANEW = f"{HANDOVER}test_a_fault_with_hashes_and_records_made_anew_is_refused"
FOREIGN = f"{HANDOVER}test_a_fault_in_a_model_that_no_stage_made_is_refused"
AT_EVERY_STEP = "test_numerics.py::test_at_every_step_the_stage_stops_before_it_and_goes_on_from_the_last_good_one"

IN_MANIFESTS = (
    Mutation(
        "a file's bytes",
        "pipeline/manifest.py",
        "return None if digest == output.sha256 else",
        "return None if True else",
        "test_store.py::test_every_damage_is_named_with_both_values",
    ),
    Mutation(
        "a file that is not listed",
        "pipeline/manifest.py",
        'yield Damage(name, "not in the manifest", "no such file")',
        "pass",
        "test_store.py::test_every_damage_is_named_with_both_values",
    ),
    Mutation(
        "an edited manifest",
        "pipeline/manifest.py",
        "if not seal.is_intact(read_record(directory / FILE_NAME)):",
        "if False:",
        f"{HANDOVER}test_a_manifest_that_was_edited_is_refused",
    ),
    Mutation(
        "a digest that is not the files'",
        "pipeline/manifest.py",
        "if content_digest(manifest.outputs) != manifest.digest:",
        "if False:",
        "test_store.py::test_every_damage_is_named_with_both_values",
    ),
    Mutation(
        "a base that was made again",
        "pipeline/inputs.py",
        "if base.digest != adaptation.base:",
        "if False:",
        "test_inputs.py::test_another_base_than_it_was_trained_on_is_refused_with_both_digests",
    ),
    Mutation(
        "stages that changed places",
        "pipeline/inputs.py",
        "_require_name(found, reference)",
        "pass",
        f"{HANDOVER}test_stages_whose_directories_changed_places_are_refused",
    ),
    Mutation(
        "what a manifest says of a model",
        "pipeline/handover.py",
        "in _differences(manifest.model, describe(directory)):",
        "in ():",
        f"{RESEALED}[fewer positions]",
    ),
    Mutation(
        "a reference that is not the parent",
        "pipeline/handover.py",
        "    _require_ancestry(directory, manifest)\n",
        "",
        f"{HANDOVER}test_a_reference_that_is_not_the_parent_is_refused",
    ),
    Mutation(
        "a base that is not the policy",
        "pipeline/handover.py",
        'named["base"] = adaptation.base',
        "pass",
        f"{HANDOVER}test_a_base_that_a_manifest_names_otherwise_than_its_policy_is_refused",
    ),
    Mutation(
        "an adapter beside a stage's weights",
        "pipeline/model_files.py",
        "        refuse_adapter_beside_weights(directory)\n    for",
        "        pass\n    for",
        f"{RESEALED}[an adapter beside merged weights]",
    ),
    Mutation(
        "an adapter beside foreign weights",
        "pipeline/model_files.py",
        "            refuse_adapter_beside_weights(directory)\n        hint",
        "            pass\n        hint",
        f"{FOREIGN}[an adapter beside merged weights-directory]",
    ),
    Mutation(
        "a role's kind",
        "pipeline/inputs.py",
        "if artifact.kind not in accepts:",
        "if False:",
        "test_inputs.py::test_a_role_refuses_another_kind",
    ),
    Mutation(
        "a cached blob of a hub model",
        "pipeline/inputs.py",
        "    if found != expected:",
        "    if False:",
        "test_inputs.py::test_a_damaged_blob_of_the_cache_is_named",
    ),
)

IN_MODELS = (
    Mutation(
        "tensors that do not fit",
        "stages/core/models.py",
        "handover.require_complete(report, artifact.directory)",
        "pass",
        "test_models.py::test_weights_that_do_not_fit_the_configuration_are_refused",
    ),
    Mutation(
        "weights that are not finite",
        "stages/core/models.py",
        "guards.require_finite_weights(model.named_parameters(), artifact.directory)",
        "pass",
        f"{FOREIGN}[an infinite weight-directory]",
    ),
    Mutation(
        "a vocabulary that is too small",
        "stages/core/models.py",
        "handover.require_vocabulary(model, tokenizer, artifact.directory)",
        "pass",
        "test_models.py::test_fewer_embedding_rows_than_tokens_are_refused",
    ),
    Mutation(
        "special tokens of two minds",
        "stages/core/models.py",
        "handover.require_special_ids(artifact.directory, tokenizer)",
        "pass",
        f"{FOREIGN}[another end-directory]",
    ),
    Mutation(
        "a generation configuration of its own",
        "stages/core/handover.py",
        '"generation_config.json": ("eos",)}',
        "}",
        f"{FOREIGN}[another end in generation-directory]",
    ),
    Mutation(
        "logits that are not the head's",
        "stages/core/models.py",
        "    require_plain_head(model)\n    return",
        "    return",
        "test_models.py::test_a_stored_model_whose_logits_are_changed_after_the_head_is_refused",
    ),
    Mutation(
        "a stage's other tokenizer",
        "stages/core/handover.py",
        "if recorded.get(name) != value:",
        "if False:",
        f"{RESEALED}[another tokenizer]",
    ),
    Mutation(
        "an adapter's other tokenizer",
        "stages/core/handover.py",
        "_require_tokens(artifact, tokenizer, artifact.base)",
        "pass",
        f"{ANEW}[an adapter's other tokenizer]",
    ),
    Mutation(
        "a reward model's other template",
        "stages/core/rl/opening.py",
        "handover.require_same_tokens(reward, roles.base.tokenizer)",
        "pass",
        "test_ppo.py::test_a_reward_model_of_another_template_is_refused",
    ),
    Mutation(
        "a reward model's other base",
        "stages/core/rl/opening.py",
        "_require_same_base(policy, reward)\n    roles",
        "pass\n    roles",
        f"{HANDOVER}test_a_reward_model_on_another_base_than_the_policys_is_refused",
    ),
    Mutation(
        "a missing head",
        "stages/core/roles.py",
        "if role == REWARD or (directory / HEAD_FILE).is_file():",
        "if (directory / HEAD_FILE).is_file():",
        f"{ANEW}[a head missing]",
    ),
    Mutation(
        "a head's missing tensor",
        "reward/head.py",
        "if found != expected:",
        "if False:",
        "test_head.py",
    ),
    Mutation(
        "an infinite head",
        "stages/core/roles.py",
        "guards.require_finite_weights(head.state_dict().items(), directory / HEAD_FILE)",
        "pass",
        f"{ANEW}[an infinite head]",
    ),
    Mutation(
        "an adapter that is not finite",
        "stages/core/roles.py",
        "guards.require_finite_weights(tensors.items(), directory / ADAPTER_FILE)",
        "pass",
        f"{ANEW}[an adapter that is no number]",
    ),
    Mutation(
        "an adapter that does not fit",
        "stages/core/roles.py",
        "if found != expected:",
        "if False:",
        "test_roles.py::test_an_adapter_that_does_not_fit_is_refused",
    ),
    Mutation(
        "another model by its probes",
        "stages/core/probes.py",
        "if not abs(old - new) <= tolerance:",
        "if False:",
        "test_probes.py",
    ),
    Mutation(
        "outputs that are no numbers",
        "stages/core/probes.py",
        "if not abs(old - new) <= tolerance:",
        "if abs(old - new) > tolerance:",
        "test_probes.py::test_a_model_that_yields_nan_is_noticed",
    ),
    Mutation(
        "a stage without probes",
        "stages/core/probes.py",
        "if not path.is_file() and not (directory / MANIFEST).is_file():",
        "if not path.is_file():",
        f"{RESEALED}[probes gone]",
    ),
    Mutation(
        "probes of nothing",
        "stages/core/probes.py",
        "    if not complete:",
        "    if False:",
        f"{RESEALED}[no probes in the file]",
    ),
    Mutation(
        "a difference that shows in float32 alone",
        "stages/core/probes.py",
        "    require_same(exact[_name(weights)],",
        "    (exact[_name(weights)],",
        "test_probes.py",
    ),
    Mutation(
        "an export that loses what the adapter changes",
        "stages/core/export.py",
        "if rounded.lost <= LOST:",
        "if True:",
        "test_export_precision.py",
    ),
    Mutation(
        "a policy that does not begin as its reference",
        "stages/dpo.py",
        "require_beginning(roles, begun, first, settings.batch_tokens, layout)",
        "pass",
        f"{HANDOVER}test_kept_log_probabilities_of_another_reference_are_refused",
    ),
    Mutation(
        "a layout that computes something else",
        "stages/core/layout.py",
        "if gap > TOLERANCE:",
        "if False:",
        "test_layout.py",
    ),
    Mutation(
        "a layout that is wrong in low precision alone",
        "stages/core/layout.py",
        "if distance > rounding:",
        "if False:",
        "test_layout.py",
    ),
    Mutation(
        "a GGUF file without a tokenizer",
        "data/gguf.py",
        "if TOKENS not in header.fields:",
        "if False:",
        "test_gguf.py::test_a_file_without_a_tokenizer_is_refused_when_the_run_is_planned",
    ),
    Mutation(
        "a merge that went wrong",
        "stages/sft.py",
        "probes.require_same(trained.exact, _in_float32(saved, chosen), probes.SAME, context.directory)",
        "pass",
        "test_sft.py::test_a_merge_that_went_wrong_is_not_published",
    ),
)

IN_TRAINING = (
    Mutation(
        "a loss that is not finite",
        "stages/core/loop.py",
        "guards.require_finite_loss(part.loss.detach(), self.taken + 1, origins)",
        "pass",
        "test_guards.py",
    ),
    Mutation(
        "a gradient that is not finite",
        "stages/core/loop.py",
        "guards.require_finite_gradient(norm, self.taken + 1, origins)",
        "pass",
        "test_guards.py",
    ),
    Mutation(
        "a step that makes weights infinite",
        "stages/core/loop.py",
        "guards.require_finite_step(self._named, self.taken, origins)",
        "pass",
        "test_numerics.py::test_weights_that_a_step_makes_infinite_stop_the_stage_and_are_in_no_checkpoint[4-sft]",
    ),
    Mutation(
        "a checkpoint that is not finite",
        "stages/core/checkpoint.py",
        "guards.require_finite_state(state.tensors.items())",
        "pass",
        "test_training_state.py::test_a_state_that_is_not_finite_is_not_written",
    ),
    Mutation(
        "a model that is not finite",
        "stages/core/models.py",
        "guards.require_finite_weights(self.model.named_parameters())",
        "pass",
        "test_models.py::test_weights_that_are_not_finite_are_not_stored",
    ),
    Mutation(
        "a trained adapter that is not finite",
        "stages/core/roles.py",
        "guards.require_finite_weights(self.parameters(role))",
        "pass",
        "test_roles.py::test_weights_that_are_not_finite_are_not_stored",
    ),
    Mutation(
        "a metric that is not finite",
        "pipeline/runner.py",
        "_refuse_not_finite(name, result)",
        "pass",
        "test_runner.py::test_a_metric_that_is_not_finite_is_refused",
    ),
    Mutation(
        "a gradient of TRL's that is not finite",
        "stages/core/trl/following.py",
        "guards.require_finite_gradient(norm, self.taken + 1, self._rows(self.taken))",
        "pass",
        "test_trl.py::test_a_loss_that_is_not_finite_stops_the_stage",
    ),
    Mutation(
        "a step in which nothing is trained",
        "stages/core/scoring.py",
        "guards.require_trained_tokens(reads, (tree.origin for tree in examples))",
        "pass",
        "test_numerics.py::test_a_step_in_which_nothing_is_predicted_is_refused_with_its_rows",
    ),
    Mutation(
        "a sequence beyond the positions",
        "stages/core/scoring.py",
        "guards.require_positions(batch.trees, language_model.positions)",
        "pass",
        "test_scoring.py::test_a_sequence_beyond_the_models_positions_is_refused_with_its_row",
    ),
    Mutation(
        "blocks beyond the positions",
        "stages/pretrain.py",
        "if positions < max_length:",
        "if False:",
        f"{HANDOVER}test_blocks_longer_than_the_models_positions_are_refused",
    ),
    Mutation(
        "half precision",
        "pipeline/config.py",
        'Precision = Literal["auto", "float32", "bfloat16"]',
        'Precision = Literal["auto", "float32", "bfloat16", "float16"]',
        "test_numerics.py::test_half_precision_is_refused",
    ),
    Mutation(
        "a stage whose loss is stuck",
        "stages/core/loop.py",
        "seen = alarms.watch(figures, updater.taken, origins)",
        "seen: dict[str, str] = {}",
        "test_numerics.py::test_a_preference_loss_that_stays_at_ln_2_is_told_of",
    ),
    Mutation(
        "a gradient that stands out",
        "stages/core/alarms.py",
        '"gradient_spike": gradient_spike(norms[:-SPIKE_STEPS], norms[-SPIKE_STEPS:]),',
        "",
        "test_alarms.py",
    ),
    Mutation(
        "a loss that stands out",
        "stages/core/alarms.py",
        '"loss_spike": _loss_spike(losses[:-SPIKE_STEPS], losses[-SPIKE_STEPS:]),',
        "",
        "test_alarms.py",
    ),
    Mutation(
        "a gradient of reinforcement learning that stands out",
        "stages/core/rl/health.py",
        '    "gradient_spike": _spike,\n',
        "",
        "test_health.py",
    ),
    Mutation(
        "what a round did to the policy",
        "stages/core/rl/learner.py",
        "            found |= self._moved(experiences, found)\n",
        "",
        "test_ppo.py::test_a_single_large_step_sets_off_the_alarm",
    ),
    Mutation(
        "sampling that comes to differ from training",
        "stages/core/rl/health.py",
        "last > max(0.02, 3 * first)",
        "False",
        "test_health.py",
    ),
    Mutation(
        "an alarm that cannot go off in so few rounds",
        "pipeline/config.py",
        "if (needed := self.rounds_needed(each)) > self.steps}",
        "if (needed := self.rounds_needed(each)) < 0}",
        "test_ppo.py::test_an_alarm_that_needs_more_rounds_than_there_are_is_refused_with_their_number",
    ),
    Mutation(
        "a row without what a rule needs",
        "stages/core/rl/prompts.py",
        "            require_facts(rules, row)\n",
        "            pass\n",
        "test_ppo_training.py::test_an_answer_that_is_of_no_use_is_found_before_anything_is_sampled",
    ),
    Mutation(
        "rewards that tell no response to a prompt from another to it",
        "stages/core/rl/preflight.py",
        "not clipped and max(apart.max().item(), seen.apart) > least",
        "True",
        "test_preflight.py::test_where_responses_to_a_prompt_are_compared_others_prompts_rewards_are_no_spread",
    ),
    Mutation(
        "a training of which nothing is handed on",
        "stages/core/rl/training.py",
        "    if training.selection.idle:\n",
        "    if False:\n",
        "test_ppo_training.py::test_a_gold_rule_that_is_never_met_leaves_the_start_and_says_so",
    ),
    Mutation(
        "a reward model on another base",
        "pipeline/config.py",
        "            if base and other and base != other:\n",
        "            if False:\n",
        "test_loader.py::test_a_reward_model_on_another_base_than_the_policys_is_refused_before_anything_is_trained",
    ),
    Mutation(
        "rows of prompts",
        "stages/core/rl/sampling.py",
        "replace(tree, origin=prompt.row.origin)",
        "tree",
        f"{AT_EVERY_STEP}[ppo-nan]",
    ),
    Mutation(
        "rows of blocks of text",
        "data/blocks.py",
        "place, origin=self._origin(start), starts=starts)",
        "place, starts=starts)",
        "test_cache.py::test_a_block_knows_where_its_documents_are_from",
    ),
    *(
        Mutation(f"before the first round: {name}", "stages/core/rl/preflight.py", text, without, "test_preflight.py")
        for name, text, without in (
            ("a ratio", "abs(found - 1) < EQUAL and approximate < EQUAL,", "True,"),
            ("a divergence", "gap < EQUAL,", "True,"),
            ("a gap", GAP, f"exact <= {LIMIT} and reaches"),
            ("a gap in float32", GAP, "difference <= most and reaches"),
            ("a part that is not sampled", GAP, f"difference <= most and exact <= {LIMIT}"),
            ("an end", "bool(ended.any()) or", "True or"),
            ("a spread", "not clipped and max(deviation, float(seen.rewards.std())) > ALIKE,", "True,"),
            ("memory", "left is None or needed < left,", "True,"),
            ("a failed check", "if check.fails:", "if False:"),
        )
    ),
)

IN_PUBLISHING = (
    Mutation(
        "a stage that is not on disk as it was written",
        "pipeline/store.py",
        "    manifests.verify(work)\n    _place(work, run, name)",
        "    _place(work, run, name)",
        "test_store.py::test_a_work_directory_that_changed_after_the_inventory_is_not_published",
    ),
    Mutation(
        "a name that is taken",
        "pipeline/durable.py",
        "_renameat2(source, target, _RENAME_NOREPLACE)",
        "_renameat2(source, target, 0)",
        "test_store.py::test_publishing_never_replaces_what_it_did_not_see",
    ),
    Mutation(
        "a link in a stage",
        "pipeline/durable.py",
        "if not stat.S_ISREG(status.st_mode):",
        "if False:",
        "test_store.py::test_a_stage_may_not_leave_links",
    ),
    Mutation(
        "a checkpoint that is not on disk as it was written",
        "pipeline/checkpoints.py",
        "_require_intact(work, record)",
        "pass",
        "test_checkpoints.py::test_one_that_is_not_on_disk_as_it_was_written_is_refused",
    ),
    Mutation(
        "a damaged checkpoint",
        "pipeline/checkpoints.py",
        "_misfit(path, maker) or _damage(path)",
        "_misfit(path, maker)",
        "test_checkpoints.py::test_one_that_cannot_serve_is_passed_over_with_the_reason",
    ),
    Mutation(
        "another stage's checkpoint",
        "pipeline/checkpoints.py",
        "if record.key != maker.key:",
        "if False:",
        "test_checkpoints.py::test_one_that_cannot_serve_is_passed_over_with_the_reason",
    ),
    Mutation(
        "too little space",
        "pipeline/store.py",
        "if free < needed:",
        "if False:",
        "test_store.py::test_too_little_space_is_refused_with_both_numbers",
    ),
)

MUTATIONS = (*IN_MANIFESTS, *IN_MODELS, *IN_TRAINING, *IN_PUBLISHING)


def main(names: Sequence[str]) -> int:
    """Try the mutations of these names, or all; returns the exit code."""
    chosen = [each for each in MUTATIONS if not names or each.name in names]
    missed = unnoticed(chosen)
    _tell(f"{len(chosen) - len(missed)} of {len(chosen)} noticed" + "".join(f"\n  not: {name}" for name in missed))
    return 1 if missed or not chosen else 0


def unnoticed(chosen: Sequence[Mutation]) -> list[str]:
    """Names of the mutations that no test notices.

    Raises:
        RuntimeError: The tests fail without any mutation.
    """
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(REPOSITORY, Path(place) / "copy", ignore=LEFT_OUT))
        os.environ[FINISHED] = str(_chain(copy, Path(place)))
        code, said = _pytest(copy, sorted({each.test for each in chosen}))
        if code != PASSED:
            raise RuntimeError(f"the tests fail without any mutation:\n{said}")
        return [each.name for each in chosen if not _is_noticed(each, copy)]


def _chain(copy: Path, place: Path) -> Path:
    """A chain that is finished once for all tests; returns its configuration."""
    program = "import sys, pathlib, tiny; print(tiny.finish_chain(pathlib.Path(sys.argv[1])), file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests'}"}
    command = [sys.executable, "-B", "-c", program, place]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return Path(done.stderr.splitlines()[-1])


def _is_noticed(mutation: Mutation, copy: Path) -> bool:
    path = copy / mutation.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.text) != 1:
        _tell(f"{mutation.name:<52} stands {source.count(mutation.text)} times in {mutation.file}")
        return False
    began = time.monotonic()
    path.write_text(source.replace(mutation.text, mutation.without), encoding="utf-8")
    try:
        code, said = _pytest(copy, [mutation.test])
    finally:
        path.write_text(source, encoding="utf-8")
    found = next(_failed(said), f"pytest ended with {code}") if code == FAILED else f"NOT NOTICED (pytest: {code})"
    _tell(f"{mutation.name:<52} {time.monotonic() - began:5.1f} s  {found}")
    return code == FAILED


def _pytest(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run fast tests of a copy up to the first that fails, however long they take.

    No bytecode is kept, which might be that of another mutation.
    """
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += ["-m", "not slow"]
    done = subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def _failed(said: str) -> Iterator[str]:
    for line in said.splitlines():
        if line.startswith("FAILED"):
            yield line.removeprefix("FAILED tests/").partition(" - ")[0]


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
