"""Pretraining: Baton's stage beside the Trainer of transformers, on blocks of 256 tokens of hh-rlhf's conversations.

With `--shakespeare`, the recipe of `configs/shakespeare.yaml` against the clock.
"""

from __future__ import annotations

import sys

from bench import comparison, shakespeare
from bench.comparison import Work
from bench.figures import Passes

WORK = Work(
    kind="pretrain",
    peer="transformers Trainer",
    variants=("eager", "compiled"),
    passes=Passes(body=6, head=6),
    learning_rate=1e-3,
    model="llama-12m",
    length=256,
    unit="blocks",
    differences=("Nothing is known to be unequal: weights, blocks and their order are the same.",),
)

if __name__ == "__main__":
    if "--shakespeare" in sys.argv:
        shakespeare.main(__doc__)
    else:
        comparison.main(WORK, __doc__)
