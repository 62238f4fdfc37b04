"""Supervised fine-tuning: Baton's stage beside TRL's SFTTrainer, on the chosen conversations of hh-rlhf.

The loss is on assistant turns. TRL is measured in the fastest of its ways to lay out rows.
"""

from __future__ import annotations

from bench import comparison
from bench.comparison import Work
from bench.figures import Passes

WORK = Work(
    kind="sft",
    peer="TRL SFTTrainer",
    variants=(
        "padding-bfloat16",
        "padding-float32",
        "padding_free-bfloat16",
        "bfd-bfloat16",
        "bfd-bfloat16-plain",
        "wrapped-bfloat16",
    ),
    passes=Passes(body=4, head=4),
    learning_rate=1e-4,
    unit="examples",
    differences=(
        "LoRA of rank 16 on all linear layers, alpha 32, no dropout, begins with other random numbers.",
        "A step's examples are laid out as each side does it. A step of `bfd` and `wrapped` is one packed row of about "
        "as many tokens as a step of the others has, so its examples are not ours': speed is compared by tokens.",
    ),
)

if __name__ == "__main__":
    comparison.main(WORK, __doc__)
