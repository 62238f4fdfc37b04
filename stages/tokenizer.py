"""Train a byte-level BPE tokenizer with control tokens and a chat template.

Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) by the `tokenizers` library: any text can be encoded,
nothing is unknown. The end-of-turn token is also the end-of-document token, so that a pretrained model already
knows how to stop; padding is a token of its own, so that the end is never masked away. Left out: normalisation,
and choosing the vocabulary size by held-out compression.

    python -m stages.tokenizer CONFIG [key=value ...]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.template import SPECIAL_TOKENS, TEMPLATE, tokenizer_record
from pipeline.contract import Context, Result
from pipeline.manifest import Metric
from reward.intervals import ratio_interval
from stages.core import rows

SAMPLED = 2000
"""Held-out texts that compression is measured on."""


def run(context: Context) -> Result:
    """Train on the training rows, measure bytes per token on the held-out ones.

    Raises:
        DataError: The data source has no usable rows.
    """
    texts = rows.Texts(context, "data", SAMPLED)
    tokenizer = wrap(_train(texts, context.settings.vocab_size))
    tokenizer.save_pretrained(context.directory)
    context.progress({"vocabulary": len(tokenizer)}, done=1, total=1)
    return Result(
        kind="tokenizer",
        metrics=_metrics(tokenizer, texts.sample),
        data=texts.cards,
        tokenizer=tokenizer_record(tokenizer),
    )


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A `transformers` tokenizer with Baton's control tokens and chat template."""
    pad, end, *turns = SPECIAL_TOKENS
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, additional_special_tokens=turns
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def _train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _metrics(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> dict[str, Metric]:
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    tokens = [len(each) for each in encoded]
    size = [len(text.encode()) for text in texts]
    return {
        "bytes_per_token": ratio_interval(size, tokens),
        "vocabulary": Metric(value=len(tokenizer)),
    }


if __name__ == "__main__":
    from pipeline.launch import main

    main("tokenizer")
