"""The examples in the docstrings of ctr_kernels and ctr_models run and give what they show."""

import doctest
import importlib
import importlib.util
from pathlib import Path

import pytest

import ctr_kernels
import ctr_models


def module_names() -> list[str]:
    names = []
    for package in (ctr_kernels, ctr_models):
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            names.append(".".join([package.__name__, *(part for part in parts if part != "__init__")]))
    return names


@pytest.mark.parametrize("name", module_names())
def test_doctests(name):
    if ".triton" in name and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("thing", ["field_attention", "ffn", "EmbeddingTable", "SparseSGD", "TransformerLayer",
                                   "FTTransformer", "AutoInt", "DCNv2"])
def test_the_public_interface_has_examples(thing):
    owner = ctr_kernels if hasattr(ctr_kernels, thing) else ctr_models
    documented = doctest.DocTestFinder(recurse=False).find(getattr(owner, thing), thing)
    assert sum(len(found.examples) for found in documented) > 0
