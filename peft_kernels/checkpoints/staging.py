"""A folder that is written beside its destination and moved there once it is whole: a kill leaves no half of it.

`.NAME.partial/` beside the destination has `inputs.json`, which says what the folder is made of, and the folder itself.
A second run with the same inputs goes on with the files that are there; one with others starts anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..ops._arguments import refuse

INPUTS, FOLDER, REPLACED, UNFINISHED = "inputs.json", "folder", "replaced", "unfinished"


class Staging:
    """The folder while it is written; a context, which leaves what is there if the process or the disk fails.

    Args:
        destination: the folder's place in the end.
        inputs: all that the content follows from, as JSON can hold it.
        overwrite: whether a folder that is at the destination is replaced. It needs to have `marker`.
        marker: a file that says that a folder is of this kind.

    Raises:
        FileExistsError: there is something at the destination, which is not to be replaced.
        BlockingIOError: another process writes to the same destination.
    """

    def __init__(self, destination: Path, inputs: Any, overwrite: bool, marker: str) -> None:
        check_destination(destination, overwrite, marker)
        self.destination = destination
        self.partial = _partial(destination)
        self.folder = self.partial / FOLDER
        self.inputs = json.dumps(inputs, sort_keys=True, indent=1)

    def __enter__(self) -> Staging:
        self._lock = self._make_and_lock()
        replaced = self.partial / REPLACED
        if replaced.is_dir() and not self.destination.exists():  # a kill between the two moves
            replaced.rename(self.destination)
        path = self.partial / INPUTS
        is_same = path.is_file() and path.read_text() == self.inputs
        for one in self.partial.iterdir():
            if not (is_same and one.name in (INPUTS, FOLDER)):
                shutil.rmtree(one) if one.is_dir() else one.unlink()
        if not is_same:
            temporary = self.partial / UNFINISHED
            temporary.write_text(self.inputs)
            _sync(temporary)
            temporary.rename(path)
        self.folder.mkdir(exist_ok=True)
        return self

    def _make_and_lock(self) -> int:
        """The file descriptor of `partial`; made anew where `_clear_after_a_kill` removes it meanwhile, as empty."""
        while True:
            self.partial.mkdir(parents=True, exist_ok=True)
            try:
                lock = _lock(self.partial)
            except FileNotFoundError:
                continue
            except BlockingIOError:
                raise BlockingIOError(f"destination: got {self.destination}, to which another process writes") from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self.partial)):
                    return lock
            os.close(lock)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None or issubclass(kind, ValueError):  # with which a second run would fail as well
                shutil.rmtree(self.partial)
            else:
                (self.partial / UNFINISHED).unlink(missing_ok=True)
        finally:
            os.close(self._lock)

    def has(self, name: str) -> bool:
        """Whether a file of tensors is there, and whole."""
        try:
            with safe_open(self.folder / name, "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Writes a file of tensors.

        Raises:
            OSError: it can't be written, as on a full disk.
        """
        temporary = self.partial / UNFINISHED
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            number = next(
                (n for n in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) if os.strerror(n) in str(error)), errno.EIO
            )
            raise OSError(number, f"{os.strerror(number)}: {error}", str(self.folder / name)) from None
        self._finish(name)

    def write(self, name: str, content: str) -> None:
        (self.partial / UNFINISHED).write_text(content)
        self._finish(name)

    def copy(self, source: Path, name: str) -> None:
        """Copies a file, also one that is a link."""
        shutil.copyfile(source, self.partial / UNFINISHED)
        self._finish(name)

    def _finish(self, name: str) -> None:
        temporary, path = self.partial / UNFINISHED, self.folder / name
        temporary.chmod(self.partial.stat().st_mode & 0o666)  # safetensors' files are for their owner alone
        _sync(temporary)
        path.parent.mkdir(exist_ok=True)
        temporary.rename(path)

    def commit(self) -> None:
        """Moves the folder to its destination."""
        _sync(self.folder)
        replaced = self.partial / REPLACED
        if self.destination.exists():
            self.destination.rename(replaced)
        try:
            self.folder.rename(self.destination)
        except OSError:
            if replaced.exists():
                replaced.rename(self.destination)
            raise
        _sync(self.destination.parent)


def _partial(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.partial"


def _lock(partial: Path) -> int:
    """A file descriptor, which holds the lock until it is closed.

    Raises:
        BlockingIOError: another process has the lock.
    """
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _clear_after_a_kill(destination: Path) -> None:
    """Removes what is left where a process was killed after the move, or while it removed this itself."""
    partial = _partial(destination)
    if not destination.exists() or not partial.is_dir() or (partial / FOLDER).exists():
        return
    try:
        lock = _lock(partial)
    except (FileNotFoundError, BlockingIOError):
        return  # the process goes on, and removes it itself
    try:
        if not (partial / FOLDER).exists():
            shutil.rmtree(partial)
    finally:
        os.close(lock)


def check_destination(destination: Path, overwrite: bool, marker: str, read: Iterable[Path] = ()) -> None:
    """
    Args:
        read: the folders that the content is made of.

    Raises:
        FileExistsError: there is something at the destination, which is not to be replaced.
        ValueError: the destination has no name, or holds a folder that is read.
    """
    for folder in read:
        if folder.resolve().is_relative_to(destination.resolve()):
            refuse("destination", f"{destination}, which holds {folder}", "another folder than what is read")
    if destination.name in ("", ".."):
        refuse("destination", repr(str(destination)), "a folder with a name")
    _clear_after_a_kill(destination)
    if not destination.exists() and not destination.is_symlink():
        return
    if not destination.is_dir() or destination.is_symlink():
        raise FileExistsError(f"destination: got {destination}, which is no folder")
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"destination: got {destination}, which exists, wanted a new one or overwrite=True")
    if not (destination / marker).is_file():
        raise FileExistsError(f"destination: got {destination}, which has no {marker}, wanted what may be replaced")


def _sync(path: Path) -> None:
    """Waits until the disk has it, so that no file with its final name is empty after a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
