"""What Baton promises of its files, tried by breaking things: kills, power cuts, full disks, flipped bits.

`pytest` runs a small part of each; `make faults`, which is `python -m tests.faults`, runs all of it and writes
docs/reliability.md. The processes that are killed or traced are real ones that run the real functions. They are forked
from one that has imported everything, so that one costs milliseconds.
"""

import sys
from pathlib import Path

# As pytest does, so that fakes and configurations of other tests can be imported.
if (tests := str(Path(__file__).resolve().parent.parent)) not in sys.path:
    sys.path.insert(0, tests)
