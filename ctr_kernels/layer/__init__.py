"""The transformer layer that FT-Transformer and AutoInt stack, composed of this package's operations."""

from typing import NamedTuple

import torch
from torch import nn

from ..attention import field_attention, field_attention_packed
from ..attention.operator import supports as attention_supports
from ..backend import CHOICES, BackendUnavailable, resolve
from ..checks import product_dtype
from ..ffn import ffn
from ..ffn.operator import supports as ffn_supports
from ..ffn.reference import ACTIVATIONS, GATED, activate
from ..fusion import like_input, replaced_method
from ..philox import as_seed, check_dropout
from .halves import Norm, fused_attention, fused_ffn, why_attention_is_not_fused, why_ffn_is_not_fused

NORM_CHOICES = ("pre", "post")


class Half(NamedTuple):
    """What runs a half of a layer: a backend, as one operator, or operation by operation for the reason `composed`."""

    backend: str
    composed: str | None = None


class TransformerLayer(nn.Module):
    """Attention and FFN with residuals, pre- or post-norm (Vaswani et al. 2017; pre-norm: Xiong et al. 2020).

    norm="pre":  x + attention(LN(x)), then x + ffn(LN(x)).
    norm="post": LN(x + attention(x)), then LN(x + ffn(x)).

    Args:
        dim: D, width of a token.
        num_heads: H; without a head_dim a divisor of D.
        ffn_dim: hidden width of the FFN.
        head_dim: width of a head; None is D / H. q, k and v have H * head_dim columns each.
        norm: "pre" or "post".
        activation: "gelu" (erf), "gelu_tanh" or "relu"; gated "reglu", "geglu" (erf) or "swiglu", for which ffn_in has
            2 ffn_dim outputs (see `ffn`).
        attention_norm: False leaves out the norm before the attention; "pre" only (the first block of FT-Transformer).
        out_projection: False leaves out the projection of the heads; H * head_dim is then D.
        queries: only that many tokens, the first ones, are queries and leave the layer (1: a CLS token, in the last
            block of FT-Transformer); None: all.
        dropout: applied to the attention weights and to the FFN's hidden units while training.
        kernels: "auto", "eager", "native" or "triton".
        device, dtype: of the parameters, as in `nn.Linear`.

    A half of the layer (norm, attention, residual; norm, FFN, residual) is one operation where its children are what
    this constructor makes: `nn.Linear` and `nn.LayerNorm` with their own parameters and without hooks, of sizes that
    the kernels take. Children that were replaced, hooked or changed otherwise are called. `backends()` and a printed
    layer say of each half whether it is fused, or why it is not.

    forward: [B, F, D] -> [B, F, D], or [B, queries, D].

    >>> TransformerLayer(64, 4, 256)(torch.randn(2, 27, 64)).shape
    torch.Size([2, 27, 64])
    >>> TransformerLayer(64, 8, 170, head_dim=16, activation="reglu", queries=1)(torch.randn(2, 40, 64)).shape
    torch.Size([2, 1, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        head_dim: int | None = None,
        norm: str = "pre",
        activation: str = "gelu",
        attention_norm: bool = True,
        out_projection: bool = True,
        queries: int | None = None,
        dropout: float = 0.0,
        kernels: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_choices(norm, activation, queries)
        check_dropout(dropout, "dropout")
        if head_dim is None and (num_heads < 1 or dim % num_heads):
            raise ValueError(f"dim={dim} is not divisible into num_heads={num_heads}")
        head_dim = dim // num_heads if head_dim is None else head_dim
        width = num_heads * head_dim
        if num_heads < 1 or head_dim < 1:
            raise ValueError(f"num_heads={num_heads} of head_dim={head_dim}; at least 1 is needed")
        if not out_projection and width != dim:
            raise ValueError(f"out_projection=False: {num_heads} heads of {head_dim} have {width} columns, not "
                             f"dim={dim}")
        if not attention_norm and norm != "pre":
            raise ValueError(f"attention_norm=False: norm={norm!r} has a norm after its attention")
        if kernels not in CHOICES:
            raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(CHOICES)}")
        self.num_heads, self.norm, self.activation = num_heads, norm, activation
        self.dropout, self.kernels, self.queries = dropout, kernels, queries
        self.dim = dim
        self.attention_norm = nn.LayerNorm(dim, device=device, dtype=dtype) if attention_norm else None
        self.qkv = nn.Linear(dim, 3 * width, device=device, dtype=dtype)
        self.out = nn.Linear(width, dim, device=device, dtype=dtype) if out_projection else None
        self.ffn_norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.ffn_in = nn.Linear(dim, 2 * ffn_dim if self.gated else ffn_dim, device=device, dtype=dtype)
        self.ffn_out = nn.Linear(ffn_dim, dim, device=device, dtype=dtype)

    @property
    def gated(self) -> bool:
        """Whether ffn_in gives the two halves of a gated activation."""
        return self.activation in GATED

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, F, D] -> [B, F, D], or [B, queries, D]."""
        if x.dim() != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}; [B, F, D] is needed")
        _check_choices(self.norm, self.activation, self.queries)  # a program may set them at any time
        if self.queries is not None and self.queries > x.shape[1]:
            raise ValueError(f"queries={self.queries}: x has {x.shape[1]} tokens")
        dropout_p = self.dropout if self.training else 0.0
        check_dropout(dropout_p)
        backend = resolve(self.kernels, x.device, "field_attention", product_dtype(x))
        calls_attention, calls_ffn = self._calls(backend, x)
        pre = self.norm == "pre"
        if calls_attention is None:
            x = fused_attention(self, x, dropout_p, backend)
        else:
            residual = x if self.queries is None else x[:, :self.queries]
            normed = self.attention_norm(x) if pre and self.attention_norm is not None else x
            x = residual + like_input("out", self._attention(normed, dropout_p), residual)
        # Post-norm, Triton's attention half ends with a norm, as its FFN half does; the native FFN half begins with it.
        normed_by_a_half = calls_attention is None if backend == "triton" else calls_ffn is None
        if not (pre or normed_by_a_half):
            x = self.attention_norm(x)  # type: ignore[misc]  # post-norm layers have one
        if calls_ffn is None:
            x = fused_ffn(self, x, dropout_p, backend)
        else:
            x = x + like_input("ffn_out", self._ffn(self.ffn_norm(x) if pre else x, dropout_p), x)
        return x if pre or (backend == "triton" and calls_ffn is None) else self.ffn_norm(x)

    def _calls(self, backend: str, x: torch.Tensor) -> tuple[str | None, str | None]:
        """Why the children of the attention half and of the FFN half are called for x [B, F, D]; None: it is fused."""
        if backend == "eager":
            reason = f"kernels={self.kernels!r} is eager here"
            return reason, reason
        return (replaced_method(self, "_attention", _ATTENTION) or why_attention_is_not_fused(self, x, backend),
                replaced_method(self, "_ffn", _FFN) or why_ffn_is_not_fused(self, x, backend))

    def _attention(self, x: torch.Tensor, dropout_p: float) -> torch.Tensor:
        """out(attention(qkv(x)))."""
        qkv, settings = self.qkv(x), {"num_heads": self.num_heads, "dropout_p": dropout_p, "kernels": self.kernels}
        if self.queries is None:
            attended = field_attention_packed(qkv, **settings)
        else:
            q, k, v = qkv.chunk(3, dim=-1)
            attended = field_attention(q[:, :self.queries], k, v, **settings)
        out: torch.Tensor = attended if self.out is None else self.out(attended)
        return out

    def _ffn(self, x: torch.Tensor, dropout_p: float) -> torch.Tensor:
        """ffn_out(dropout(activation(ffn_in(x)))), in one operation where that is the same."""
        backend = resolve(self.kernels, x.device, "ffn", product_dtype(x))
        if backend != "eager" and why_ffn_is_not_fused(self, x, backend, Norm()) is None:
            return ffn(x, self.ffn_in.weight, self.ffn_in.bias, self.ffn_out.weight, self.ffn_out.bias,
                       activation=self.activation, dropout_p=dropout_p, kernels=self.kernels)
        hidden = self.ffn_in(x)
        seed = as_seed(None, hidden.device) if dropout_p > 0.0 else None
        out: torch.Tensor = self.ffn_out(activate(hidden, self.activation, dropout_p, seed))
        return out

    def backends(self, fields: int | None = None) -> dict[str, Half]:
        """What runs the "attention" and the "ffn" half on rows of `fields` tokens (None: as few as the layer takes), in
        the dtype and on the device of the parameters, with the autocast that is active.

        >>> TransformerLayer(64, 4, 256, kernels="eager").backends()["ffn"]
        Half(backend='eager', composed="kernels='eager' is eager here")

        Raises as `forward` where the chosen backend cannot run.
        """
        parameter = next(self.parameters(), torch.empty(0))
        x = torch.empty(0, fields or self.queries or 1, self.dim, dtype=parameter.dtype, device=parameter.device)
        backend = resolve(self.kernels, x.device, "field_attention", product_dtype(x))
        reasons = zip(("attention", "ffn"), self._calls(backend, x), strict=True)
        return {half: Half(backend, reason) for half, reason in reasons}

    def operations(self, fields: int) -> dict[str, str]:
        """The backend of each operation on rows of `fields` tokens; "eager" where it is composed of PyTorch's own."""
        attention, feed_forward = (self.backends(fields)[half] for half in ("attention", "ffn"))
        x = torch.empty(0, fields, self.dim, dtype=self.qkv.weight.dtype, device=self.qkv.weight.device)
        found = {"attention_block": attention.backend, "ffn": feed_forward.backend}
        if attention.composed is not None:
            width = self.qkv.weight.shape[0] // 3
            found["attention_block"] = "eager"
            found["field_attention"] = resolve(
                self.kernels, x.device, "field_attention", product_dtype(x),
                lambda of: attention_supports(of, self.queries or fields, fields, width, self.num_heads))
        if feed_forward.composed is not None:
            backend = resolve(self.kernels, x.device, "ffn", product_dtype(x),
                              lambda of: ffn_supports(of, *self.ffn_out.weight.shape, self.activation))
            plain = backend != "eager" and why_ffn_is_not_fused(self, x, backend, Norm()) is None
            found["ffn"] = backend if plain else "eager"
        return found

    def extra_repr(self) -> str:
        settings = [f"num_heads={self.num_heads}", f"norm={self.norm!r}", f"activation={self.activation!r}"]
        settings += [] if self.queries is None else [f"queries={self.queries}"]
        settings += [f"dropout={self.dropout}", f"kernels={self.kernels!r}"]
        try:
            fusion = [f"{'FFN' if half == 'ffn' else half}: " + (f"fused ({of.backend})" if of.composed is None
                                     else f"children are called: {of.composed}")
                      for half, of in self.backends().items()]
        except (BackendUnavailable, TypeError, ValueError) as error:
            fusion = [f"runs not here: {error}"]
        return "\n".join([", ".join(settings), *fusion])


# What the fused halves stand in for: a subclass or a program may have others.
_ATTENTION, _FFN = TransformerLayer._attention, TransformerLayer._ffn


def _check_choices(norm: str, activation: str, queries: int | None) -> None:
    if norm not in NORM_CHOICES:
        raise ValueError(f"norm={norm!r}: choose pre or post")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    if queries is not None and queries < 1:
        raise ValueError(f"queries={queries}: at least 1 is needed")
