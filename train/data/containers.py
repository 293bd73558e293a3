"""Files that are not text, recognised by their first bytes: names lie, and skipped lines would hide them."""

BOM = b"\xef\xbb\xbf"  # of UTF-8
HEAD_BYTES = 512  # a header of tar
_MAGIC = {
    b"PK\x03\x04": "a zip archive", b"PK\x05\x06": "a zip archive", b"\x1f\x8b": "a gzip file", b"BZh": "a bzip2 file",
    b"\xfd7zXZ\x00": "an xz file", b"\x28\xb5\x2f\xfd": "a zstd file", b"\x04\x22\x4d\x18": "an lz4 file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!": "a rar archive", b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file", b"ORC": "an ORC file", b"\x89HDF": "an HDF5 file", b"Obj\x01": "an Avro file",
    b"\x93NUMPY": "a numpy file", b"SQLite format 3": "an SQLite database", b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text", b"070701": "a cpio archive", b"070702": "a cpio archive", b"070707": "a cpio archive",
    b"\xc7\x71": "a cpio archive", b"!<arch>\n": "an ar archive", b"\x1f\x9d": "a compress file",
}


def container_of(head: bytes) -> str | None:
    """What a file is that begins so, in words; None for what may be text.

    head: its first HEAD_BYTES bytes or more, or all of them.

    >>> container_of(b"PK\\x03\\x04"), container_of(b"1\\t2\\t")
    ('a zip archive', None)
    """
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if _is_tar(head[:HEAD_BYTES]):
        return "a tar archive"
    return "binary" if head.count(b"\0", 0, HEAD_BYTES) > len(head[:HEAD_BYTES]) // 10 else None


def _is_tar(header: bytes) -> bool:
    """Whether it is a header of tar, of any age: the sum of its bytes stands in it, in octal digits."""
    if len(header) < HEAD_BYTES:
        return False
    try:
        said = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return said == sum(header) - sum(header[148:156]) + 8 * ord(" ")
