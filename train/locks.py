"""Who writes what: locks that end with the process that holds them, and the removal of what dead processes left.

All are `flock` locks: the kernel drops them when their holder ends, however it ends, and they mean the same in every
container of a machine, where process numbers repeat. On a file system without them nothing can be known: nothing is
removed there, and `lock` says so.
"""

import errno
import fcntl
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from .errors import UserError

UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def lock(file: Path, what: str) -> Iterator[None]:
    """Within: this process alone works on `what`; UserError that names the process which does already.

    `file` is made, holds the process's number and host, and goes afterwards. The lock of a dead process is taken over.
    """
    try:
        descriptor = _locked(file)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise UserError(f"cannot write {file}: {error.strerror or error}") from error
        click.echo(f"{file.parent} is on a file system without locks: see that no other process works on {what}",
                   err=True)
        yield
        return
    if descriptor is None:
        raise UserError(f"{what} is in use by {_holder(file)}: wait until it has ended, or choose another directory")
    try:
        with suppress(OSError):  # a full disk: then others learn no more than that the lock is held
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0]).name})".encode())
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _holder(file: Path) -> str:
    try:
        return file.read_text() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def _locked(path: Path) -> int | None:
    """A descriptor of the file, made if need be, that holds its lock; None where another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who held it before has removed it meanwhile


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the name still stands for the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process chooses, for what will be renamed to `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def claim(temporary: Path, *, directory: bool = False) -> int:
    """Make a temporary file or directory that `sweep` leaves alone until `release`, or the end of this process.

    Returns: what `release` takes.
    """
    while True:
        if directory:
            temporary.mkdir(parents=True)
        else:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return descriptor
            if not isinstance(error, BlockingIOError):
                raise
        else:
            if _is_still(temporary, descriptor):
                return descriptor
        os.close(descriptor)  # another process swept it before it was locked
        remove(temporary)


def release(claimed: int | None) -> None:
    """End a claim; None: there is none."""
    if claimed is not None:
        os.close(claimed)


def sweep(path: Path) -> None:
    """Remove the temporary files and directories of `path` whose processes are dead."""
    for found in path.parent.iterdir():
        if found.name.startswith(f".{path.name}.") and found.name.endswith(".tmp"):
            _remove_if_dead(found)


def sweep_all(directory: Path) -> None:
    """`sweep` of every file in the directory."""
    for found in directory.iterdir():
        if found.name.startswith(".") and found.name.endswith(".tmp"):
            _remove_if_dead(found)


def _remove_if_dead(temporary: Path) -> None:
    try:
        descriptor = os.open(temporary, os.O_RDONLY)
    except OSError:  # gone, or not ours to open
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # in use, or nothing can be known here
        return
    else:
        remove(temporary)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """The file, or the directory with all that is in it, if it is there and may be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # another user's: it stays, and is in nobody's way
            path.unlink(missing_ok=True)
