"""Signals become a flag; a second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import rank_environment

from dist_colorize.stopping import SECOND_SIGNAL_SECONDS, StopFlag


@pytest.mark.parametrize("number", StopFlag.SIGNALS)
def test_the_handler_only_sets_the_flag_and_outlives_the_launchers_echo(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in StopFlag.SIGNALS}
    try:
        with StopFlag() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            time.sleep(0)  # let Python run the handler
            assert stop.requested
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # on the way out
        time.sleep(0)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_without_a_signal_the_earlier_handlers_are_back() -> None:
    before = [signal.getsignal(number) for number in StopFlag.SIGNALS]
    with StopFlag() as stop:
        assert before != [signal.getsignal(number) for number in StopFlag.SIGNALS]
        stop.request()  # another rank was told
        assert stop.requested
    assert before == [signal.getsignal(number) for number in StopFlag.SIGNALS]


def test_a_second_signal_leaves_at_once() -> None:
    program = "from dist_colorize.stopping import StopFlag\nwith StopFlag():\n print(flush=True)\n time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import time\n{program}"], env=rank_environment(), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    time.sleep(SECOND_SIGNAL_SECONDS + 0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 75
