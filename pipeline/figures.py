"""How the figures of an evaluation are called, beside the plain names: by parent, by judge and by suite."""

from __future__ import annotations

NAME = r"[A-Za-z0-9][A-Za-z0-9-]*"
"""Names of judges and suites: an underscore would look like another figure of theirs, as in `suite.NAME_gain`."""
GAIN, RATIO = "_gain", "_ratio"
"""What a figure's name ends with when it compares with the parent: by difference and by ratio, paired."""
SUITE = "suite."
"""What the names of a suite's figures begin with: `suite.NAME`, `suite.NAME.CATEGORY`."""
PERPLEXITY, CALIBRATION_ERROR, LONGER_WINS = "_perplexity", "_calibration_error", "_longer_wins"
"""What the names of other figures of a whole suite end with."""
SETTINGS = ("gold", "reward")
"""Judges that are settings of their own; the mean of their scores is called as they are."""
SCORE = "score."
"""What the mean of another judge's scores begins with: `score.JUDGE`."""
WIN_RATE, LENGTH_CONTROLLED = "win_rate.", "win_rate_length_controlled."
"""What win rates begin with: `win_rate.JUDGE`; of the second kind, at equal lengths."""
