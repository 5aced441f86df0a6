"""Work in the background ends with the body, and its errors are heard."""

from __future__ import annotations

import threading

import pytest

from cranium.watch import repeatedly


def test_it_is_called_until_the_body_ends_and_not_after() -> None:
    called, enough = [], threading.Event()

    def work() -> None:
        called.append(1)
        if len(called) == 3:
            enough.set()

    with repeatedly(work, 0.001):
        assert enough.wait(10)
    count = len(called)
    threading.Event().wait(0.02)
    assert len(called) == count


def test_an_error_is_raised_at_the_end_and_the_bodys_goes_before() -> None:
    raised = threading.Event()

    def work() -> None:
        raised.set()
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"), repeatedly(work, 0.001):
        assert raised.wait(10)
    raised.clear()
    with pytest.raises(ValueError, match="body"), repeatedly(work, 0.001):
        assert raised.wait(10)
        raise ValueError("body")
