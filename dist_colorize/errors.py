"""What goes wrong by the user's hand or wish, and how every command of this package leaves.

A command ends its module with

    if __name__ == "__main__":
        run_command(main)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

OK = 0
"""Finished."""
FAILURE = 1
"""Something failed: a bug (with a traceback), or some of many inputs could not be processed."""
USAGE = 2
"""The user's input cannot work: an argument, a config value, a file."""
INTERRUPTED = 75
"""Stopped on request and resumable: the same command goes on where this one left (EX_TEMPFAIL of sysexits.h)."""


class UserError(Exception):
    """An error that its reader can put right; the message names the file or field and the remedy.

    `shared` says that every rank raises this same error at the same moment, so that one line per node is enough.
    `code` is the exit code that the command leaves with.
    """

    code = USAGE

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class RunFailed(UserError):
    """What was asked for is sound, but the machine or the numbers failed: told as plainly, with another exit code."""

    code = FAILURE


class Interrupted(Exception):
    """The work stopped because a signal asked for it, and everything needed to go on is saved. Raised on all ranks."""

    shared = True


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main()` and leave with its exit code (None is OK); errors of the user are printed without a traceback.

    UserError leaves with 2, RunFailed with 1, Interrupted and Ctrl-C with 75, a closed output pipe quietly; any other
    exception keeps its traceback and leaves with 1.
    """
    try:
        code = main() or OK
        sys.stdout.flush()
    except UserError as error:
        report(error)
        code = error.code
    except (Interrupted, KeyboardInterrupt) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"interrupted{f': {error}' if str(error) else ''}", file=sys.stderr, flush=True)
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has left. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    raise SystemExit(code)


def report(error: UserError) -> None:
    """Print a UserError; under torchrun with the rank, and once per node when all ranks raise the same one."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and error.shared and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(1)  # torchrun ends all ranks as soon as one leaves: let the one that speaks go first
        return
    who = f"[rank {os.environ.get('RANK', '0')}] " if several and not error.shared else ""
    print(f"{who}error: {error}", file=sys.stderr, flush=True)
