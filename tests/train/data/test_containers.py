"""Archives and other binary files where text is needed, told by their first bytes."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_lines import raw_lines

from ctr_train.data.containers import container_of
from ctr_train.data.prepare import prepare
from ctr_train.data.raw import Source
from ctr_train.errors import UserError

TEXT = "".join(line + "\n" for line in raw_lines(60)).encode()


def tar(**members: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def old_tar() -> bytes:
    """Without the magic of POSIX: the header's sum is all there is."""
    content = bytearray(tar(a=TEXT))
    content[257:265] = bytes(8)
    content[148:156] = b"        "
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.tsv", TEXT)
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"x": [1]}), file)
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(1000))
    return file.getvalue()


CONTAINERS = {
    "tar": (tar(train=TEXT, test=TEXT), "a tar archive"), "tar of old": (old_tar(), "a tar archive"),
    "zip": (zipped(), "a zip archive"), "bzip2": (bz2.compress(TEXT), "a bzip2 file"),
    "xz": (lzma.compress(TEXT), "an xz file"), "parquet": (parquet(), "a Parquet file"),
    "zstd": (pa.compress(TEXT, "zstd", asbytes=True), "a zstd file"), "gzip": (gzip.compress(TEXT), "a gzip file"),
    "numpy": (array(), "a numpy file"), "UTF-16": (TEXT.decode().encode("utf-16"), "UTF-16 text"),
    "cpio": (b"070707000000000000100644" + TEXT, "a cpio archive"),
    "UTF-16 without mark": (TEXT.decode().encode("utf-16-be"), "binary"), "zeros": (bytes(4096), "binary"),
}


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_named_and_nothing_of_it_is_skipped(tmp_path: Path, name: str, packed: bool,
                                                           on_bad_line: str) -> None:
    content, said = CONTAINERS[name]
    if name == "gzip" and not packed:
        pytest.skip("that is what is read")
    (tmp_path / "rows.gz").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=rf"rows\.gz is {said}{' inside gzip' if packed else ''}; plain text is needed"):
        prepare([tmp_path / "rows.gz"], tmp_path / "out", on_bad_line=on_bad_line)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.gz"]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    for name, content in (("with", b"\xef\xbb\xbf" + TEXT), ("without", TEXT)):
        (tmp_path / f"{name}.tsv").write_bytes(content)
        prepare([tmp_path / f"{name}.tsv"], tmp_path / name, on_bad_line="skip")
    for file in ("train.arrow", "valid.arrow"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


@pytest.mark.parametrize("content", [b"1", b"0\t\t\n", TEXT, b"ab\0" + TEXT, b"PK\t", b"\n"])
def test_text_is_no_container(content: bytes) -> None:
    assert container_of(content) is None


def test_a_short_first_read_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(old_tar())
    source = Source(tmp_path / "rows")

    class Drip(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(7)

    with pytest.raises(UserError, match="a tar archive"):
        list(source._lines(Drip(old_tar())))
