"""Cross layers of DCN-V2: every one multiplies the input by a linear map of what came out so far."""

from collections.abc import Iterable

import torch
from torch import nn

from ctr_kernels import BackendUnavailable, low_rank_cross
from ctr_kernels.backend import CHOICES, resolve
from ctr_kernels.checks import autocast_enabled, without_autocast
from ctr_kernels.cross.operator import supports
from ctr_kernels.fusion import like_input, out_features, plain_linear, weight_and_bias

from .checks import check_choice

CROSS_LAYERS, CROSS_RANK = 3, 32  # of the baseline study's network


def cross_network(layers: Iterable[nn.Module], x0: torch.Tensor) -> torch.Tensor:
    """x0 [B, width] through cross layers one after the other, each of which is given x0 again -> [B, width]."""
    x = x0
    for layer in layers:
        x = layer(x0, x)
    return x


class FullRankCross(nn.Module):
    """x0 * (W x + b) + x (Wang et al. 2021, eq. 1).

    >>> FullRankCross(429)(torch.randn(2, 429), torch.randn(2, 429)).shape
    torch.Size([2, 429])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x0: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x0 [B, width], x [B, width] -> [B, width]."""
        return x0 * like_input("linear", self.linear(x), x) + x


class LowRankCross(nn.Module):
    """x0 * (V (U x) + b) + x, or a gated mixture of such experts (Wang et al. 2021, section 3.5).

    With K experts: x0 * (sum_k g_k(x) V_k h_k + b) + x, where g = softmax(Linear(x)) and h_k = U_k x, or
    h_k = tanh(C_k tanh(U_k x)) with `inner`. The bias is one for all experts, as in the paper; since the gates
    sum to 1 it stands outside the sum, and the sum over experts is one product with V = [V_1 ... V_K].

    Args:
        width, rank: size of x, and rank of each expert.
        num_experts: K; 1 has neither a gate nor inner matrices.
        inner: give the experts of a mixture the inner matrices C_k [rank, rank] and tanh.
        kernels: "auto", "eager", "native" or "triton"; a backend that is named must be there, also with a gate.

    A layer without a gate is one operation where u and v are what this constructor makes and x and x0 are alike
    [B, width], computed in their dtype under `torch.autocast`, too. With a gate, and if u or v were replaced, hooked or
    changed otherwise, they are called. A printed layer says which.

    NOTE the names follow V(Ux), the reverse of the paper's U (V^T x). The paper leaves the gate open (softmax or
    sigmoid, of x): softmax of a Linear with bias here, one for each layer.

    >>> LowRankCross(429, 32, num_experts=4)(torch.randn(2, 429), torch.randn(2, 429)).shape
    torch.Size([2, 429])
    """

    def __init__(
        self, width: int, rank: int, *, num_experts: int = 1, inner: bool = False, kernels: str = "auto"
    ) -> None:
        super().__init__()
        check_choice("kernels", kernels, CHOICES)
        self.num_experts, self.width, self.rank, self.kernels = num_experts, width, rank, kernels
        self.u = nn.Linear(width, num_experts * rank, bias=False)
        self.v = nn.Linear(num_experts * rank, width)
        self.gate = nn.Linear(width, num_experts) if num_experts > 1 else None
        self.inner = nn.ModuleList(
            nn.Linear(rank, rank, bias=False) for _ in range(num_experts if inner and num_experts > 1 else 0)
        )

    def forward(self, x0: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x0 [B, width], x [B, width] -> [B, width]."""
        if self._why_not_fused(x0, x) is None:
            weight, bias = weight_and_bias(self.v)
            with without_autocast(x.device.type):  # which would round x0 and x as well; eager adds them as they are
                return low_rank_cross(x0, x, weight_and_bias(self.u)[0], weight, bias, kernels=self.kernels)
        hidden = self.u(x)  # [B, K * rank]
        if self.gate is not None:
            hidden = hidden.unflatten(1, (self.num_experts, self.rank))
            if self.inner:
                projected = torch.tanh(hidden).unbind(1)
                hidden = torch.tanh(torch.stack([c(h) for c, h in zip(self.inner, projected, strict=True)], dim=1))
            hidden = (torch.softmax(self.gate(x), dim=-1).unsqueeze(-1) * hidden).flatten(1)
        return x0 * like_input("v", self.v(hidden), x) + x

    def _why_not_fused(self, x0: torch.Tensor, x: torch.Tensor) -> str | None:
        """Why u and v are called for x0 and x [B, width]; None: the layer is one operation.

        Raises as `resolve` where the backend that was chosen cannot run, whatever is called.
        """
        if self.kernels == "eager":
            return "kernels='eager'"
        u, v = self.u, self.v
        width, rank = x.shape[-1] if x.dim() else 0, out_features(u)
        reason = (self._unlike_the_kernels(x0, x) or plain_linear(u, "u", width, rank, bias=False)
                  or plain_linear(v, "v", rank, width))
        if reason is None and autocast_enabled(x.device.type) and u.weight.dtype != x.dtype:
            reason = f"autocast is on, x has {x.dtype} and u {u.weight.dtype}"
        if reason is not None:  # parameters of another dtype or device are an error in either way
            resolve(self.kernels, x.device, "low_rank_cross")
            return reason
        backend = resolve(self.kernels, x.device, "low_rank_cross", x.dtype, lambda of: supports(of, width, rank))
        return f"kernels={self.kernels!r} is eager here" if backend == "eager" else None

    def _unlike_the_kernels(self, x0: torch.Tensor, x: torch.Tensor) -> str | None:
        """What the kernels do not compute, though PyTorch does."""
        if self.gate is not None:
            return "experts have no fused operation"
        if x.dim() != 2 or (x0 is not x and x0.shape != x.shape):
            return f"x0 has shape {tuple(x0.shape)}, x {tuple(x.shape)}, not one of [B, W]"
        if x0 is not x and (x0.dtype != x.dtype or x0.device != x.device):
            return f"x0 is {x0.dtype} on {x0.device}, x {x.dtype} on {x.device}"
        return None

    def operations(self, _: int) -> dict[str, str]:
        """The backend of the layer on rows in the dtype and on the device of its parameters."""
        row = self._row()
        called = self._why_not_fused(row, row) is not None
        return {"low_rank_cross": "eager" if called else resolve(self.kernels, row.device, "low_rank_cross", row.dtype)}

    def _row(self) -> torch.Tensor:
        return next(self.parameters(), torch.empty(0)).new_empty(0, self.width)

    def extra_repr(self) -> str:
        try:
            row = self._row()
            reason = self._why_not_fused(row, row)
        except (BackendUnavailable, TypeError, ValueError) as error:
            reason = str(error)
        return f"kernels={self.kernels!r}, " + ("fused" if reason is None else f"children are called: {reason}")
