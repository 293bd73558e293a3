"""On a GPU: every check of gpu_checks.py at full size."""

import pytest
import torch
from gpu_checks import GROUPS, Unavailable, full

CHECKS = {name: check for group in ("parity", "parity others", "training") for name, check in GROUPS[group].items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible to torch")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str) -> None:
    torch.manual_seed(0)
    try:
        print(CHECKS[name](full()))
    except Unavailable as error:
        pytest.skip(str(error))
