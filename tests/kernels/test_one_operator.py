"""An operation is one operator, in as many files as docs/adding-an-operation.md says."""

import re
from pathlib import Path

import pytest
import torch

from ctr_kernels.backend import OPERATIONS
from ctr_kernels.library import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "adding-an-operation.md").read_text()
# Files of an operation that name it, by the name of the operator and by that of its folder.
OPERATION, FOLDER = "low_rank_cross", "cross"


def listed(title: str) -> list[str]:
    """The files of the table under a heading that states their number."""
    heading, table = re.search(rf"^## {title}: (\d+)[^\n]*\n(.*?)(?=^## )", GUIDE, re.MULTILINE | re.DOTALL).groups()
    files = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(files) == int(heading)
    return [file.replace("NAME", FOLDER) for file in files]


def test_its_own_files_are_those_of_the_guide() -> None:
    own = listed("Its own files")
    assert [file for file in own if not (ROOT / file).exists()] == []
    patterns = [f"ctr_kernels/{FOLDER}/*.py", f"csrc/{FOLDER}*", f"tests/kernels/test_triton_{FOLDER}*.py",
                f"bench/{FOLDER}*.py", f"docs/kernels/{FOLDER}*"]
    assert sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)) == sorted(own)


def test_it_is_registered_where_the_guide_says() -> None:
    places, own = set(listed("Where it is registered")), set(listed("Its own files"))
    found = set()
    for path in [*ROOT.glob("ctr_kernels/**/*"), *ROOT.glob("csrc/*"), ROOT / "pyproject.toml", ROOT / "setup.py",
                 ROOT / "tests/test_kernel_parity.py", ROOT / "tests/kernels/test_operators.py"]:
        if path.suffix not in (".py", ".inc", ".cpp", ".h", ".toml"):
            continue
        if re.search(rf"{OPERATION}|{FOLDER}_(forward|backward)|ctr_kernels\.{FOLDER}\b", path.read_text()):
            found.add(str(path.relative_to(ROOT)))
    assert found - own == places


def test_every_operator_has_one_schema_and_one_line_of_the_registry() -> None:
    names = [line.partition("(")[0] for line in SCHEMAS.splitlines() if line and not line.startswith("#")]
    assert len(names) == len(set(names)) and not [name for name in names if re.search("triton|native", name)]
    assert set(OPERATIONS) <= set(names)
    defined = {name.removeprefix("ctr::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
               if name.startswith("ctr::")}
    assert defined == set(names)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_backend_of_an_operation_is_a_key_of_its_operator(operation: str) -> None:
    keys = ["CPU"] * bool(OPERATIONS[operation].native) + ["CUDA"] * bool(OPERATIONS[operation].triton)
    for key in keys:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ctr::{operation}", key), key
