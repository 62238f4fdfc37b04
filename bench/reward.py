"""The reward model: Baton's stage beside TRL's RewardTrainer, on pairs of hh-rlhf with a LoRA adapter and a head."""

from __future__ import annotations

from bench import comparison
from bench.comparison import Work
from bench.figures import Passes

WORK = Work(
    kind="reward",
    peer="TRL RewardTrainer",
    variants=("padding-bfloat16", "padding-float32", "padding-bfloat16-plain", "padding-float32-plain"),
    passes=Passes(body=4, head=0),
    learning_rate=1e-4,
    differences=(
        "LoRA of rank 16 on all linear layers, alpha 32, no dropout, and the scalar head begin with other random "
        "numbers; Baton's head is float32 and has a bias.",
        "A step's examples are laid out as each side does it: TRL pads both responses of all pairs to the longest.",
    ),
)

if __name__ == "__main__":
    comparison.main(WORK, __doc__)
