"""What holds for all tests: signals are heard, also where they were started with some ignored (nohup, a job behind &).

An ignored signal is inherited by every program that a test starts, and a shell cannot undo that.
"""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
