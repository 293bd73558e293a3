"""DCNv2, AutoInt and FT-Transformer on Criteo-like rows, built on `ctr_kernels`."""

from .autoint import AutoInt
from .base import CTRModel
from .dcnv2 import DCNv2
from .ft_transformer import FTTransformer

MODELS: dict[str, type[CTRModel]] = {"dcnv2": DCNv2, "autoint": AutoInt, "ft": FTTransformer}

__all__ = ["MODELS", "AutoInt", "CTRModel", "DCNv2", "FTTransformer"]
