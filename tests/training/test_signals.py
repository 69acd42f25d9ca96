"""Signals and checkpoint timers: what is recorded, when a save is due."""

import os
import signal
import time

import pytest

from deepvision.training.signals import CheckpointTimer, StopSignal, parse_interval


@pytest.mark.parametrize(
    ("text", "expected"), [("10m", (600, True)), ("30s", (30, True)), ("200", (200, False))]
)
def test_intervals(text, expected):
    assert parse_interval(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "1h", "1.5m", "m", "10 m"])
def test_texts_that_are_no_interval(text):
    with pytest.raises(ValueError, match="not an interval"):
        parse_interval(text)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_requests_and_the_second_acts(number):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with StopSignal() as stop:
            assert not stop.check() and stop.stopped_by is None
            os.kill(os.getpid(), number)
            assert stop.check() and stop.stopped_by == number
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_due_save_is_no_request_to_stop():
    stop = StopSignal()
    assert stop.check(save_due=True) and stop.stopped_by is None


def test_a_save_is_due_every_n_seconds():
    timer = CheckpointTimer("1s")
    assert not timer.step()
    time.sleep(1)
    assert timer.step()
    timer.reset()
    assert not timer.step()


def test_a_save_is_due_every_n_steps():
    timer, due = CheckpointTimer("3"), []
    for _ in range(7):
        due.append(timer.step())
        if due[-1]:
            timer.reset()
    assert due == [False, False, True, False, False, True, False]
