"""How a rank is asked to stop, and how it ends.

TERM, INT, USR1 and USR2 are one request. What it does depends on when it comes:

    before `StopFlag.install`     the signal's own action ends the process; nothing has been written
    before `StopFlag.defer`       the process ends with status 0; the model is being loaded, no row has been begun
    in the loop                   what is finished is committed, the rows in hand get `app.extract.GRACE_SECONDS`, are
                                  committed too, and the process ends with status 0
    again within REPEAT_SECONDS   nothing: it is the same request by another way
    again later                   the process ends at once with 128 and the signal's number; what was committed stays

KILL leaves what was committed, and perhaps a temporary file that nobody reads.

A request reaches the ranks by way of their launcher:

    torchrun, accelerate          TERM is passed on. USR1, USR2 and KILL end the launcher, as any signal does
                                  `accelerate launch` with one process: then the kernel sends TERM. After a signal
                                  the launcher's own status is that of a failure
    srun, mpirun                  USR1 is passed on; TERM kills the ranks at once, or after a second
    the files of launch/          `app.supervise` passes each of the four on as the one that its launcher passes on,
                                  then counts the rows that are left, and puts a Slurm job back into the queue. Status
                                  0, or 1 where `app.requeue` could not, or gave up
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from vqa_embeddings.base.child_processes import STOP_SIGNALS, follow_parent
from vqa_embeddings.cluster.world import World

# A scheduler signals the ranks and their launcher, which passes it on: one request, not two. Under `accelerate launch`
# the second was measured to come within 25 ms, with eight busy processes a core too; daemons in between take longer.
REPEAT_SECONDS = 1.0
ACCELERATE = {"accelerate", "accelerate-launch", "accelerate.commands.launch"}  # what its command line begins with


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


def stop_with_launcher(world: World) -> None:
    """Have the kernel ask this rank to stop when its launcher ends, where that may leave its ranks running."""
    if world.launcher == "torchrun" or _is_child_of_accelerate():
        follow_parent(signal.SIGTERM, os.getppid())


def _is_child_of_accelerate() -> bool:
    """Whether `accelerate launch` has started this one process itself, as it does without torchrun for one."""
    try:
        line = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:  # no Linux
        return False
    return not ACCELERATE.isdisjoint(Path(word).name for word in line[:3])


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
