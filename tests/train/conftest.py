"""Small prepared data for the tests of data, training and evaluation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ctr_train.data.prepare import prepare
from ctr_train.data.synth import write_synthetic

ROWS, HASH_BINS, GOLD_ROWS = 6000, 1000, 200


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of 6,000 synthetic rows as `ctr-data` makes it; gold rows are the first 200 validation rows."""
    directory = tmp_path_factory.mktemp("data")
    write_synthetic(directory / "raw.tsv", rows=ROWS, seed=1)
    prepare([directory / "raw.tsv"], directory / "prepared", hash_bins=HASH_BINS, valid_ratio=0.1,
            gold_rows=GOLD_ROWS, missing_indicator=False, on_bad_line="error", progress=None)
    return directory / "prepared"


@pytest.fixture
def write_split() -> Callable[..., dict[str, np.ndarray]]:
    """(path, rows, ...) -> the arrays of an Arrow file of random rows, in the form of a prepared split."""

    def write(path: Path, rows: int, *, num_dense: int = 13, batch_rows: int = 65_536, seed: int = 0,
              compression: str | None = None) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        arrays = {
            "label": generator.integers(0, 2, rows).astype(np.uint8),
            "dense": generator.random((rows, num_dense), dtype=np.float32),
            "sparse": generator.integers(0, 2**31 - 1, (rows, 26)).astype(np.int32),
        }
        schema = pa.schema([("label", pa.uint8()), ("dense", pa.list_(pa.float32(), num_dense)),
                            ("sparse", pa.list_(pa.int32(), 26))])
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.ipc.new_file(str(path), schema, options=options) as writer:
            for start in range(0, rows, batch_rows):
                part = slice(start, start + batch_rows)
                columns = [pa.array(arrays["label"][part])]
                columns += [pa.FixedSizeListArray.from_arrays(pa.array(arrays[name][part].ravel()), width)
                            for name, width in (("dense", num_dense), ("sparse", 26))]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        return arrays

    return write
