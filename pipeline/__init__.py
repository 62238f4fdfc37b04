"""The kernel (errors, config, fingerprints, manifests) and the driver (plan, runner, report, command line).

Nothing in this package imports torch when it is imported: `baton --help`, `plan` and `verify` answer at once.
"""

import os

__version__ = "0.1.0"

# Baton sends nothing anywhere; these switch off what the libraries beneath it would send.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
