"""The precision of `--dtype auto`, found in a process of its own, since finding it changes how a process computes.

`python -m bench.precision DEVICE`
"""

from __future__ import annotations

import sys

from bench import processes
from stages.core.device import choose

if __name__ == "__main__":
    processes.report(dtype=choose(sys.argv[1], "auto").record["dtype"])
