"""Files that are either whole or not there: written to a temporary name, synced, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError
from .locks import claim, release, remove, sweep, temporary_name

CHECKSUM, FORMAT = "checksum", "format"  # entries of a record beside its content


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`; synced and renamed onto it on success, removed on any failure.

    What killed processes have left of `path` is removed first. OSError (full disk, no permission, ...) becomes a
    UserError that names `path`.
    """
    path, claimed = Path(path), None
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: {'Is a directory' if path.is_dir() else 'it is no regular file'}")
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        claimed = claim(temporary)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        remove(temporary)
        release(claimed)


def write_json(path: Path | str, content: Any) -> None:
    """`content` as indented JSON, atomically; NaN is refused (ValueError)."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_record(path: Path | str, kind: str, content: dict[str, Any]) -> None:
    """`write_json` with the format in front, "ctr-kernels <kind>", and a checksum of all entries at the end."""
    record = {FORMAT: f"ctr-kernels {kind}", **content}
    write_json(path, {**record, CHECKSUM: _checksum(record)})


def read_record(path: Path | str, kind: str) -> dict[str, Any]:
    """The content that `write_record` wrote; UserError for a file that is missing, damaged or something else.

    kind: a name and a version, "run 2".
    """
    record = read_json(path)
    found = record.get(FORMAT) if isinstance(record, dict) else None
    if found != f"ctr-kernels {kind}":
        raise UserError(f"{path} is " + (f"of the format {found!r}, not" if found else "damaged or of another version: "
                                         "it does not name the format") + f" 'ctr-kernels {kind}'")
    if record.pop(CHECKSUM, None) != _checksum(record):
        raise UserError(f"{path} is damaged, or was changed by hand: its checksum is that of another content")
    del record[FORMAT]
    return record


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def copy_file(source: Path | str, path: Path | str) -> None:
    """A copy of the file, atomically; UserError where `source` cannot be read or `path` not be written."""
    try:
        with open(source, "rb") as file, atomic_path(path) as temporary, open(temporary, "wb") as copy:
            shutil.copyfileobj(file, copy)
    except FileNotFoundError:
        raise UserError(f"{source} does not exist") from None


def link_file(source: Path | str, path: Path | str) -> None:
    """The same file under a second name, atomically; a copy where the file system has no links."""
    temporary = temporary_name(Path(path))
    try:
        os.link(source, temporary)
    except OSError:
        copy_file(source, path)
        return
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # a rename between two names of one file leaves both


def read_json(path: Path | str) -> Any:
    """The parsed JSON file; UserError when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def check_sha256(path: Path, expected: str, words: str) -> None:
    """UserError, "PATH has the SHA-256 ..., " and `words`, where the file's bytes have another one."""
    if (found := sha256(path)) != expected:
        raise UserError(f"{path} has the SHA-256 {found}, {words}")


def sha256(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def made_directory(path: Path, what: Path | str) -> Iterator[None]:
    """Within: the directory for `what` is there, made with its parents; those made go again if nothing is put there."""
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {what}: {error.strerror or error}") from error
    try:
        yield
    finally:
        for parent in made:
            if not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()


def check_directory(directory: Path) -> None:
    """UserError where files that do not belong there would make prepared data something else."""
    if (directory / "artifacts.json").exists() and not (directory / "config.json").exists():
        raise UserError(f"{directory} holds prepared data, which are replaced whole: choose another directory")
