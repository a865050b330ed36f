"""MPI, through mpi4py where that is installed: how the ranks that `mpirun` started find each other.

When a rank dies after MPI_Init and before MPI_Finalize, MPI ends all ranks; with MPICH that lasts until the process
ends. So a rank of the extraction uses MPI only in a child process, which has ended before the rank does anything.
"""

from __future__ import annotations

import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vqa_embeddings.base.child_processes import follow_parent, start_child
from vqa_embeddings.base.console import remind_while_waiting
from vqa_embeddings.errors import InputError, one_line

OPEN_MPI, MPICH = "Open MPI", "MPICH"  # families: the ranks of a launcher need a library of its family
MEETING_SECONDS = 600  # for all ranks to start a Python, from a busy file system


class NoMPI(Exception):
    """Why the ranks of a launch cannot find each other through MPI, and what to do, as half a sentence for the user."""


def load_mpi(family: str | None) -> Any:
    """mpi4py's `MPI`, not yet initialized, with a library of the given family: the other's would end the process.

    Raises:
        NoMPI: mpi4py, or such a library, is not installed; or no MPI has started the ranks.
    """
    if family is None:
        raise NoMPI("no MPI has started the ranks; use mpirun, or srun --mpi=pmix")
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter where there is no MPI library
        raise NoMPI(
            f"mpi4py cannot be loaded ({one_line(error)}); pip install mpi4py beside the launcher's MPI"
        ) from None
    library = MPI.Get_library_version()
    if ("Open MPI" in library) != (family == OPEN_MPI):
        found = " ".join(re.split("[,\n]", library)[0].split())
        raise NoMPI(f"mpi4py has loaded {found}, the launcher is {family}'s; name its libmpi.so with MPI4PY_LIBMPI")
    return MPI


def begin_mpi(family: str | None, rank: int, size: int) -> Any:
    """mpi4py's `MPI`, initialized by all ranks of the launch. Either all of them succeed or none.

    Raises:
        NoMPI: as `load_mpi`; or MPI's ranks are not the launch's.
    """
    mpi = load_mpi(family)
    mpi.Init_thread()
    ranks = mpi.COMM_WORLD.allgather((rank, size))
    if ranks != [(number, len(ranks)) for number in range(len(ranks))]:
        mpi.Finalize()
        raise NoMPI(
            f"MPI finds {len(ranks)} rank(s) where the launcher has started {size}; load the launcher's own MPI"
        )
    return mpi


@contextmanager
def remind_from_child(rank: int, size: int) -> Iterator[None]:
    """A block that begins MPI, while a child process of the first two ranks prints that they wait for the others.

    It takes a process, as no thread of this one runs while MPI begins.
    """
    if rank > 1:
        yield
        return
    child = start_child(print_reminders, rank, size)
    try:
        yield
    finally:
        child.kill()
        child.wait()


def print_reminders(rank: int, size: int, parent: int) -> None:
    """The child process of `remind_from_child`."""
    follow_parent(signal.SIGKILL, parent)
    remind_while_waiting(rank, lambda: f"the other ranks of {size} to begin MPI", time.sleep)


def agree_on_key(family: str, rank: int, size: int) -> str | None:
    """A name that all ranks of this launch share with no other launch; None where MPI cannot find the ranks.

    Raises:
        InputError: MPI is installed and failed, so that the other ranks may have come to another result.
    """
    # MPICH's launcher talks to its ranks through a descriptor that they inherit.
    streams = {"close_fds": False, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    child = start_child(print_key, family, rank, size, **streams)
    try:
        said, _ = child.communicate(timeout=MEETING_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        raise InputError(
            f"rank {rank} waited {MEETING_SECONDS} s for the other {size - 1} ranks to begin MPI; "
            "see whether all of them have started, and begin again"
        ) from None
    if child.returncode:
        raise InputError(
            f"rank {rank} could not begin MPI (status {child.returncode}, MPI's own message is above); "
            "repair it, or take mpi4py out of the environment: the ranks do without"
        )
    found = re.search(r"^mpi-[0-9a-f]{16}$", said.decode(errors="replace"), re.MULTILINE)
    return found and found[0]


def print_key(family: str, rank: int, size: int, parent: int) -> None:
    """The child process of `agree_on_key`: prints rank 0's key, or nothing."""
    follow_parent(signal.SIGKILL, parent)  # or MPICH would wait for other ranks forever, and mpirun for this process
    try:
        mpi = begin_mpi(family, rank, size)
    except NoMPI as reason:
        if rank == 0:
            print(f"a run that goes on is shared less evenly without MPI: {reason}", file=sys.stderr)
        return
    print(mpi.COMM_WORLD.bcast(f"mpi-{secrets.token_hex(8)}"))
    mpi.Finalize()
