"""Direct preference optimisation: Baton's stage beside TRL's DPOTrainer, on pairs of hh-rlhf with a LoRA adapter."""

from __future__ import annotations

from bench import comparison
from bench.comparison import Work
from bench.figures import Passes

WORK = Work(
    kind="dpo",
    peer="TRL DPOTrainer",
    variants=("padding-bfloat16", "padding-float32", "padding-bfloat16-plain", "padding-float32-plain"),
    passes=Passes(body=6, head=6),
    learning_rate=1e-4,
    differences=(
        "LoRA of rank 16 on all linear layers, alpha 32, no dropout, begins with other random numbers.",
        "A step's examples are laid out as each side does it: TRL pads both responses of all pairs to the longest.",
        "`padding_free` of DPOTrainer is switched off in TRL 1.16, and it packs nothing.",
    ),
)

if __name__ == "__main__":
    comparison.main(WORK, __doc__)
