"""Decode processes, seen from a rank: a picture that crashes or hangs a decoder fails its own rows, not the run.

`decode_worker` is what such a process runs.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

from PIL import Image

from vqa_embeddings.base.child_processes import start_child
from vqa_embeddings.data.decode import damaged_picture
from vqa_embeddings.data.decode_options import MAX_MEGAPIXELS, DecodeOptions
from vqa_embeddings.data.decode_worker import ANSWER, REQUEST, STEP_DONE, serve
from vqa_embeddings.data.picture_limits import set_truncated
from vqa_embeddings.errors import SAME_COMMAND, PictureUnreadable, StorageError

START_SECONDS = 600.0  # in which a thousand ranks import from one file server
OPEN_SECONDS = 120.0  # for reading a picture, where a file server may be busy, and again for decoding it
SLICE_SECONDS = 0.5  # of which these are counted: while a job is suspended, only the current slice passes
# Of address space for pictures of 178.9 megapixels: 30 bytes a pixel. JPEG 2000 with transparency takes 26.
MEMORY_BYTES = 5 << 30
TRIES = 2  # a process may also have been killed because the machine has run out of memory
PAUSES = (1.0, 10.0)  # seconds before another try to start one, where there are too many or too little memory


class DecodePool:
    """Opens pictures like `decode.open_picture`, in one decode process for each thread that calls it."""

    def __init__(self, decode_options: DecodeOptions | None = None) -> None:
        self._decode_options = decode_options or DecodeOptions()
        self._local = threading.local()

    def __call__(self, path: Path) -> Image.Image:
        """The picture as an RGB image.

        Raises:
            PictureUnreadable: as `open_picture`; or the picture has ended its process twice, or takes too long.
            StorageError: no process can be started, or the file server does not answer.
        """
        for _ in range(TRIES):
            process = getattr(self._local, "process", None)
            try:
                process = self._local.process = process or _start(self._decode_options)
                return process.decode(path)
            except DecoderDied as died:
                self._local.process = None
                reason = died
                if isinstance(died, DecoderHung):
                    break
        if isinstance(reason, DecoderNotStarted):
            raise StorageError(f"{reason}; correct that, and {SAME_COMMAND}")
        raise damaged_picture(path, str(reason))


class DecoderDied(Exception):
    """The process has ended while it opened a picture; the message says how."""


class DecoderHung(DecoderDied):
    """The process was killed because it took too long."""


class DecoderNotStarted(DecoderDied):
    """The process has ended before it got a picture."""


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
    """One decode process and the pipes to it."""

    def __init__(self, decode_options: DecodeOptions) -> None:
        """Start it, and wait until it is ready.

        Raises:
            OSError: no process can be started.
            DecoderNotStarted: it has ended at once.
            StorageError: it takes too long.
        """
        answers, answers_of_child = os.pipe()  # not its standard output, on which any module may print
        self._answers = os.fdopen(answers, "rb", buffering=0)
        try:
            self._process = start_child(
                serve,
                memory_for(decode_options),
                decode_options.max_megapixels,
                decode_options.show_truncated,
                answers_of_child,
                pass_fds=[answers_of_child],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        finally:
            os.close(answers_of_child)
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        assert self._process.stdin is not None
        self._requests = self._process.stdin
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            try:
                self._read(len(STEP_DONE), START_SECONDS)
            except DecoderHung:
                raise StorageError(
                    f"the process that opens pictures has not started within {START_SECONDS:.0f} s; "
                    f"repair the file server of the Python environment, and {SAME_COMMAND}"
                ) from None
            except DecoderDied:
                lines = stderr.read().decode(errors="replace").strip().splitlines() or [self._exit_status()]
                raise DecoderNotStarted(f"the process that opens pictures ends at its start ({lines[-1]})") from None

    def decode(self, path: Path) -> Image.Image:
        """The picture as an RGB image.

        Raises:
            PictureUnreadable: no image can be made of it.
            DecoderDied: by this picture, or for another reason.
            DecoderHung: likewise.
            StorageError: its file cannot be read in time.
        """
        name = os.fsencode(path)
        try:
            self._requests.write(REQUEST.pack(len(name)) + name)
            self._requests.flush()
        except OSError:  # it ended before this picture
            raise DecoderDied(f"the process that opens pictures has ended ({self._exit_status()})") from None
        try:
            self._read(len(STEP_DONE), OPEN_SECONDS)
        except DecoderHung:
            raise StorageError(
                f"{path} has not been read within {OPEN_SECONDS:.0f} s; repair its file server, and {SAME_COMMAND}"
            ) from None
        good, truncated, *numbers = ANSWER.unpack(self._read(ANSWER.size, OPEN_SECONDS))
        if not good:
            length, errno = numbers
            raise PictureUnreadable(self._read(length, OPEN_SECONDS).decode(), errno or None)
        width, height = numbers
        pixels = self._read(width * height * 3, OPEN_SECONDS)
        return set_truncated(Image.frombytes("RGB", (width, height), pixels), truncated)

    def _read(self, count: int, seconds: float) -> bytearray:
        """Read `count` bytes of the answer. Kill the process if it sends nothing for `seconds`."""
        data = bytearray(count)
        left = memoryview(data)
        while left:
            if not any(self._poll.poll(1000 * SLICE_SECONDS) for _ in range(round(seconds / SLICE_SECONDS))):
                self._process.kill()
                raise DecoderHung(f"it has not been opened within {seconds:.0f} s")
            received = self._answers.readinto(left)
            if not received:
                raise DecoderDied(f"it ends the process that opens it ({self._exit_status()})")
            left = left[received:]
        return data

    def _exit_status(self) -> str:
        status = self._process.wait()
        return signal.Signals(-status).name if status < 0 else f"status {status}"


def memory_for(decode_options: DecodeOptions) -> int:
    """The bytes of address space in which the largest picture that is accepted can be opened."""
    return round(MEMORY_BYTES * max(1.0, decode_options.max_megapixels / MAX_MEGAPIXELS))
