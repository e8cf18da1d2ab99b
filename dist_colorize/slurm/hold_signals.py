"""Starts a command with the stop signals held back until it is ready for them.

    python hold_signals.py COMMAND...

A signal that a cluster sends while Python still starts would end it, or be lost. A held one waits, through exec too,
until the program has set its handlers and takes the signals up (stopping.StopFlag does).
"""

import os
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2})
os.execvp(sys.argv[1], sys.argv[1:])
