"""The transformer layer that FT-Transformer and AutoInt stack, composed of this package's operations."""

from typing import Any

import torch
from torch import nn

from ..attention import field_attention_packed
from ..backend import CHOICES, BackendUnavailable, resolve
from ..checks import product_dtype
from ..ffn import ffn
from ..ffn.reference import ACTIVATIONS, activate
from ..fusion import like_input, replaced_method
from ..philox import as_seed, check_dropout
from . import native
from .halves import ffn_half

NORM_CHOICES = ("pre", "post")


class TransformerLayer(nn.Module):
    """Attention and FFN with residuals, pre- or post-norm (Vaswani et al. 2017; pre-norm: Xiong et al. 2020).

    norm="pre":  x + attention(LN(x)), then x + ffn(LN(x)).
    norm="post": LN(x + attention(x)), then LN(x + ffn(x)).

    Args:
        dim: D, width of a token.
        num_heads: H, a divisor of D.
        ffn_dim: hidden width of the FFN.
        activation: "gelu" (erf), "gelu_tanh" or "relu".
        dropout: applied to the attention weights and to the FFN's hidden units while training.
        kernels: "auto", "eager", "native" or "triton".
        device, dtype: of the parameters, as in `nn.Linear`.

    A half of the layer (norm, attention, residual; norm, FFN, residual) is one operation where its children are what
    this constructor makes: `nn.Linear` and `nn.LayerNorm` with their own parameters and without hooks, of sizes that
    the kernels take. Children that were replaced, hooked or changed otherwise are called. A printed layer says of
    each half whether it is fused, or why it is not.

    forward: [B, F, D] -> [B, F, D].

    >>> TransformerLayer(64, 4, 256)(torch.randn(2, 27, 64)).shape
    torch.Size([2, 27, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        norm: str = "pre",
        activation: str = "gelu",
        dropout: float = 0.0,
        kernels: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_choices(norm, activation)
        check_dropout(dropout, "dropout")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible into num_heads={num_heads}")
        if kernels not in CHOICES:
            raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(CHOICES)}")
        self.num_heads, self.norm, self.activation = num_heads, norm, activation
        self.dropout, self.kernels = dropout, kernels
        self.dim = dim
        self.attention_norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.ffn_norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.ffn_in = nn.Linear(dim, ffn_dim, device=device, dtype=dtype)
        self.ffn_out = nn.Linear(ffn_dim, dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, F, D] -> [B, F, D]."""
        if x.dim() != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}; [B, F, D] is needed")
        _check_choices(self.norm, self.activation)  # a program may set them at any time
        dropout_p = self.dropout if self.training else 0.0
        check_dropout(dropout_p)
        backend = resolve(self.kernels, x.device, "field_attention", product_dtype(x))
        calls_attention, calls_ffn = self._calls(backend, x)
        pre, fused = self.norm == "pre", _fused(backend)
        if calls_attention is None:
            x = fused.fused_attention(self, x, dropout_p)
        else:
            x = x + like_input("out", self._attention(self.attention_norm(x) if pre else x, dropout_p), x)
        # Post-norm, Triton's attention half ends with a norm, as its FFN half does; the native FFN half begins with it.
        normed = calls_attention is None if backend == "triton" else calls_ffn is None
        if not (pre or normed):
            x = self.attention_norm(x)
        if calls_ffn is None:
            x = fused.fused_ffn(self, x, dropout_p)
        else:
            x = x + like_input("ffn_out", self._ffn(self.ffn_norm(x) if pre else x, dropout_p), x)
        return x if pre or (backend == "triton" and calls_ffn is None) else self.ffn_norm(x)

    def _calls(self, backend: str, x: torch.Tensor) -> tuple[str | None, str | None]:
        """Why the children of the attention half and of the FFN half are called for x [B, F, D]; None: it is fused."""
        if backend == "eager":
            reason = f"kernels={self.kernels!r} is eager here"
            return reason, reason
        fused = _fused(backend)
        return (replaced_method(self, "_attention", _ATTENTION) or fused.why_attention_is_not_fused(self, x),
                replaced_method(self, "_ffn", _FFN) or fused.why_ffn_is_not_fused(self, x))

    def _attention(self, x: torch.Tensor, dropout_p: float) -> torch.Tensor:
        """out(attention(qkv(x)))."""
        attended = field_attention_packed(self.qkv(x), num_heads=self.num_heads, dropout_p=dropout_p,
                                          kernels=self.kernels)
        out: torch.Tensor = self.out(attended)
        return out

    def _ffn(self, x: torch.Tensor, dropout_p: float) -> torch.Tensor:
        """ffn_out(dropout(activation(ffn_in(x)))), in one operation where that is the same."""
        if resolve(self.kernels, x.device, "ffn", product_dtype(x)) != "eager" and ffn_half(self, x, None) is None:
            return ffn(x, self.ffn_in.weight, self.ffn_in.bias, self.ffn_out.weight, self.ffn_out.bias,
                       activation=self.activation, dropout_p=dropout_p, kernels=self.kernels)
        hidden = self.ffn_in(x)
        seed = as_seed(None, hidden.device) if dropout_p > 0.0 else None
        out: torch.Tensor = self.ffn_out(activate(hidden, self.activation, dropout_p, seed))
        return out

    def extra_repr(self) -> str:
        return (f"num_heads={self.num_heads}, norm={self.norm!r}, activation={self.activation!r}, "
                f"dropout={self.dropout}, kernels={self.kernels!r}\n" + self._fusion())

    def _fusion(self) -> str:
        """Of each half "fused", or why its children are called, for one token in the dtype of the parameters."""
        parameter = next(self.parameters(), torch.empty(0))
        x = torch.empty(0, 1, self.dim, dtype=parameter.dtype, device=parameter.device)
        try:
            backend = resolve(self.kernels, x.device, "field_attention", product_dtype(x))
        except (BackendUnavailable, TypeError, ValueError) as error:
            return f"runs not here: {error}"
        reasons = zip(("attention", "FFN"), self._calls(backend, x), strict=True)
        return "\n".join(f"{half}: " + (f"fused ({backend})" if reason is None else f"children are called: {reason}")
                         for half, reason in reasons)


# What the fused halves stand in for: a subclass or a program may have others.
_ATTENTION, _FFN = TransformerLayer._attention, TransformerLayer._ffn


def _check_choices(norm: str, activation: str) -> None:
    if norm not in NORM_CHOICES:
        raise ValueError(f"norm={norm!r}: choose pre or post")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}")


def _fused(backend: str) -> Any:
    """The module that has the fused halves of a backend; native's where there are none."""
    if backend == "triton":
        from . import triton

        return triton
    return native
