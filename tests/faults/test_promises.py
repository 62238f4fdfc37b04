"""What the page says of promises is what their tests found."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import promises

TESTS = """\
import pytest

@pytest.mark.parametrize("case", range(4))
def test_it_holds(case):
    if case == 3:
        pytest.skip("not here")
    assert case != 1
"""


def test_cases_that_hold_are_counted_among_those_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    monkeypatch.setattr(promises, "REPOSITORY", tmp_path)
    monkeypatch.setattr(promises, "PROMISES", {"it holds": ("test_it.py::test_it_holds",)})
    assert list(promises.kept()) == [("it holds", 2, 3)]


def test_a_test_that_is_not_there_keeps_no_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(promises, "REPOSITORY", tmp_path)
    monkeypatch.setattr(promises, "PROMISES", {"it holds": ("test_it.py::test_it_holds",)})
    with pytest.raises(RuntimeError, match=r"not found: .*test_it\.py"):
        list(promises.kept())


@pytest.mark.parametrize("test", [test for tests in promises.PROMISES.values() for test in tests])
def test_every_test_that_a_promise_names_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    text = (promises.REPOSITORY / "tests" / file).read_text(encoding="utf-8")
    assert f"\ndef {name or 'test_'}" in text
