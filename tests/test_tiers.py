"""The tiers of the tests: which tests they run, and what happens to a slow one among the fast ones."""

from __future__ import annotations

import re
from datetime import date, timedelta

import pytest

CONFTEST = """
import tiers

pytest_addoption = tiers.add_options

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes its time")
    config.pluginmanager.register(tiers.Tiers(config, seconds_allowed=0.15))
"""
TESTS = """
import time
import pytest

@pytest.fixture(scope="module")
def shared():
    time.sleep(0.2)

@pytest.fixture
def own():
    time.sleep(0.2)

def test_quick():
    pass

def test_shared(shared):
    pass

def test_waits():
    time.sleep(0.2)

def test_own(own):
    pass

def test_fails():
    time.sleep(0.2)
    assert False, "for another reason"

@pytest.mark.slow
def test_marked():
    time.sleep(0.2)

@pytest.mark.parametrize("number", [pytest.param(number, marks=pytest.mark.slow) for number in range(40)] + [40])
def test_numbered(number):
    pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A directory with a few tests, some of which take longer than is allowed there."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_suite=TESTS)
    return pytester


def passed(suite: pytest.Pytester, *options: str) -> list[str]:
    """Names of the tests that ran and passed."""
    lines = suite.runpytest_inprocess("-v", "-p", "no:cacheprovider", *options).outlines
    return [found[1] for line in lines if (found := re.match(r"test_suite\.py::(\S+) PASSED", line))]


def test_the_fast_tier_refuses_a_test_that_takes_too_long_and_says_what_to_do(suite: pytest.Pytester) -> None:
    # Without the summary: where the variable CI is set, it repeats the whole message.
    result = suite.runpytest_inprocess("--fast", "-rN", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=3, failed=3, deselected=41)
    said = result.stdout.str()
    assert len(re.findall(r"took 0\.\d s, and a test of the fast tier may take 0\.15 s: make it faster", said)) == 2
    assert "for another reason" in said
    assert passed(suite, "--fast") == ["test_quick", "test_shared", "test_numbered[40]"]


def test_all_tests_run_where_no_tier_is_selected_however_long_they_take(suite: pytest.Pytester) -> None:
    suite.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=46, failed=1)


def test_every_slow_test_is_due_once_within_four_days_and_no_other_is(suite: pytest.Pytester) -> None:
    first = date(2026, 12, 30)
    days = [passed(suite, "--due", str(first + timedelta(days=number))) for number in range(4)]
    slow = ["test_marked", *(f"test_numbered[{number}]" for number in range(40))]
    assert sorted(name for day in days for name in day) == sorted(slow)
    assert all(days)
    assert passed(suite, "--due", str(first + timedelta(days=4))) == days[0]


def test_a_day_that_is_none_is_refused(suite: pytest.Pytester) -> None:
    result = suite.runpytest_inprocess("--due", "tomorrow")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
