"""Which processes of this machine compute on a GPU: each claims it, and its claim ends with it, however it ends.

The launcher's variables do not tell: `srun` may give each rank a GPU of its own or all ranks the same, and another
launch may run beside this one. So a claim is a locked file, named after the GPU; the system takes the lock away. Not
seen are other users' processes, those with another folder for temporary files, and one that has not begun yet.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO


def claims_folder() -> Path:
    """Where the claims of this user's processes lie: on this machine, and in no other user's way."""
    return Path(tempfile.gettempdir()) / f"vqa-embeddings-gpus-{os.getuid()}"


class Claim:
    """This process's claim to a GPU, until it is withdrawn or the process ends.

    Args:
        folder: where claims lie; made where it is not there.
        gpu: the GPU's own name, the same in all processes whatever number they give it.
    Raises:
        OSError: no file can be locked there.
    """

    def __init__(self, folder: Path, gpu: str) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder, self._gpu = folder, gpu
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        aside = folder / f"new-{token}"
        self._file: IO[bytes] = open(aside, "wb")  # noqa: SIM115 - it stays open: the lock is the claim
        self._path = folder / f"{gpu}.{token}"
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            aside.rename(self._path)  # only now may the others see it, or they would take it for one left behind
        except OSError:
            aside.unlink()
            raise

    def count(self) -> int:
        """How many processes have claimed the GPU, this one included. Claims of processes that ended are removed."""
        others = (path for path in self._folder.glob(f"{self._gpu}.*") if path != self._path)
        return 1 + sum(map(_is_held, others))  # itself also where someone has cleared the folder

    def withdraw(self) -> None:
        """End the claim before the process does."""
        self._path.unlink(missing_ok=True)
        self._file.close()


def _is_held(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # gone in this moment, or of a file system without locks
        return False
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return False
