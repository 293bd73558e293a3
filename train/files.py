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


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`; synced and renamed onto it on success, removed on any failure.

    OSError (full disk, no permission, ...) becomes a UserError that names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
        if temporary.exists():
            temporary.unlink()


def write_json(path: Path | str, content: Any) -> None:
    """`content` as indented JSON, atomically; NaN is refused (ValueError)."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def copy_file(source: Path | str, path: Path | str) -> None:
    """A copy of the file, atomically; UserError where `source` cannot be read or `path` not be written."""
    try:
        with open(source, "rb") as file, atomic_path(path) as temporary, open(temporary, "wb") as copy:
            shutil.copyfileobj(file, copy)
    except FileNotFoundError:
        raise UserError(f"{source} does not exist") from None


def link_file(source: Path | str, path: Path | str) -> None:
    """The same file under a second name, atomically; a copy where the file system has no links."""
    try:
        with atomic_path(path) as temporary:
            os.link(source, temporary)
    except UserError:
        copy_file(source, path)


def read_json(path: Path | str) -> Any:
    """The parsed JSON file; UserError when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def sha256(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
