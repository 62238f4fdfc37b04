"""The smallest vocabulary: tokens are bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from data.schema import Message
from data.template import SPECIAL_TOKENS, ChatTemplate, tokenizer_record
from data.tokenizer import load_tokenizer
from pipeline import cli
from pipeline import manifest as manifests
from pipeline.config import TokenizerSettings

SMALLEST = 256 + len(SPECIAL_TOKENS)
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
CONFIG = """\
output: {folder}/run
device: cpu
data: {{text: {{source: {folder}/text.txt, held_out: 0}}}}
stages: {{tokenizer: {{kind: tokenizer, data: text, vocab_size: {size}}}}}
"""


def test_the_least_vocabulary_is_all_bytes_and_the_control_tokens() -> None:
    assert TokenizerSettings(data="text", vocab_size=SMALLEST).vocab_size == SMALLEST
    with pytest.raises(ValidationError, match=f"greater than or equal to {SMALLEST}"):
        TokenizerSettings(data="text", vocab_size=SMALLEST - 1)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published tokenizer of the least size."""
    folder = tmp_path_factory.mktemp("characters")
    (folder / "text.txt").write_text(TEXT * 20)
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, size=SMALLEST))
    assert cli.execute(cli.app, ["run", str(folder / "run.yaml")]) == 0
    return folder / "run" / "stages" / "tokenizer"


def test_a_token_is_a_byte(stage: Path) -> None:
    metrics = manifests.load(stage).metrics
    assert (metrics["vocabulary"].value, metrics["bytes_per_token"].value) == (SMALLEST, 1.0)
    tokenizer = load_tokenizer(stage)
    for text in (TEXT, "é𝄞 <|end|> \r\n\t", "".join(map(chr, range(1, 0x250)))):
        ids = ChatTemplate(tokenizer).response(text)[:-1]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert min(ids) >= len(SPECIAL_TOKENS)


def test_its_chat_template_works(stage: Path) -> None:
    tokenizer = load_tokenizer(stage)
    assert tokenizer_record(tokenizer)["vocabulary_size"] == SMALLEST
    template = ChatTemplate(tokenizer)
    prompt = template.prompt([Message("user", "Speak!")])
    assert len(prompt) == len("Speak!") + 3
    assert template.decode(prompt) == "Speak!"
