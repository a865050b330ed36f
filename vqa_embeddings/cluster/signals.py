"""How the process is asked to stop, and how it ends: the first signal sets a flag, a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from vqa_embeddings.base.child_processes import STOP_SIGNALS

# A scheduler signals the ranks and their launcher, which passes it on: one request, not two. Under `accelerate launch`
# the second was measured to come within 25 ms, with eight busy processes a core too; daemons in between take longer.
REPEAT_SECONDS = 1.0


class StopFlag:
    """Set by TERM, INT, USR1 or USR2; the loop looks at it between units of work. A second request ends the process.

    So does the first, with status 0, until `defer` is called: while the model is loaded there is nothing to lose.

    A thread of its own reads the signals. Python calls handlers in the main thread, between two of its instructions: a
    long computation there would delay a second signal, and make an echo of the first look like a second one.
    """

    SIGNALS = STOP_SIGNALS

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0
        self._reported = False
        self._deferred = False

    def install(self, on_early_stop: Callable[[str], object]) -> StopFlag:
        """Handle the signals from here on. Before this call they end the process at once, which loses nothing either.

        Args:
            on_early_stop: is called with the signal's name if the first request comes before `defer` and so ends the
                process.
        """
        self._on_early_stop = on_early_stop
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)  # a launcher may pass its own mask on
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        signal.set_wakeup_fd(sender)
        threading.Thread(target=self._listen, args=(receiver,), name="signals", daemon=True).start()
        for number in self.SIGNALS:
            signal.signal(number, lambda number, frame: None)
        return self

    def defer(self) -> None:
        """From here on there are rows to lose: a request only sets the flag."""
        self._deferred = True

    def requested(self) -> bool:
        """Whether the run was asked to stop."""
        return self.signal is not None

    def is_new(self) -> bool:
        """Whether the run was asked to stop, and this method has not returned true before."""
        if self._reported or not self.requested():
            return False
        self._reported = True
        return True

    def _listen(self, receiver: int) -> None:
        while True:
            for number in os.read(receiver, 64):
                self._receive(number)

    def _receive(self, number: int) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number).name, time.monotonic()
            if not self._deferred:
                try:
                    self._on_early_stop(self.signal)
                finally:  # also where the message cannot be written
                    os._exit(0)
        elif time.monotonic() - self._since > REPEAT_SECONDS:
            os._exit(128 + number)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end the process with its status, or with 1 and the traceback after an error.

    It ends without the interpreter's own clean-up. That waits for every thread, even one that reads a picture from a
    dead file server, and a signal during it changes the status. Until a `StopFlag` is installed, INT ends the process
    without a traceback, as TERM does.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # a full disk; a stream that was closed before the start is None
            stream.flush()
    os._exit(status)
