"""Programs are timed in turns."""

from __future__ import annotations

import gc
import time

import pytest

from tautomer.rewrite.measure import in_turns, measure, rounds_within


def test_calls_alternate():
    calls: list[str] = []
    measure(lambda _: calls.append("a"), lambda _: calls.append("b"), [], rounds=3)
    assert calls == list("abababab")


def test_any_number_take_turns_for_a_time():
    calls: list[str] = []
    runs = [lambda _, name=name: (calls.append(name), time.sleep(0.002)) for name in "abc"]
    assert len(in_turns(runs, [], 2)) == 3 and calls == list("abc" * 3)
    calls.clear()
    assert min(in_turns(runs, [], 1, milliseconds=20.0)) >= 2000
    assert calls == list("abc" * (len(calls) // 3)) and 3 <= len(calls) // 3 <= 5


def test_the_slower_one_is_found_in_microseconds():
    slow, fast = measure(lambda _: time.sleep(0.004), lambda _: time.sleep(0.001), [], rounds=3)
    assert 4000 <= slow < 40_000 and 1000 <= fast < slow


def test_rounds_fit_a_time():
    sleep = lambda _: time.sleep(0.002)  # noqa: E731
    assert 3 <= rounds_within(40.0, sleep, sleep, []) <= 10
    assert rounds_within(1.0, sleep, sleep, [], least=2) == 2
    assert rounds_within(1e6, lambda _: None, lambda _: None, [], most=7) == 7


def test_the_collector_runs_again_afterwards():
    def broken(_):
        assert not gc.isenabled()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        measure(broken, broken, [], rounds=1)
    assert gc.isenabled()
