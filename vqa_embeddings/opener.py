"""A process that opens pictures: one that crashes or hangs a decoder costs its own rows, and not the run.

Decoders are C code that reads what strangers have made. The process knows no torch and no other picture, has
little memory, hears no signal, and ends with the rank that has started it.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from vqa_embeddings.errors import PictureUnreadable
from vqa_embeddings.images import TOO_LARGE, open_picture, unreadable
from vqa_embeddings.signals import follow_parent, start_child

OPEN_SECONDS = 120.0  # for one picture, in which also a busy file server answers
MEMORY_BYTES = 4 << 30  # of address space: Pillow refuses pictures whose pixels would take more than a quarter of it
TRIES = 2  # an opener may also have been ended by a machine without memory, which is not its picture's fault
ANSWER = struct.Struct("!?qq")  # whether it is a picture; its width and height, or the length of the reason and 0


class Openers:
    """Opens pictures like `open_picture`, for each thread in a process of its own."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def __call__(self, path: Path) -> Image.Image:
        """The picture as RGB.

        Raises:
            PictureUnreadable: as `open_picture`; or the picture has ended its opener twice, or takes too long.
        """
        for _ in range(TRIES):
            opener = getattr(self._of_thread, "opener", None)
            if opener is None:
                opener = self._of_thread.opener = Opener()
            try:
                return opener.open(path)
            except OpenerDied as died:
                self._of_thread.opener = None
                reason = died
                if isinstance(died, OpenerHung):
                    break
        raise unreadable(path, str(reason))


class OpenerDied(Exception):
    """The process has ended while it opened a picture, and how."""


class OpenerHung(OpenerDied):
    """The process was ended, as it took too long."""


class Opener:
    """The process, and the pipes to it."""

    def __init__(self) -> None:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = start_child(serve, MEMORY_BYTES, **streams)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout.fileno()
        self._ready = select.poll()
        self._ready.register(self._answers, select.POLLIN)

    def open(self, path: Path) -> Image.Image:
        """The picture as RGB.

        Raises:
            PictureUnreadable: it is none.
            OpenerDied: of this picture, or of something else.
            OpenerHung: likewise.
        """
        deadline = time.monotonic() + OPEN_SECONDS
        name = os.fsencode(path)
        try:
            self._requests.write(struct.pack("!q", len(name)) + name)
            self._requests.flush()
        except OSError:  # it ended before this picture
            raise OpenerDied(f"the process that opens pictures has ended ({self._wait()})") from None
        good, *size = ANSWER.unpack(self._read(ANSWER.size, deadline))
        if not good:
            raise PictureUnreadable(self._read(size[0], deadline).decode())
        width, height = size
        return Image.frombytes("RGB", (width, height), self._read(width * height * 3, deadline))

    def _read(self, count: int, deadline: float) -> bytearray:
        data = bytearray(count)
        room = memoryview(data)
        while room:
            if not self._ready.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                self._process.kill()
                raise OpenerHung(f"it has not been opened within {OPEN_SECONDS:.0f} s")
            got = os.readv(self._answers, [room])
            if not got:
                raise OpenerDied(f"it ends the process that opens it ({self._wait()})")
            room = room[got:]
        return data

    def _wait(self) -> str:
        status = self._process.wait()
        return signal.Signals(-status).name if status < 0 else f"status {status}"


def serve(memory: int, parent: int) -> None:
    """What the process does, with so many bytes: open one picture after another, until there are no more."""
    follow_parent(signal.SIGKILL, parent)
    with suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while head := requests.read(8):
        path = Path(os.fsdecode(requests.read(*struct.unpack("!q", head))))
        _answer(answers, path)
        answers.flush()


def _answer(answers: BinaryIO, path: Path) -> None:
    try:
        picture = open_picture(path)
        pixels = picture.tobytes()
    except (PictureUnreadable, MemoryError) as failure:
        if isinstance(failure, MemoryError):
            failure = unreadable(path, TOO_LARGE)
        reason = str(failure).encode()
        answers.write(ANSWER.pack(False, len(reason), 0) + reason)
        return
    answers.write(ANSWER.pack(True, *picture.size))
    answers.write(pixels)
