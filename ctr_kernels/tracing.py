"""What torch makes of a call: transforms of torch.func, and graphs of torch.compile and torch.export."""

from collections.abc import Callable

import torch


def constant_of_graph(function: Callable[[], bool]) -> Callable[[], bool]:
    """Have torch.compile call `function` while it traces, and take the result for a constant.

    It is what torch.compiler.assume_constant_result does, without loading all of torch.compile. torch 2.11 cannot
    trace the first of the functions below, and would say of any graph that it is exported.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_of_graph
def _traced_inside_torch_func() -> bool:
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0


@constant_of_graph
def _traced_for_export() -> bool:
    return torch.compiler.is_exporting()


def inside_torch_func() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: kernels have no rules for them."""
    if torch.compiler.is_compiling():  # the other two functions would be nodes of the graph
        return _traced_inside_torch_func()
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def inside_export() -> bool:
    """Whether torch.export or torch.jit.trace records a graph: values of tensors cannot be looked at."""
    if torch.compiler.is_compiling():
        return _traced_for_export()
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
