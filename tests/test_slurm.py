"""The job of the guide hands the signal on, waits for the checkpoint, and queues again for exit code 75 alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

RUN = """#!/bin/bash
if [ "$ENDS" = alone ]; then exit "$CODE"; fi
trap 'sleep 0.3; echo checkpoint > "$HERE/checkpoint"; exit "$CODE"' USR1
echo > "$HERE/started"
while true; do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The guide's script, beside stand-ins of what it calls."""
    (script,) = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs" / "slurm.md").read_text(), re.DOTALL)
    programs = {"job": script, "baton": RUN, "scontrol": '#!/bin/bash\necho "$@" > "$HERE/queue"\n'}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path / "job"


def started(job: Path, code: int, ends: str) -> subprocess.Popen[bytes]:
    here = str(job.parent)
    known = {
        "PATH": f"{here}:{os.environ['PATH']}",
        "HERE": here,
        "SLURM_JOB_ID": "17",
        "CODE": str(code),
        "ENDS": ends,
    }
    return subprocess.Popen([job], env=known)


@pytest.mark.parametrize(("code", "queued"), [(75, True), (143, False)])
def test_a_signal_is_handed_on_and_the_checkpoint_waited_for(job: Path, code: int, queued: bool) -> None:
    with started(job, code, "by signal") as process:
        while not (job.parent / "started").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == code
    assert (job.parent / "checkpoint").exists()
    assert (job.parent / "queue").exists() == queued


@pytest.mark.parametrize("code", [0, 4])
def test_a_run_that_ends_by_itself_is_not_queued_again(job: Path, code: int) -> None:
    with started(job, code, "alone") as process:
        assert process.wait(60) == code
    assert not (job.parent / "queue").exists()
