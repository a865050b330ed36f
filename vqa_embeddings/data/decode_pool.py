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
from dataclasses import astuple
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from vqa_embeddings.cluster.signals import follow_parent, start_child
from vqa_embeddings.data.decode import TOO_LARGE, decode, read_file, unreadable
from vqa_embeddings.data.decode_options import MAX_MEGAPIXELS, DecodeOptions
from vqa_embeddings.data.picture_limits import is_truncated, mark
from vqa_embeddings.errors import SAME_COMMAND, PictureUnreadable, StorageError

START_SECONDS = 600.0  # in which a thousand ranks import from one file server
OPEN_SECONDS = 120.0  # for reading a picture, which a busy file server takes its time for, and again for decoding it
SLICE_SECONDS = 0.5  # by which these are counted: while a job is suspended, only the slice under way passes
# Of address space, where 178.9 megapixels are the most: 30 bytes a pixel. JPEG 2000 with transparency takes 26.
MEMORY_BYTES = 5 << 30
TRIES = 2  # an opener may also have been ended by a machine without memory, which is not its picture's fault
PAUSES = (1.0, 10.0)  # seconds until another process may be started, where there are too many or too little memory
STEP_DONE = b"+"  # said once at the start, and of each picture once its file is read
# Whether it is a picture, and one that is cut off; its width and height, or the reason's length and number.
ANSWER = struct.Struct("!??qq")


class DecodePool:
    """Opens pictures like `open_picture`, for each thread in a process of its own."""

    def __init__(self, decode_options: DecodeOptions | None = None) -> None:
        self._viewing = decode_options or DecodeOptions()
        self._of_thread = threading.local()

    def __call__(self, path: Path) -> Image.Image:
        """The picture as RGB.

        Raises:
            PictureUnreadable: as `open_picture`; or the picture has ended its opener twice, or takes too long.
            StorageError: no process can be started, or the file server does not answer.
        """
        for _ in range(TRIES):
            opener = getattr(self._of_thread, "opener", None)
            try:
                opener = self._of_thread.opener = opener or _start(self._viewing)
                return opener.open(path)
            except DecoderDied as died:
                self._of_thread.opener = None
                reason = died
                if isinstance(died, DecoderHung):
                    break
        if isinstance(reason, DecoderNotStarted):
            raise StorageError(f"{reason}; mend that, and {SAME_COMMAND}")
        raise unreadable(path, str(reason))


class DecoderDied(Exception):
    """The process has ended while it opened a picture, and how."""


class DecoderHung(DecoderDied):
    """The process was ended, as it took too long."""


class DecoderNotStarted(DecoderDied):
    """The process has ended before there was a picture."""


def _start(decode_options: DecodeOptions) -> DecodeProcess:
    for pause in PAUSES:
        with suppress(OSError):
            return DecodeProcess(decode_options)
        time.sleep(pause)
    try:
        return DecodeProcess(decode_options)
    except OSError as error:
        raise StorageError(
            f"no process can be started that opens pictures ({error.strerror}); "
            f"end what else runs here, or ask for less (--num-workers), and {SAME_COMMAND}"
        ) from None


class DecodeProcess:
    """The process, and the pipes to it."""

    def __init__(self, decode_options: DecodeOptions) -> None:
        """Start it, and wait until it is ready.

        Raises:
            OSError: no process can be started.
            DecoderNotStarted: it has ended at once.
            StorageError: it takes too long.
        """
        ear, mouth = os.pipe()  # and not its standard output, on which any module may print
        self._answers = os.fdopen(ear, "rb", buffering=0)
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        try:
            settings = memory_for(decode_options), *astuple(decode_options)
            self._process = start_child(serve, *settings, mouth, pass_fds=[mouth], **streams)
        finally:
            os.close(mouth)
        self._ready = select.poll()
        self._ready.register(self._answers, select.POLLIN)
        assert self._process.stdin is not None and self._process.stderr is not None
        self._requests = self._process.stdin
        with self._process.stderr as complaints:
            try:
                self._read(len(STEP_DONE), START_SECONDS)
            except DecoderHung:
                raise StorageError(
                    f"the process that opens pictures has not started within {START_SECONDS:.0f} s; "
                    f"mend the file server of the Python environment, and {SAME_COMMAND}"
                ) from None
            except DecoderDied:
                said = complaints.read().decode(errors="replace").strip().splitlines() or [self._end()]
                raise DecoderNotStarted(f"the process that opens pictures ends at its start ({said[-1]})") from None

    def open(self, path: Path) -> Image.Image:
        """The picture as RGB.

        Raises:
            PictureUnreadable: it is none.
            DecoderDied: of this picture, or of something else.
            DecoderHung: likewise.
            StorageError: its file cannot be read in time.
        """
        name = os.fsencode(path)
        try:
            self._requests.write(struct.pack("!q", len(name)) + name)
            self._requests.flush()
        except OSError:  # it ended before this picture
            raise DecoderDied(f"the process that opens pictures has ended ({self._end()})") from None
        try:
            self._read(len(STEP_DONE), OPEN_SECONDS)
        except DecoderHung:
            raise StorageError(
                f"{path} has not been read within {OPEN_SECONDS:.0f} s; mend its file server, and {SAME_COMMAND}"
            ) from None
        good, truncated, *size = ANSWER.unpack(self._read(ANSWER.size, OPEN_SECONDS))
        if not good:
            length, number = size
            raise PictureUnreadable(self._read(length, OPEN_SECONDS).decode(), number or None)
        width, height = size
        pixels = self._read(width * height * 3, OPEN_SECONDS)
        return mark(Image.frombytes("RGB", (width, height), pixels), truncated)

    def _read(self, count: int, seconds: float) -> bytearray:
        """So many bytes, between which the process may be silent for so long."""
        data = bytearray(count)
        room = memoryview(data)
        while room:
            if not any(self._ready.poll(1000 * SLICE_SECONDS) for _ in range(round(seconds / SLICE_SECONDS))):
                self._process.kill()
                raise DecoderHung(f"it has not been opened within {seconds:.0f} s")
            got = self._answers.readinto(room)
            if not got:
                raise DecoderDied(f"it ends the process that opens it ({self._end()})")
            room = room[got:]
        return data

    def _end(self) -> str:
        status = self._process.wait()
        return signal.Signals(-status).name if status < 0 else f"status {status}"


def memory_for(decode_options: DecodeOptions) -> int:
    """Bytes of address space in which the largest picture can be opened."""
    return round(MEMORY_BYTES * max(1.0, decode_options.max_megapixels / MAX_MEGAPIXELS))


def serve(memory: int, max_megapixels: float, show_truncated: bool, answers: int, parent: int) -> None:
    """What the process does, with so many bytes: open one picture after another, until there are no more.

    Args:
        max_megapixels, show_truncated: those of a `DecodeOptions`.
        answers: descriptor of the pipe that takes the answers.
    """
    follow_parent(signal.SIGKILL, parent)
    with suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # from here on only decoders complain, and nobody listens
    decode_options = DecodeOptions(max_megapixels, show_truncated)
    requests = sys.stdin.buffer
    with open(answers, "wb") as stream:
        _finish_step(stream)
        while head := requests.read(8):
            _answer(stream, Path(os.fsdecode(requests.read(*struct.unpack("!q", head)))), decode_options)
            stream.flush()


def _answer(stream: BinaryIO, path: Path, decode_options: DecodeOptions) -> None:
    try:
        try:
            data = read_file(path)
        finally:
            _finish_step(stream)
        picture = decode(path, data, decode_options)
        pixels = picture.tobytes()
    except (PictureUnreadable, MemoryError) as error:
        failure = error if isinstance(error, PictureUnreadable) else unreadable(path, TOO_LARGE)
        reason = str(failure).encode(errors="backslashreplace")
        stream.write(ANSWER.pack(False, False, len(reason), failure.errno or 0) + reason)
        return
    stream.write(ANSWER.pack(True, is_truncated(picture), *picture.size))
    stream.write(pixels)


def _finish_step(stream: BinaryIO) -> None:
    stream.write(STEP_DONE)
    stream.flush()
