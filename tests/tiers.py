"""Two tiers of tests: `--fast` runs all that is not marked `slow`, `--due DATE` the slow tests whose turn it is.

A slow test has its turn every `DAYS` days, by a checksum of its name, so that CI runs each of them within that time
and a new test moves no other to another day. In the fast tier a test that takes too long fails, so that the tier
stays fast. What tests share is made once and counts for none of them.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Generator
from datetime import date
from pathlib import Path

import pytest

SECONDS_ALLOWED = 4.0
"""What a test of the fast tier may take, fixtures of its own included: on the clock, less what it waited for a core."""
SCHEDULING = Path("/proc/thread-self/schedstat")
"""Where Linux says how long a thread has computed and how long it has waited for a core, in nanoseconds."""
DAYS = 4
"""The number of days within which every slow test has been due."""
TOO_SLOW = (
    "took {seconds:.1f} s, and a test of the fast tier may take {allowed:g} s: make it faster, or mark it "
    "`@pytest.mark.slow`, which leaves it to `make test-all` and, every {days} days, to CI"
)


def add_options(parser: pytest.Parser) -> None:
    """Add the options by which a tier is selected."""
    group = parser.getgroup("tiers")
    group.addoption("--fast", action="store_true", help="leave out `slow` tests; fail tests that should be marked so")
    group.addoption("--due", type=date.fromisoformat, metavar="DATE", help="run the `slow` tests of this day alone")


def is_due(name: str, day: date) -> bool:
    """Whether it is the turn of the slow test of this name."""
    return zlib.crc32(name.encode()) % DAYS == day.toordinal() % DAYS


def own_seconds() -> float:
    """A clock that stands still while this thread waits for a core."""
    waited = int(SCHEDULING.read_text().split()[1]) / 1e9 if SCHEDULING.exists() else 0.0
    return time.monotonic() - waited


class Tiers:
    """The hooks that keep to the tier that the options select."""

    def __init__(self, config: pytest.Config, seconds_allowed: float = SECONDS_ALLOWED) -> None:
        self._config = config
        self._allowed = seconds_allowed
        self._fast: bool = config.getoption("fast")
        self._due: date | None = config.getoption("due")
        self._shared_depth = 0
        self._shared_seconds = 0.0
        self._began = 0.0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out tests of the other tier."""
        selected = [item for item in items if self._is_selected(item)]
        self._config.hook.pytest_deselected(items=[item for item in items if not self._is_selected(item)])
        items[:] = selected

    def _is_selected(self, item: pytest.Item) -> bool:
        slow = item.get_closest_marker("slow") is not None
        if self._due is not None:
            return slow and is_due(item.nodeid, self._due)
        return not (slow and self._fast)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
        """Add up what fixtures take that tests share, nested ones once."""
        if fixturedef.scope == "function":
            return (yield)
        began = own_seconds()
        self._shared_depth += 1
        try:
            return (yield)
        finally:
            self._shared_depth -= 1
            if not self._shared_depth:
                self._shared_seconds += own_seconds() - began

    def pytest_runtest_logstart(self) -> None:
        """Begin to count."""
        self._began, self._shared_seconds = own_seconds(), 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Fail a test of the fast tier that took too long."""
        report = yield
        seconds = own_seconds() - self._began - self._shared_seconds
        if self._fast and report.when == "call" and report.passed and seconds > self._allowed:
            report.outcome = "failed"
            report.longrepr = TOO_SLOW.format(seconds=seconds, allowed=self._allowed, days=DAYS)
        return report
