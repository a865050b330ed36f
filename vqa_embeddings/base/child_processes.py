"""Python processes that this one starts: how they begin, which signals reach them, and how they end with it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # each asks a run to stop
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def start_child(function: Callable[..., object], *arguments: object, **settings: Any) -> subprocess.Popen[bytes]:
    """A Python process that calls `function(*arguments, parent)`, where `parent` is this process, for `follow_parent`.

    It blocks the signals that ask a run to stop. A scheduler sends them to every process, but only this one is to end
    the child.

    Args:
        function: of a module; its arguments must be equal to what their `repr` evaluates to.
        settings: of `subprocess.Popen`.
    """
    call = f"{function.__name__}{(*arguments, os.getpid())!r}"
    code = f"import sys; sys.path[:] = {sys.path!r}; from {function.__module__} import {function.__name__}; {call}"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the child inherits this
    try:
        return subprocess.Popen([sys.executable, "-c", code], **settings)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent(number: signal.Signals, parent: int) -> None:
    """Have the kernel send this process a signal once its parent has ended, for whatever reason. Only on Linux.

    Args:
        number: the signal.
        parent: process id of the parent, which may have ended before this call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)
