"""Files that appear whole or not at all: write aside, fsync, rename, fsync the folder."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vqa_embeddings.errors import SAME_COMMAND, StorageError

TEMPORARY = ".tmp"
DAMAGED = ".damaged"


def publish(path: Path, write: Callable[[Path], Any], *, replace: bool = True) -> bool:
    """Let `write` make a temporary file beside `path`, and give it its final name once it is on the disk.

    Readers see the old file or the new one, never half of one. With `replace=False` a file that is already
    there stays, also against a writer at the same moment.

    Returns:
        Whether the file under that name is the one that was made.
    Raises:
        StorageError: the disk is full, or gone, or does not take the file.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        write(temporary)
        sync(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
        sync(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}); what was committed before is safe, "
            f"make room or repair the disk, and {SAME_COMMAND}"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: here two writers at once could both succeed
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(temporary, path)


def publish_text(path: Path, text: str, *, replace: bool = True) -> bool:
    """`publish` for a short text, encoded as UTF-8, its line ends unchanged."""
    # A surrogate that stands for a byte of a file's name has no UTF-8. JSON reads its escape back.
    data = text.encode(errors="backslashreplace")
    return publish(path, lambda temporary: temporary.write_bytes(data), replace=replace)


def publish_json(path: Path, value: Any, *, replace: bool = True) -> bool:
    """`publish` for a JSON document that people read too."""
    return publish_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", replace=replace)


@contextmanager
def new_csv(path: Path, header: Sequence[str]) -> Iterator[Callable[[Sequence[str]], object]]:
    """Begin a CSV file in UTF-8 with `\\n` line ends. Yields the function that adds a row."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        usual = csv.writer(stream, lineterminator="\n")
        quoting = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)

        def add(row: Sequence[str]) -> object:
            # Up to Python 3.12 the usual writer does not quote a carriage return: readers would end the line there.
            return (quoting if any("\r" in field for field in row) else usual).writerow(row)

        add(header)
        yield add


def set_aside(path: Path) -> None:
    """Rename a damaged file, so that what it held is missing again. Nothing is deleted, nothing overwritten."""
    target = path.with_name(path.name + DAMAGED)
    if target.exists():
        target = path.with_name(f"{path.name}.{secrets.token_hex(4)}{DAMAGED}")
    with suppress(FileNotFoundError):  # another merge was faster
        path.rename(target)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A block that reads a file.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it cannot be read, which does not mean that it is damaged.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(*error.args) from None
    except OSError as error:
        raise _not_read(path, error) from error


def list_folder(folder: Path) -> list[Path]:
    """The entries of a folder by name; none if it does not exist. `Path.glob` would take an unreadable one for empty.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        with reading(folder):
            return [folder / name for name in sorted(os.listdir(folder))]
    except FileNotFoundError:
        return []


def sha256(path: Path) -> str:
    """SHA-256 of the whole file, in hex. Raises what `reading` raises."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 20))
    with reading(path), open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content.

    Raises:
        StorageError: the source cannot be read.
        OSError: the target cannot be written.
    """
    try:
        descriptor = os.open(source, os.O_RDONLY)
    except OSError as error:
        raise _not_read(source, error) from error
    with open(descriptor, "rb") as stream, open(target, "wb") as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)


def sync_and_hash(path: Path) -> str:
    """`sync` and `sha256`, at the same time, of a file that has just been written. Returns the hash."""
    with ThreadPoolExecutor(1) as disk:
        synced = disk.submit(sync, path)
        digest = sha256(path)
        synced.result()  # raises the error of `sync`
    return digest


def _not_read(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be read ({error.strerror or error}); repair the disk, and {SAME_COMMAND}")
