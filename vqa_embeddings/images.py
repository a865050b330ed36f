"""Pictures: found below the folder, shown as a viewer shows them, read ahead of the model."""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageOps

from vqa_embeddings.errors import PictureNotFound, PictureOutsideFolder, PictureUnreadable, RowFailed

K = TypeVar("K")
T = TypeVar("T")

PATIENCE = 0.1  # seconds of waiting for a picture between two looks whether to stop


def locate(folder: Path, name: str) -> Path:
    """Where the picture `name` lies below `folder`. Links inside the folder are followed, wherever they lead.

    Raises:
        PictureOutsideFolder: the name is absolute, or has a `..`.
        PictureNotFound: the name is empty, or no file is there.
    """
    if not name.strip():
        raise PictureNotFound("the row names no picture; expected a file name below --images-dir")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise PictureOutsideFolder(
            f"{name!r} leads out of the picture folder; expected a relative path below --images-dir"
        )
    path = folder / name
    try:
        found = None if stat.S_ISREG(path.stat().st_mode) else "it is not a file"
    except (OSError, ValueError) as error:  # not there, a name too long, no permission, a broken disk
        found = getattr(error, "strerror", None) or str(error)
    if found is not None:
        raise PictureNotFound(f"{name!r} cannot be found ({found}); expected a picture below --images-dir")
    return path


def open_picture(path: Path) -> Image.Image:
    """The picture as RGB, turned the way its EXIF orientation says.

    Raises:
        PictureUnreadable: the file is no whole picture of a known format.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # the decoders raise nearly every kind of error on damaged files
        reason = " ".join(str(error).replace(str(path), path.name).split()) or type(error).__name__
        raise PictureUnreadable(f"{path.name} cannot be read as a picture: {reason}") from None


def read_ahead(
    keys: Iterable[K], prepare: Callable[[K], T], workers: int, stopping: Callable[[], bool] = lambda: False
) -> Iterator[tuple[K, T | RowFailed]]:
    """`prepare(key)` for every key in order, up to `2 * workers` of them made ahead in threads.

    Once `stopping` is true there are no more, and nobody waits for one that a thread may never have done reading.

    Yields:
        The key, and what was made of it or the `RowFailed` that came instead. Any other error is raised here.
    """

    def attempt(key: K) -> T | RowFailed:
        try:
            return prepare(key)
        except RowFailed as failure:
            return failure

    if workers == 0:
        yield from ((key, attempt(key)) for key in takewhile(lambda _: not stopping(), keys))
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures")
    waiting: deque[tuple[K, Future[T | RowFailed]]] = deque()
    ahead = iter(keys)
    try:
        while True:
            while len(waiting) < 2 * workers and (key := next(ahead, None)) is not None:
                waiting.append((key, pool.submit(attempt, key)))
            if not waiting:
                return
            key, future = waiting.popleft()
            while not stopping() and not wait([future], PATIENCE).done:
                pass
            if stopping():
                return
            yield key, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
