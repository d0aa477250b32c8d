"""How an op enters PyTorch: schema, device implementation, fake, autocast rule, and second derivatives."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "scalegmn_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA")


def define(name: str, signature: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Registers `scalegmn_fast::name` and returns it.

    Args:
        signature: the schema after the name. The op is functional: no output aliases an input.
        implementation: called with real tensors of any device; looks the backend up itself.
        fake: shapes, dtypes, devices and strides of the outputs.

    Under autocast the op runs as it would without: in the dtypes it is given, accumulating in float32.
    """
    LIBRARY.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _without_forward_mode(name, implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    for key in AUTOCAST_KEYS:
        LIBRARY.impl(name, _without_autocast(op, key), key, with_keyset=True)
    return op


def _without_forward_mode(name: str, implementation: Callable) -> Callable:
    """PyTorch would drop the tangents of an op that has none, and give 0."""

    @functools.wraps(implementation)
    def kernel(*args):
        if forward_ad._current_level >= 0:
            raise NotImplementedError(f"{name} has no forward-mode derivative (jvp); use reverse mode")
        return implementation(*args)

    return kernel


def _without_autocast(op: torch._ops.OpOverload, key: str) -> Callable:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(_, *args):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*args)

    return kernel


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def register_list_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """`register_autograd` of an op whose first argument is the list of tensors that it is differentiated by.

    ``backward`` gives the gradients of that list, and no others. What PyTorch generates for lists takes all arguments
    apart as trees and puts them together again, at every call and in Python: of a small step a good part.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def run(keys, tensors, others):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, tensors, *others)

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keys, others, *tensors):
            output = run(keys, list(tensors), others)
            setup_context(ctx, (list(tensors), *others), output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return None, None, *backward(ctx, ctx.needs_input_grad[2:], *grads)

    def kernel(keys, tensors, *others):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return Differentiated.apply(keys, others, *tensors)
        return run(keys, tensors, others)

    Differentiated.__name__ = Differentiated.__qualname__ = f"Differentiated_{name}"
    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def gradients_through(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of sum <formula(*tensors), cotangents> for the needed tensors, by differentiating the formula.

    This is how second derivatives are made: the formula is the reference's backward formula. The result is itself
    differentiable where grad mode is on, so third derivatives work too.
    """
    create_graph = torch.is_grad_enabled()

    def fresh(tensor: Tensor | None, need: bool) -> Tensor | None:
        """An alias: a tensor that another input was computed from must not be charged for that one's gradient too."""
        if tensor is None or not need:
            return tensor if tensor is None else tensor.detach()
        return tensor.view_as(tensor) if create_graph else tensor.detach().requires_grad_()

    with torch.enable_grad():
        inputs = [fresh(tensor, need) for tensor, need in zip(tensors, needed, strict=True)]
        outputs = formula(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [(out, c) for out, c in zip(outputs, cotangents, strict=True) if out.requires_grad]
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    grads = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [c for _, c in pairs],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        if pairs
        else [torch.zeros_like(t) for t in wanted]
    )
    return [next(grads) if need else None for need in needed]
