"""`ctr-data inspect`: what a prepared directory holds, and whether its files are still those that were written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import check_sha256
from .artifacts import FILE, Artifacts
from .prepare import SPLITS
from .protocol import DENSE_NAMES, SPARSE_NAMES

_SHOWN = (  # entries of artifacts.json that the report needs
    *((table, split) for table in ("counts", "label_rate") for split in SPLITS),
    *(("outputs", split, key) for split in SPLITS for key in ("file", "bytes", "sha256")),
    *(("fields", name, "missing") for name in (*DENSE_NAMES, *SPARSE_NAMES)),
    *(("fields", name, key) for name in SPARSE_NAMES for key in ("distinct_ids", "distinct_values", "collisions")),
)


def inspect(directory: Path | str) -> dict[str, Any]:
    """The artifacts of a prepared directory, its files verified against their checksums.

    Raises UserError where artifacts.json is missing or damaged, or a file is missing or differs.
    """
    artifacts = Artifacts.load(directory)
    found = artifacts.to_dict()
    for keys in _SHOWN:
        _check_entry(found, keys, directory)
    for expected in (*(artifacts.outputs[name] for name in SPLITS), *([artifacts.values] if artifacts.values else [])):
        path = Path(directory) / expected["file"]
        if not path.exists():
            raise UserError(f"{path} does not exist, though artifacts.json names it")
        check_sha256(path, expected["sha256"], f"artifacts.json says {expected['sha256']}: the file was changed; "
                     "prepare it again")
    return found


def _check_entry(content: Any, keys: tuple[str, ...], directory: Path | str) -> None:
    """UserError unless content[key][key]... is there."""
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{Path(directory) / FILE} has no entry {'.'.join(keys)}: it is damaged; prepare again")
        content = content[key]


def report(found: dict[str, Any]) -> str:
    """The artifacts as text: settings, splits, fields."""
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    history = f"history of {found['folds']} folds" if found["folds"] else "history in the order of the file"
    table = found["values"]["table_rows"] if found["min_count"] > 1 else found["hash_bins"]
    yield (f"prepared for recipe {found['recipe'] or '-'}: protocol {found['protocol']} version {found['version']}, "
           f"{found['hash_bins']:,} hash bins, {'with' if found['missing_indicator'] else 'no'} missing indicators, "
           f"split {found['split']}, min count {found['min_count']}, {history if found['history'] else 'no history'}; "
           f"a table of {table:,} rows")
    for source in found["sources"]:
        yield f"source {source['file']}: {source['rows']:,} lines, {source['bytes']:,} bytes"
    if found["skipped_lines"]:
        yield f"{found['skipped_lines']:,} bad lines skipped, the first: {found['first_skipped']}"
    yield ""
    yield f"{'split':<6}{'rows':>13}{'label rate':>12}{'bytes':>16}  {'best logloss':>12}{'best AUC':>10}  checksum"
    for name in SPLITS:
        rate, best = found["label_rate"][name], (found["best_possible"] or {}).get(name)
        yield (f"{name:<6}{found['counts'][name]:>13,}{'-' if rate is None else f'{rate:.4f}':>12}"
               f"{found['outputs'][name]['bytes']:>16,}  " +
               (f"{best['logloss']:>12.4f}{best['auc']:>10.4f}" if best else f"{'-':>12}{'-':>10}") + "  ok")
    yield ""
    yield f"{'field':<6}{'missing':>9}{'distinct ids':>14}{'values (est.)':>15}{'collisions (est.)':>19}"
    for name in DENSE_NAMES:
        yield f"{name:<6}{found['fields'][name]['missing']:>9.1%}"
    for name in SPARSE_NAMES:
        field = found["fields"][name]
        yield (f"{name:<6}{field['missing']:>9.1%}{field['distinct_ids']:>14,}{field['distinct_values']:>15,}"
               f"{field['collisions']:>19,}")
