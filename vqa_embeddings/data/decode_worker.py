"""A decode process, seen from inside: it makes images of picture files, one after another, until there are no more.

Decoders are C code that reads files of unknown origin. This process imports no torch, has a limit on its memory,
ignores the signals that ask a run to stop, and ends with the rank that has started it.

A request is `REQUEST`, the length of the path, and the path. The answer is `STEP_DONE` once the file is read, then
`ANSWER`, then the pixels, RGB of 8 bits, or the reason why there are none.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from vqa_embeddings.base.child_processes import follow_parent
from vqa_embeddings.data.decode import TOO_LARGE, damaged_picture, decode, read_file
from vqa_embeddings.data.decode_options import DecodeOptions
from vqa_embeddings.data.picture_limits import is_truncated
from vqa_embeddings.errors import PictureUnreadable

STEP_DONE = b"+"  # once when the process is ready, and once for each picture when its file is read
REQUEST = struct.Struct("!q")
# Whether there is an image, and whether it is truncated. Then its width and height, or the reason's length and errno.
ANSWER = struct.Struct("!??qq")


def serve(memory: int, max_megapixels: float, show_truncated: bool, answers: int, parent: int) -> None:
    """Answer the requests on standard input until it is closed.

    Args:
        memory: limit on the address space of this process, in bytes.
        max_megapixels, show_truncated: those of `DecodeOptions`.
        answers: descriptor of the pipe for the answers.
        parent: process id of the rank.
    """
    follow_parent(signal.SIGKILL, parent)
    with suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # from here on only decoders write to it, and nobody reads that
    decode_options = DecodeOptions(max_megapixels, show_truncated)
    requests = sys.stdin.buffer
    with open(answers, "wb") as stream:
        _finish_step(stream)
        while head := requests.read(REQUEST.size):
            (length,) = REQUEST.unpack(head)
            _answer(stream, Path(os.fsdecode(requests.read(length))), decode_options)
            stream.flush()


def _answer(stream: BinaryIO, path: Path, decode_options: DecodeOptions) -> None:
    try:
        try:
            data = read_file(path)
        finally:
            _finish_step(stream)
        image = decode(path, data, decode_options)
        pixels = image.tobytes()
    except (PictureUnreadable, MemoryError) as error:
        failure = error if isinstance(error, PictureUnreadable) else damaged_picture(path, TOO_LARGE)
        reason = str(failure).encode(errors="backslashreplace")
        stream.write(ANSWER.pack(False, False, len(reason), failure.errno or 0) + reason)
        return
    stream.write(ANSWER.pack(True, is_truncated(image), *image.size))
    stream.write(pixels)


def _finish_step(stream: BinaryIO) -> None:
    stream.write(STEP_DONE)
    stream.flush()
