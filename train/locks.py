"""Who writes what: locks that end with the process that holds them, and the removal of what dead processes left.

All are `flock` locks: the kernel drops them when their holder ends, however it ends, and they mean the same in every
container of a machine, where process numbers repeat. On a file system without them nothing can be known: nothing is
removed there, and `lock` says so.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from .errors import UserError

# Errors of file systems without locks; EBADF: NFS, of a directory, which cannot be open for writing.
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
HOLDER = "process "  # how the content of a lock file begins
LONGEST = 220  # bytes of a name that a temporary one holds; file systems have 255 for the whole
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp", re.DOTALL)


@contextmanager
def lock(file: Path, what: str) -> Iterator[Callable[[], None]]:
    """Within: this process alone works on `what`; UserError that names the process which does already.

    `file` is made, holds the process's number and host, and goes afterwards. The lock of a dead process is taken over.
    What is yielded raises UserError once `file` has been moved or removed, with what the process works on.
    """
    try:
        if file.exists() and file.stat().st_size and not _content(file).startswith(HOLDER):
            raise UserError(f"{file} is in the way, and no lock of this program: move it, or choose another directory")
        descriptor = _locked(file)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise UserError(f"cannot write {file}: {error.strerror or error}") from error
        click.echo(f"{file.parent} is on a file system without locks: see that no other process works on {what}",
                   err=True)
        yield lambda: None
        return
    if descriptor is None:
        raise UserError(f"{what} is in use by {_holder(file)}: wait until it has ended, or choose another directory")

    def check() -> None:
        if not _is_still(file, descriptor):
            raise UserError(f"{what} was moved or removed while this process worked there: nothing more is written")

    try:
        with suppress(OSError):  # a full disk: then others learn no more than that the lock is held
            os.truncate(descriptor, 0)
            name = Path(sys.argv[0]).name
            os.write(descriptor, f"{HOLDER}{os.getpid()} on {socket.gethostname()} ({name})".encode(errors="replace"))
        yield check
    finally:
        if _is_still(file, descriptor):
            file.unlink()
        os.close(descriptor)


def wait_for(file: Path, what: str) -> None:
    """Return once no other process holds the lock; a line on stderr if that takes its time."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:  # there is none, or `lock` will say what is wrong with it
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            click.echo(f"waiting for {_holder(file)}, which works on {what}", err=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # no locks here: `lock` says so
            return
    finally:
        os.close(descriptor)


def _content(file: Path) -> str:
    try:
        return file.read_text(errors="replace")[:200]
    except OSError:
        return HOLDER


def _holder(file: Path) -> str:
    found = _content(file)
    return found if len(found) > len(HOLDER) else "another process"


def _locked(path: Path) -> int | None:
    """A descriptor of the file, made if need be, that holds its lock; None where another process holds it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's, whose process may be dead
            descriptor = os.open(path, os.O_RDONLY)
            if _taken(descriptor):
                os.close(descriptor)
                return None
            path.unlink()
            os.close(descriptor)
            continue
        try:
            if _taken(descriptor):
                os.close(descriptor)
                return None
        except OSError:
            os.close(descriptor)
            raise
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)  # who held it before has removed it meanwhile


def _taken(descriptor: int) -> bool:
    """Whether another process holds the lock; otherwise this one holds it from now on."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the name still stands for the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def short_name(path: Path) -> str:
    """The name of `path`, or for one that leaves no room a checksum of it."""
    name = os.fsencode(path.name)
    return path.name if len(name) <= LONGEST else hashlib.sha256(name).hexdigest()


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process chooses, for what will be renamed to `path`."""
    return path.with_name(f".{short_name(path)}.{secrets.token_hex(8)}.tmp")


def claim(temporary: Path, *, directory: bool = False) -> int:
    """Make a temporary file or directory that `sweep` leaves alone until `release`, or the end of this process.

    Returns: what `release` takes.
    """
    while True:
        if directory:
            temporary.mkdir(parents=True)
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            if not _taken(descriptor) and _is_still(temporary, descriptor):
                return descriptor
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # another process swept it before it was locked
        remove(temporary)


def release(claimed: int | None) -> None:
    """End a claim; None: there is none."""
    if claimed is not None:
        os.close(claimed)


def sweep(path: Path) -> None:
    """Remove the temporary files and directories of `path` whose processes are dead."""
    sweep_all(path.parent, short_name(path))


def sweep_all(directory: Path, name: str | None = None) -> None:
    """`sweep` of every file in the directory, or of the one with that `short_name`."""
    for found in directory.iterdir():
        match = _TEMPORARY.fullmatch(found.name)
        if match is not None and name in (None, match[1]):
            _remove_if_dead(found)


def _remove_if_dead(temporary: Path) -> None:
    for flags in (os.O_RDWR, os.O_RDONLY):  # NFS locks what is open for writing; directories cannot be
        try:
            descriptor = os.open(temporary, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # a directory, or gone, or not ours to open
            continue
        with suppress(OSError):  # no locks here: nothing can be known
            if not _taken(descriptor):
                remove(temporary)
        os.close(descriptor)
        return


def remove(path: Path) -> None:
    """The file, or the directory with all that is in it, if it is there and may be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # another user's: it stays, and is in nobody's way
            path.unlink(missing_ok=True)
