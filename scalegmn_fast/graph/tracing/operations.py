"""The operations that are understood: what each says about its neurons. One method ``op_NAME`` per operator of ATen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..architecture import ACTIVATION_NAMES
from .features import batch_norm, folded, folded_bias, norm_gain, norm_shift
from .labels import Value, compressed, distinct, padded, pairs, varying
from .network import Part
from .neurons import Neurons, operation
from .wires import BOTH, SCALE, SIGN

#: What an elementwise function of one value leaves of its neurons' scalings.
ELEMENTWISE = {
    **dict.fromkeys(("dropout", "alpha_dropout", "feature_dropout", "neg", "contiguous", "clone", "alias"), BOTH),
    **dict.fromkeys(("detach", "to", "_to_copy"), BOTH),
    **dict.fromkeys(("relu", "leaky_relu", "rrelu", "abs"), SCALE),
    **dict.fromkeys(("tanh", "sin", "asinh", "sinh", "atan", "erf", "softshrink", "hardshrink"), SIGN),
    **dict.fromkeys(("gelu", "silu", "sigmoid", "elu", "selu", "celu", "softplus", "mish", "hardswish"), 0),
    **dict.fromkeys(("hardsigmoid", "log_sigmoid", "relu6", "exp", "log", "cos", "pow", "sqrt", "rsqrt"), 0),
    **dict.fromkeys(("clamp", "square", "reciprocal", "log1p", "expm1", "exp2"), 0),
}
MOVING = (
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "numpy_T", "movedim",
    "squeeze", "unsqueeze", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "expand",
    "expand_as", "repeat", "roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "swapaxes",
)  # fmt: skip
POOLS = {
    **dict.fromkeys(("max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d"), SCALE),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"), BOTH),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d"), BOTH),
}
REDUCTIONS = {"mean": BOTH, "sum": BOTH, "amax": SCALE}


class Operations(Neurons):
    """Arguments have the names of the operators' schemas, but for the first one, ``value``."""

    in_tables = (*ELEMENTWISE, *POOLS, *REDUCTIONS, *MOVING)

    def _moved(self, node, args, kwargs):
        """An operation that moves entries, run on the labels of a value or on the places of a parameter's elements."""
        operand = args[0]
        others = [arg for arg in tree_leaves((args[1:], kwargs)) if isinstance(arg, Value | Part)]
        shapes = [torch.empty(arg.shape, device="meta") for arg in others]
        rest = iter(shapes)
        args = (args[0], *tree_map(lambda arg: next(rest) if isinstance(arg, Value | Part) else arg, args[1:]))
        if isinstance(operand, Part):
            index = node.target(operand.elements(), *args[1:], **kwargs)
            if isinstance(index, Tensor):
                return replace(operand, shape=tuple(index.shape), index=index)
            return [replace(operand, shape=tuple(piece.shape), index=piece) for piece in index]
        columns = [node.target(f.expand(operand.shape).contiguous(), *args[1:], **kwargs) for f in operand.factors]
        if not columns or isinstance(columns[0], Tensor):
            return Value(self.shape, [compressed(f) for f in columns], operand.edges)
        shapes = [tuple(piece.shape) for piece in node.meta["val"]]
        return [Value(shape, [compressed(f) for f in found]) for shape, *found in zip(shapes, *columns, strict=True)]

    def _elementwise(self, name: str, value: Value) -> Value:
        """A function of each entry."""
        if not isinstance(value, Value):
            raise self.unsupported(
                f"computes with the parameter {value.name}: weights must be parameters or views of them"
            )
        kinds = ELEMENTWISE[name]
        for factor in value.factors:
            wires = distinct(factor)
            self.wires.restrict(wires, kinds)
            if kinds != BOTH:
                self.wires.tell_apart(wires, 0)
            if name in ACTIVATION_NAMES:
                self.activations.update(dict.fromkeys(wires.tolist(), name))
        return Value(self.shape, value.factors, value.edges if kinds == BOTH and name != "neg" else ())

    def _unknown(self, operands: list[Value | Part]):
        """One fixed neuron for the result of an operation, which reads fixed ones."""
        hub = self.wires.new(1, self._what, fixed=True)
        read = [distinct(factor) for value in operands if isinstance(value, Value) for factor in value.factors]
        read = np.unique(np.concatenate([*read, np.zeros(0, dtype=np.int64)]))
        self.wires.fix(read)
        self.connect("structure", read, np.repeat(hub, len(read)))
        weights = ", ".join(sorted({part.name for part in operands if isinstance(part, Part)}))
        self.note(
            f"{operation(self.node)} is not understood: what it reads is fixed{weights and f', without {weights}'}"
        )
        results = self.node.meta["val"]
        shapes = [tuple(value.shape) for value in ([results] if isinstance(results, Tensor) else results)]
        found = [Value(shape, [torch.from_numpy(hub).reshape([1] * len(shape))]) for shape in shapes]
        return found[0] if isinstance(results, Tensor) else found

    def op_hardtanh(self, value, min_val, max_val):
        self._restrict(value, SIGN if min_val == -max_val else 0)
        return replace(value, edges=())

    def op_prelu(self, value, weight):
        value = self._even(value, len(value.shape) - 2)
        self._restrict(value, SCALE)
        if prod(weight.shape) > 1:
            columns, _ = self.read(value, 1)
            rows, wires = self._rows_of(weight, torch.from_numpy(columns))
            self.act(rows, wires, ())
        self.note(f"{weight.name}, slopes of a PReLU, are not in the graph")
        return replace(value, edges=())

    def _restrict(self, value: Value, kinds: int) -> None:
        """The neurons of a value are read by something that keeps only scalings of ``kinds``."""
        for factor in value.factors:
            self.wires.restrict(distinct(factor), kinds)
            self.wires.tell_apart(distinct(factor), 0)

    def op_linear(self, value, weight, bias):
        return self.layer(self._plain(value), -1, self._weight(weight), bias)

    def op_addmm(self, value, mat1, mat2, beta, alpha):
        if alpha != 1 or beta != 1:
            raise self.unsupported(f"with alpha={alpha}, beta={beta}")
        return self.layer(self._plain(mat1), -1, self._weight(mat2).view(lambda t: t.t()), value)

    def op_conv1d(self, value, weight, bias, stride, padding, dilation, groups):
        return self._convolution(value, weight, bias, groups, (1, weight.shape[2]), 1)

    def op_conv2d(self, value, weight, bias, stride, padding, dilation, groups):
        return self._convolution(value, weight, bias, groups, tuple(weight.shape[2:]), 2)

    def _convolution(self, value, weight, bias, groups, kernel, axes: int) -> Value:
        value = self._even(self._plain(value), axes)
        return self.layer(value, -axes - 1, self._weight(weight), bias, groups=groups, kernel=kernel)

    def _plain(self, value) -> Value:
        if not isinstance(value, Value):
            raise self.unsupported("does not read the input or what is computed from it")
        return value

    def _weight(self, weight) -> Part:
        if not isinstance(weight, Part) or weight.is_buffer:
            raise self.unsupported("has a weight that is no parameter or view of one")
        return weight

    def _even(self, value: Value, axes: int) -> Value:
        """The value with wires that do not differ along its last ``axes`` dimensions."""
        last = set(range(len(value.shape) - axes, len(value.shape)))
        factors = []
        for factor in value.factors:
            along = varying(factor)
            if along & last:
                rest = along - last
                factor = self.collapsed(factor, rest) if rest else self.contracted(factor, along, fix=True)
            factors.append(factor)
        same = all(a is b for a, b in zip(factors, value.factors, strict=True))
        return self.settled(Value(value.shape, factors, value.edges if same else ()))

    def _pooled(self, value: Value, kinds: int, axes: int) -> Value:
        value = self._even(value, axes)
        self._restrict(value, kinds)
        result = Value(self.shape, value.factors, value.edges if kinds == BOTH else ())
        return result

    def _reduced(self, kinds: int, value: Value, dim=None, keepdim=False, **_) -> Value:
        ndim = len(value.shape)
        dims = range(ndim) if dim in (None, []) else [d % ndim for d in ([dim] if isinstance(dim, int) else dim)]
        factors, same = [], True
        for factor in value.factors:
            if varying(factor) & set(dims):
                factor, same = self.contracted(factor, dims, fix=False), False
            else:
                self.wires.restrict(distinct(factor), kinds)
            keep = factor.shape if keepdim else [s for d, s in enumerate(factor.shape) if d not in dims]
            factors.append(factor.reshape(keep))
        return self.settled(Value(self.shape, factors, value.edges if same and kinds == BOTH else ()))

    def op_softmax(self, value, dim, dtype=None, half_to_float=None):
        self._normalised(value, [dim])
        return Value(self.shape, value.factors)

    op__softmax = op_softmax

    def _normalised(self, value: Value, dims: Sequence[int], groups: Tensor | None = None) -> None:
        """Statistics over dimensions are taken: no scaling stays, and wires stay within the sets that are joined."""
        dims = {dim % len(value.shape) for dim in dims}
        for factor in value.factors:
            self.wires.restrict(distinct(factor), 0)
            rest = [1 if dim in dims else size for dim, size in enumerate(factor.shape)]
            marks = torch.arange(prod(rest)).reshape(rest) if groups is None else groups
            self.wires.tell_apart(*pairs(factor, marks.expand(factor.shape)))

    def op_layer_norm(self, value, normalized_shape, weight, bias, **_):
        self._normalised(value, range(-len(normalized_shape), 0))
        return self.scaled(value, weight, bias)

    def op_rms_norm(self, value, normalized_shape, weight, **_):
        self._normalised(value, range(-len(normalized_shape), 0))
        return self.scaled(value, weight, None)

    def op_group_norm(self, value, num_groups, weight, bias, **_):
        columns, carried = self.read(value, 1)
        core = torch.from_numpy(columns).reshape(1, -1, *[1] * (len(value.shape) - 2))
        value = Value(value.shape, [core, *carried])
        groups = torch.arange(num_groups).repeat_interleave(value.shape[1] // num_groups).reshape(core.shape)
        self._normalised(value, [1], groups)
        axes = (1,) * (len(value.shape) - 2)
        return self.scaled(value, *(part and part.reshaped(*part.shape, *axes) for part in (weight, bias)))

    def op_batch_norm(self, value, weight, bias, running_mean, running_var, training, eps, **_):
        if running_mean is None or training:
            raise self.unsupported("has no running statistics: its output depends on the batch")
        columns, carried = self.read(value, 1)
        new = self.wires.new(len(columns), running_mean.name.removesuffix(".running_mean"))
        self.wires.tie(new, columns, 0)
        for factor in carried:
            self.wires.restrict(distinct(factor), 0)
        if weight is None:
            self.wires.restrict(np.append(new, columns), 0)
        rows = [None if part is None else self._rows_of(part, torch.from_numpy(new))[0] for part in (weight, bias)]
        if weight is not None:
            self.act(rows[0], new, ((new, 1), (columns, -1)))
        if bias is not None:
            self.act(rows[1], new, ((new, 1),))
        else:
            self.wires.restrict(new, BOTH)
        for part, factors in ((running_mean, ((columns, 1),)), (running_var, ())):
            self.act(self._rows_of(part, torch.from_numpy(new))[0], columns, factors)
        norm = partial(batch_norm, weight, bias, running_mean, running_var, eps)
        core = torch.from_numpy(new).reshape(1, -1, *[1] * (len(value.shape) - 2))
        before = value.edges[0] if len(value.edges) == 1 else None
        if self.fold and before is not None and np.array_equal(before.receivers, columns):
            target = torch.from_numpy(np.unique(before.target, return_inverse=True)[1].reshape(-1))
            before.features = partial(folded, before.features, norm, target)
            before.bias = partial(folded_bias, before.bias, norm)
            self.shared.append((new, columns))
            before.receivers = new
            return Value(self.shape, [core], value.edges)
        edges = self.connect(
            "scale", columns, new, features=partial(norm_gain, norm), receivers=new, bias=partial(norm_shift, norm)
        )
        return Value(self.shape, [core, *carried], () if carried else (edges,))

    def op_embedding(self, weight, indices, **_):
        weight = self._weight(weight)
        if isinstance(indices, Value | Part):
            raise self.unsupported("reads numbers that are computed")
        symbols = self.wires.new(weight.shape[0], self._what, fixed=True)
        core = torch.from_numpy(symbols).reshape(*[1] * indices.ndim, -1)
        value = Value((*indices.shape, weight.shape[0]), [core])
        return self.layer(value, -1, weight.view(lambda t: t.t()), None)

    def op_matmul(self, value, other):
        if isinstance(other, Part) and isinstance(value, Value) and len(other.shape) == 2:
            return self.layer(value, -1, self._weight(other).view(lambda t: t.t()), None)
        if not isinstance(value, Value) or not isinstance(other, Value):
            raise self.unsupported("multiplies with something else than a matrix or another value")
        return self._product(value, other, self.shape)

    def _product(self, a: Value, b: Value, shape: tuple[int, ...]) -> Value:
        """a @ b. Neurons that are summed over move together, and the second ones scale against the first."""
        ndim = max(len(a.shape), len(b.shape))
        left, right = ([padded(f, ndim) for f in v.factors] for v in (a, b))
        summed = [f for f in left if f.shape[-1] > 1], [f for f in right if f.shape[-2] > 1]
        factors = [f for f in left if f.shape[-1] == 1] + [f for f in right if f.shape[-2] == 1]
        pair = [f for side in summed for f in side]
        if len(summed[0]) == len(summed[1]) == 1 and self._opposed(*pair):
            factors.append(self.hubs([pair[0].transpose(-1, -2), pair[1]], [ndim - 2, ndim - 1]))
        else:
            factors += [self.contracted(f, range(ndim), fix=True) for f in pair]
        return self.settled(Value(shape, [padded(f, len(shape)) for f in factors]))

    def _opposed(self, f: Tensor, g: Tensor) -> bool:
        """Tie the wires along f's last and g's last but one dimension, if they are in pairs."""
        if f.shape[-2] > 1 or g.shape[-1] > 1:
            return False
        first, second = pairs(*torch.broadcast_tensors(f.transpose(-1, -2), g))
        if len(np.unique(first)) < len(first) or len(np.unique(second)) < len(second):
            return False
        for side, mark in ((first, 0), (second, 1)):
            self.wires.tell_apart(side, mark)
        self.wires.tie(first, second, -1)
        return True

    def op_bmm(self, value, mat2):
        return self.op_matmul(value, mat2)

    def op_mm(self, value, mat2):
        return self.op_matmul(value, mat2)

    def op_scaled_dot_product_attention(self, query, key, value, attn_mask, enable_gqa=False, **_):
        if enable_gqa or isinstance(attn_mask, Value | Part):
            raise self.unsupported("has a mask that is computed or learnt, or heads that share keys")
        turned = (*key.shape[:-2], key.shape[-1], key.shape[-2])
        keys = Value(turned, [f.transpose(-1, -2) for f in key.factors])
        scores = self._product(query, keys, (*query.shape[:-1], key.shape[-2]))
        self._normalised(scores, [-1])
        return self._product(scores, value, self.shape)

    def op_add(self, value, other, alpha=1):
        return self._sum(value, other, alpha)

    def op_sub(self, value, other, alpha=1):
        return self._sum(value, other, -alpha)

    def op_rsub(self, value, other, alpha=1):
        return self._sum(value, other, 1)

    def _sum(self, value, other, alpha) -> Value:
        if isinstance(value, Value) and isinstance(other, Value):
            if alpha != 1:  # no edge of the graph has that factor
                value, other = replace(value, edges=()), replace(other, edges=())
            return self.joint(value, other, adds=True)
        value, other = (value, other) if isinstance(value, Value) else (other, value)
        if isinstance(other, Part) and not other.is_buffer:
            if alpha != 1:
                raise self.unsupported(f"subtracts or scales the parameter {other.name}")
            return self.added(self._plain(value), other)
        return self._with_constant(self._plain(value), other, adds=True)

    def op_mul(self, value, other):
        if isinstance(value, Value) and isinstance(other, Value):
            return self.joint(value, other, adds=False)
        value, other = (value, other) if isinstance(value, Value) else (other, value)
        if isinstance(other, Part) and not other.is_buffer:
            return self.scaled(self._plain(value), other, None)
        return self._with_constant(self._plain(value), other, adds=False)

    def op_div(self, value, other, rounding_mode=None):
        if isinstance(value, Value) and isinstance(other, Value):
            return self.joint(value, other, adds=False)
        if not isinstance(value, Value) or isinstance(other, Part):
            raise self.unsupported("divides by, or divides, a parameter or constant")
        return self._with_constant(value, other, adds=False)

    def op_masked_fill(self, value, mask, **_):
        return self._with_constant(value, mask, adds=True)

    def op_constant_pad_nd(self, value, pad, fill=None, **_):
        padded = {len(value.shape) - 1 - k // 2 for k, size in enumerate(pad) if size}
        if any(varying(factor) & padded for factor in value.factors):
            raise self.unsupported("pads along neurons")
        if fill not in (0, None):
            self._restrict(value, 0)
        return Value(self.shape, value.factors, ())

    def op_pad(self, value, pad, mode, fill=None):
        return self.op_constant_pad_nd(value, pad, fill if mode == "constant" else None)

    def _with_constant(self, value: Value, other, *, adds: bool) -> Value:
        """A number or a constant tensor is added or multiplied: neurons that it differs between stay where they are."""
        if isinstance(other, Part) and other.is_buffer:
            other = other.read(dict(self.program.named_buffers()))
        if isinstance(other, Value | Part):
            raise self.unsupported("has a mask that is computed or learnt")
        changes = bool(torch.as_tensor(other).ne(0 if adds else 1).any())
        if isinstance(other, Tensor):
            constant = compressed(padded(other, len(self.shape)))
            for factor in value.factors:
                if any(size > 1 for size, own in zip(constant.shape, factor.shape, strict=True) if own > 1):
                    self.wires.fix(distinct(factor))
        if adds and changes:
            self._restrict(value, 0)
        return Value(self.shape, value.factors, () if changes else value.edges)

    def op_cat(self, tensors, dim=0):
        dim %= len(self.shape)
        values = [t for t in tensors if isinstance(t, Value)]
        if not values:
            raise self.unsupported("joins parameters")
        along = set().union(*(varying(f) for v in values for f in v.factors[:1])) - {dim}
        pieces = []
        for operand in tensors:
            if isinstance(operand, Part):
                operand = self.parameter(operand, along)
            if isinstance(operand, Tensor):
                operand = Value(tuple(operand.shape), [torch.from_numpy(self.one()).reshape([1] * operand.ndim)])
            while len(operand.factors) > 1:
                dropped = self.contracted(operand.factors[-1], range(len(operand.shape)), fix=True)
                operand = self.settled(replace(operand, factors=[*operand.factors[:-1], dropped], edges=()))
            pieces.append(operand)
        cores = [piece.factors[0] for piece in pieces]
        sizes = torch.broadcast_shapes(*([1 if d == dim else s for d, s in enumerate(c.shape)] for c in cores))
        full = [
            core.expand([piece.shape[d] if d == dim else s for d, s in enumerate(sizes)])
            for core, piece in zip(cores, pieces, strict=True)
        ]
        core = compressed(torch.cat(full, dim))
        if all(c.shape[dim] == 1 for c in cores) and any(c.numel() > 1 for c in cores):
            core = self.collapsed(core, {d for d, size in enumerate(sizes) if size > 1})
        return Value(self.shape, [core])

    def op_stack(self, tensors, dim=0):
        dim %= len(self.shape)
        if not all(isinstance(t, Value) for t in tensors):
            raise self.unsupported("joins parameters or constants")
        return self.op_cat(
            [Value((*t.shape[:dim], 1, *t.shape[dim:]), [f.unsqueeze(dim) for f in t.factors]) for t in tensors], dim
        )
