"""A padding token that also ends turns, as SmolLM2, Llama 2, Mistral and others are published: endings are learnt."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import reports
import tiny
import torch
from conftest import Shared
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from data.schema import Message
from pipeline import cli, inputs
from pipeline.config import Decoding
from pipeline.store import RunDirectory
from stages.core.decoding import decode
from stages.core.lineup import Lineup

pytestmark = [pytest.mark.chain, pytest.mark.usefixtures("report_of_one_line")]

NAMES, OTHERS = ("Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal"), ("Ann", "Ben", "Ed", "Flo")
ANSWER = "It is me."
CONFIG = """\
output: {root}/run
device: cpu
dtype: float32
data:
  chats: {{source: {root}/chats.jsonl, held_out: 0}}
  pairs: {{source: {root}/pairs.jsonl, held_out: 0}}
  prompts: {{source: {root}/prompts.jsonl, held_out: 0}}
  asked: {{source: {root}/asked.jsonl, held_out: 1}}
stages:
  sft: {{kind: sft, policy: {root}/model, data: chats, lora: null, steps: 60, examples_per_step: 8,
    optimizer: {{learning_rate: 0.01}}}}
  reward: {{kind: reward, policy: sft, data: pairs, steps: 4, examples_per_step: 8, lora: {{rank: 4}},
    optimizer: {{learning_rate: 0.01}}}}
  dpo: {{kind: dpo, policy: sft, data: pairs, steps: 2, examples_per_step: 8, lora: {{rank: 4}}}}
  ppo: {{kind: ppo, policy: sft, reward: reward, data: prompts, steps: 2, examples_per_step: 8, minibatches: 2,
    max_new_tokens: 12, lora: {{rank: 4}}, optimizer: {{learning_rate: 0.0001}}}}
  trl: {{kind: trl, trainer: SFT, policy: {root}/model, data: chats, lora: null, steps: 60, examples_per_step: 8,
    examples_per_batch: 8, max_length: 64, optimizer: {{learning_rate: 0.01}}}}
  evaluate: {{kind: evaluate, models: [sft, dpo, ppo, trl], prompts: asked, gold: exact, temperature: 0,
    max_new_tokens: 12}}
"""


def question(name: str) -> str:
    return f"Who is {name}?"


def finish(root: Path) -> None:
    """Train every kind of stage on a model whose turns end with the padding token."""
    tiny.save_model(root / "model", "qwen2", [f"Who is {name}? {ANSWER}" for name in NAMES])
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(root / "model")
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((root / "model" / name).read_text())
        (root / "model" / name).write_text(json.dumps({**fields, "pad_token_id": tokenizer.eos_token_id}))
    for file, names in (("prompts", NAMES), ("asked", OTHERS)):
        reports.write_lines(root / f"{file}.jsonl", [{"prompt": question(name), "answer": ANSWER} for name in names])
    chats = [{"prompt": question(name), "completion": ANSWER} for name in NAMES]
    reports.write_lines(root / "chats.jsonl", chats)
    pairs = [{"prompt": question(name), "chosen": ANSWER, "rejected": f"{ANSWER} So."} for name in NAMES]
    reports.write_lines(root / "pairs.jsonl", pairs)
    (root / "config.yaml").write_text(CONFIG.format(root=root))
    assert cli.execute(cli.app, ["run", str(root / "config.yaml")]) == 0


@pytest.fixture(scope="module")
def run(shared: Shared) -> Path:
    """The finished run; nobody writes to it."""
    return shared("padding", finish) / "run"


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo", "trl"])
def test_answers_end_where_they_were_taught_to_end(run: Path, stage: str) -> None:
    artifact = inputs.resolve(str(run / "stages" / stage), RunDirectory(run), ())
    (contestant,) = Lineup({stage: artifact}, models.CPU).contestants.values()
    with contestant.use() as language_model:
        template = language_model.template
        assert template.tokenizer.pad_token_id == template.stop_id
        prompts = [tuple(template.prompt([Message("user", question(name))])) for name in NAMES]
        size = {"max_new_tokens": 12, "tokens_per_batch": 512}
        greedy = Decoding(temperature=0.0)
        found = decode(language_model.model, prompts, greedy, stop_id=template.stop_id, seed=0, **size)
    assert [template.decode(each.tokens) for each in found] == [ANSWER] * len(NAMES)
    assert all(each.ended for each in found)


def test_evaluations_find_all_answers_right(run: Path) -> None:
    evaluated = json.loads((run / "stages" / "evaluate" / "evaluation.json").read_text())["models"]
    right = {name: evaluated[name]["metrics"]["gold"]["value"] for name in ("sft", "dpo", "ppo", "trl")}
    assert set(right.values()) == {1.0}, right


def test_an_exported_model_ends_its_answers_in_transformers_too(run: Path, tmp_path: Path) -> None:
    assert cli.execute(cli.app, ["export", str(run / "stages" / "sft"), "--to", str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "Who is Cleo?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == f"{ANSWER}<|im_end|>"


@torch.no_grad()
def test_an_exported_reward_model_reads_the_end_of_padded_rows(run: Path, tmp_path: Path) -> None:
    stage = run / "stages" / "reward"
    assert cli.execute(cli.app, ["export", str(stage), "--to", str(tmp_path / "out")]) == 0
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    stop = AutoTokenizer.from_pretrained(stage).eos_token_id
    assert classifier.config.pad_token_id == tokenizer.pad_token_id != stop
    answers = (ANSWER, f"{ANSWER} So.", "No, it is Bob who is there.")
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Who is Ada?"}, {"role": "assistant", "content": answer}], return_dict=False
        )
        for answer in answers
    ]
    rows = [row[: len(row) - row[::-1].index(stop)] for row in rows]  # the template writes a line break after the end
    alone = torch.cat([classifier(torch.tensor([row])).logits for row in rows])
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    assert len({len(row) for row in rows}) > 1
    assert torch.allclose(classifier(**padded).logits, alone, atol=1e-5)
