"""How the figures of an evaluation are called, beside the plain names: by parent, and by suite."""

from __future__ import annotations

GAIN, RATIO = "_gain", "_ratio"
"""What a figure's name ends with when it compares with the parent: by difference and by ratio, paired."""
SUITE = "suite."
"""What the names of a suite's figures begin with: `suite.NAME`, `suite.NAME.CATEGORY`."""
