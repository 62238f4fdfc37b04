"""The preference losses against TRL's own trainers on the same tokens, and the options that fit them."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any, get_args

import models
import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from torch import Tensor

from data.tree import Tree
from pipeline.config import DpoSettings
from stages import dpo
from stages.core.layout import LAYOUTS
from stages.core.losses import PREFERENCE_LOSSES
from stages.core.roles import POLICY, REFERENCE, Roles

LOSSES = get_args(DpoSettings.model_fields["loss"].annotation)
TOLERANCE = 1e-5
TEXT = [{"prompt": "Where does Ada live?", "chosen": "In Oslo.", "rejected": "Why?"}]


@pytest.fixture(autouse=True)
def trl_may_warn() -> Iterator[None]:
    """What TRL warns of is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def settings(loss: str, **options: Any) -> DpoSettings:
    needed = {"robust": {"label_smoothing": 0.1}, "simpo": {"gamma": 0.7}}.get(loss, {})
    return DpoSettings(policy="p", data="d", loss=loss, **{**needed, **options})


def prepared() -> Roles:
    roles = models.roles(POLICY)
    models.disturb(roles, POLICY)
    return roles


def ours(roles: Roles, chosen: DpoSettings, trees: list[Tree], layout: str = "tree") -> float:
    """Baton's loss of one step; leaves its gradient in the adapter."""
    total = 0.0
    for part in dpo.objective(roles, chosen, layout)(trees):
        part.loss.backward()
        total += part.loss.item()
    return total


def gradients(named: Any) -> dict[str, Tensor]:
    return {
        name.replace("base_model.model.", "").replace(f".{POLICY}.", ".default."): each.grad.clone()
        for name, each in named
        if each.grad is not None
    }


@functools.cache
def dpo_trainer() -> Any:
    """TRL's trainer on the same base, whose adapter holds the same weights as `prepared`'s."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(output_dir="unused", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)
    shape = LoraConfig(r=models.LORA.rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        models.model(), args=arguments, train_dataset=Dataset.from_list(TEXT), processing_class=models.tokenizer(),
        peft_config=shape,
    )  # fmt: skip
    policy = dict(prepared().parameters(POLICY))
    copied = 0
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                source = name.removeprefix("base_model.model.").replace(".default.", f".{POLICY}.")
                parameter.copy_(policy[source])
                copied += 1
    assert copied == len(policy)
    return trainer


def dpo_batch(trees: list[Tree]) -> dict[str, Tensor]:
    """As TRL's own collator pads pairs."""
    examples = [
        {"prompt_ids": list(tree.prompt), "chosen_ids": list(tree.branches[0].tokens),
         "rejected_ids": list(tree.branches[1].tokens)}
        for tree in trees
    ]  # fmt: skip
    return dpo_trainer().data_collator(examples)


def trl_dpo(losses: list[str], weights: list[float], chosen: DpoSettings, trees: list[Tree]) -> float:
    trainer = dpo_trainer()
    trainer.loss_types, trainer.loss_weights = losses, weights
    trainer.beta, trainer.label_smoothing = chosen.beta, chosen.label_smoothing
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dpo_batch(trees))
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "apo_zero", "apo_down"])
def test_loss_and_gradients_are_those_of_trl_s_dpo_trainer(loss: str, sft_weight: float) -> None:
    chosen, trees, roles = settings(loss, beta=0.4, sft_weight=sft_weight), models.pairs(6), prepared()
    expected = trl_dpo([loss, "sft"], [1.0, sft_weight], chosen, trees)
    assert ours(roles, chosen, trees) == pytest.approx(expected, abs=TOLERANCE)
    found, wanted = gradients(roles.parameters(POLICY)), gradients(dpo_trainer().model.named_parameters())
    assert found.keys() == wanted.keys()
    assert max(each.abs().max().item() for each in wanted.values()) > 100 * TOLERANCE
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], atol=TOLERANCE, rtol=1e-4), name


def test_label_smoothing_is_trl_s_where_trl_has_it() -> None:
    """TRL 1.16 smooths the sigmoid in its losses of sorted pairs, of which a batch of one has nothing to sort."""
    chosen = settings("sigmoid", beta=0.4, label_smoothing=0.2)
    for tree in models.pairs(4):
        assert ours(prepared(), chosen, [tree]) == pytest.approx(trl_dpo(["aot"], [1.0], chosen, [tree]), abs=TOLERANCE)


@functools.cache
def unreferenced_trainer(kind: str) -> Any:
    """TRL's experimental trainers, on the base alone."""
    options: dict[str, Any] = {
        "output_dir": "unused", "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    if kind == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        arguments, trainer = CPOConfig(loss_type="simpo", **options), CPOTrainer
    else:
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        arguments, trainer = ORPOConfig(**options), ORPOTrainer
    made = trainer(
        models.model(), args=arguments, train_dataset=Dataset.from_list(TEXT), processing_class=models.tokenizer()
    )
    made.model.eval()
    return made


def padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def labelled_batch(trees: list[Tree]) -> dict[str, Tensor]:
    """Pairs as TRL's experimental trainers take them: a prompt's labels are -100."""
    batch: dict[str, Tensor] = {}
    for side, name in enumerate(("chosen", "rejected")):
        prompts = [list(tree.prompt) for tree in trees]
        responses = [list(tree.branches[side].tokens) for tree in trees]
        paths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        batch[f"{name}_input_ids"] = padded(paths, 0)
        batch[f"{name}_attention_mask"] = padded([[1] * len(path) for path in paths], 0)
        batch[f"{name}_labels"] = padded(
            [[-100] * len(prompt) + response for prompt, response in zip(prompts, responses, strict=True)], -100
        )
    return batch


def trl_unreferenced(kind: str, trees: list[Tree], **options: float) -> tuple[float, dict[str, float]]:
    trainer = unreferenced_trainer(kind)
    for name, value in options.items():
        setattr(trainer, name, value)
    with torch.no_grad():
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, labelled_batch(trees))
    return loss.item(), metrics


@pytest.mark.parametrize(("gamma", "sft_weight"), [(0.0, 0.0), (0.7, 0.0), (1.6, 0.5)])
def test_simpo_is_trl_s(gamma: float, sft_weight: float) -> None:
    chosen, trees = settings("simpo", beta=2.5, gamma=gamma, sft_weight=sft_weight), models.pairs(6)
    expected, metrics = trl_unreferenced("simpo", trees, beta=2.5, simpo_gamma=gamma, cpo_alpha=sft_weight)
    parts = list(dpo.objective(models.roles(POLICY), chosen, "tree")(trees))
    assert sum(part.loss.item() for part in parts) == pytest.approx(expected, abs=TOLERANCE)
    assert sum(part.shares["margin"] for part in parts) == pytest.approx(metrics["rewards/margins"], abs=TOLERANCE)
    assert sum(part.shares["accuracy"] for part in parts) == pytest.approx(metrics["rewards/accuracies"])


def test_the_odds_ratio_term_of_orpo_is_trl_s() -> None:
    trees = models.pairs(6)
    loss, metrics = trl_unreferenced("orpo", trees, beta=0.3)
    parts = list(dpo.objective(models.roles(POLICY), settings("orpo", beta=0.3), "tree")(trees))
    odds = sum(part.loss.item() + part.shares["chosen_logprob"] for part in parts)
    assert odds == pytest.approx(loss - metrics["nll_loss"], abs=TOLERANCE)


def test_orpo_is_trl_s_where_prompts_have_no_token_to_learn() -> None:
    """TRL's supervised term is also of the prompts' tokens after the first, ours of the responses' only."""
    trees = [dataclasses.replace(tree, prompt=tree.prompt[:1]) for tree in models.pairs(6)]
    expected, _ = trl_unreferenced("orpo", trees, beta=0.3)
    assert ours(models.roles(POLICY), settings("orpo", beta=0.3), trees) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_does_not_depend_on_batches(loss: str, layout: str) -> None:
    trees = models.pairs(7)
    whole = ours(prepared(), settings(loss, tokens_per_batch=10_000), trees)
    assert ours(prepared(), settings(loss, tokens_per_batch=30), trees, layout) == pytest.approx(whole, abs=TOLERANCE)


def reference_forwards(roles: Roles, chosen: DpoSettings, monkeypatch: pytest.MonkeyPatch) -> int:
    used: list[str] = []
    use = roles.use
    monkeypatch.setattr(roles, "use", lambda role: used.append(role) or use(role))
    ours(roles, chosen, models.pairs(3))
    assert POLICY in used
    return used.count(REFERENCE)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_reference_is_computed_for_a_loss_that_has_none(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = reference_forwards(prepared(), settings(loss), monkeypatch)
    assert found == (0 if loss in ("simpo", "orpo") else 1)


@pytest.mark.parametrize("loss", LOSSES)
def test_computed_tokens_are_counted_twice_only_with_a_reference(loss: str) -> None:
    trees = models.pairs(3)
    (part,) = dpo.objective(prepared(), settings(loss, tokens_per_batch=1000), "tree")(trees)
    laid_out = max(tree.length for tree in trees)
    assert part.tokens % laid_out == 0
    (once,) = dpo.objective(prepared(), settings("simpo", tokens_per_batch=1000), "tree")(trees)
    assert part.tokens == (1 if loss in ("simpo", "orpo") else 2) * once.tokens


@pytest.mark.parametrize("loss", LOSSES)
def test_at_the_start_the_margin_is_zero_only_against_a_reference(loss: str) -> None:
    parts = list(dpo.objective(models.roles(POLICY), settings(loss), "tree")(models.pairs(4)))
    margin = sum(part.shares["margin"] for part in parts)
    assert (margin == 0.0) == settings(loss).has_reference


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_pulls_the_pair_apart(loss: str) -> None:
    """From equal log-probabilities, the gradient lowers the rejected response relative to the chosen one."""
    logprobs = torch.full((1, 2), -1.0, requires_grad=True)
    PREFERENCE_LOSSES[loss].function(logprobs, settings(loss)).sum().backward()
    chosen, rejected = logprobs.grad[0].tolist()
    assert chosen < rejected


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("extreme", [0.0, -1e-9, -1e4])
def test_extreme_log_probabilities_give_finite_losses_and_gradients(loss: str, extreme: float) -> None:
    logprobs = torch.tensor([[extreme, -1e3], [-1e3, extreme]], requires_grad=True)
    found = PREFERENCE_LOSSES[loss].function(logprobs, settings(loss))
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(logprobs.grad).all()


def test_every_loss_of_the_settings_is_there() -> None:
    assert set(PREFERENCE_LOSSES) == set(LOSSES)
    assert set(DpoSettings.WITHOUT_REFERENCE + DpoSettings.SMOOTHED) < set(LOSSES)


def test_by_default_the_loss_is_that_of_dpo() -> None:
    roles = models.roles(POLICY)
    plain = DpoSettings(policy="p", data="d")
    assert ours(roles, plain, models.pairs(3)) == pytest.approx(math.log(2), abs=1e-6)
    assert (plain.loss, plain.label_smoothing, plain.reference) == ("sigmoid", 0.0, "each_step")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge", "label_smoothing": 0.1}, "knows no label_smoothing"),
        ({"loss": "simpo", "gamma": 0.5, "label_smoothing": 0.1}, "knows no label_smoothing"),
        ({"loss": "sigmoid", "label_smoothing": 0.5}, "less than 0.5"),
        ({"loss": "robust"}, "needs label_smoothing"),
        ({"loss": "simpo"}, "needs gamma"),
        ({"loss": "sigmoid", "gamma": 0.5}, "gamma is for loss=simpo"),
        ({"loss": "orpo", "sft_weight": 0.1}, "leave out sft_weight"),
        ({"loss": "orpo", "reference": "once"}, "has no reference"),
        ({"loss": "dpo"}, "'sigmoid', 'sigmoid_norm'"),
    ],
)
def test_options_that_do_not_fit_the_loss_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DpoSettings(policy="p", data="d", **options)


@pytest.mark.parametrize("loss", LOSSES)
def test_settings_read_back_from_what_they_write(loss: str) -> None:
    chosen = settings(loss)
    assert DpoSettings.model_validate(chosen.model_dump(mode="json")) == chosen
