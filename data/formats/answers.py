"""The part of a worked answer that can be verified."""

from __future__ import annotations

import re

FINAL = re.compile(r"####\s*+\$?+(-?+(?:[\d,]*+\.\d++|[\d,]*+(?<=\d)))\s*+")


def final_answer(text: str) -> str:
    """The number after `####` on the last line of a worked answer, without the commas between thousands, as in GSM8K
    (Cobbe et al. 2021, arXiv 2110.14168); any other text as it is."""
    last = text.rstrip().rpartition("\n")[2].strip()
    found = FINAL.fullmatch(last)
    return found[1].replace(",", "") if found else text
