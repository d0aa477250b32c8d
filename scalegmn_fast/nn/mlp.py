"""Multi-layer perceptrons with the options of the field's configurations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .rows import MappedRows, Rows, add, add_vector, dense, dropout, linear, negate, norm_act, symmetrize, width
from .work import PlannedModule

ACTIVATIONS = ("elu", "relu", "silu", "tanh", "sigmoid", "sine", "identity")


class Mlp(PlannedModule):
    """Linear layers of widths ``d_k + [out_features]``; between them norms, activation, dropout.

    Args:
        in_features, out_features: widths.
        d_k: hidden widths.
        activation, final_activation: names out of elu, relu, silu, tanh, sigmoid, sine, identity.
        batch_norm, layer_norm: normalise before the activation (LayerNorm first if both).
        bias: whether the linear layers have one.
        skip: add each layer's input to its output, from the second layer on (equal widths needed).
        dropout: probability, after each activation.
        weight_init, weight_init_args: name and arguments of a ``torch.nn.init`` function; biases are then zero.
        w0: frequency of ``sine``.

    Source: spec, *Building blocks*. Parameter names: ``fc.i``, ``ln.i``, ``bn.i``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        d_k: list[int],
        activation: str = "elu",
        batch_norm: bool = False,
        layer_norm: bool = False,
        bias: bool = True,
        skip: bool = False,
        dropout: float = 0.0,
        final_activation: str = "identity",
        weight_init: str | None = None,
        weight_init_args: dict | None = None,
        w0: float = 30.0,
    ):
        super().__init__()
        for name in (activation, final_activation):
            if name not in ACTIVATIONS:
                raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
        widths = [in_features, *d_k, out_features]
        self.activation, self.final_activation, self.w0 = activation, final_activation, w0
        self.skip, self.dropout = skip, float(dropout)
        self.fc = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.bn = nn.ModuleList(nn.BatchNorm1d(w) for w in d_k) if batch_norm else None
        self.ln = nn.ModuleList(nn.LayerNorm(w) for w in d_k) if layer_norm else None
        if weight_init is not None:
            for layer in self.fc:
                getattr(nn.init, weight_init)(layer.weight, **(weight_init_args or {}))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, *parts: Rows) -> Tensor:
        """The mlp of the concatenation of ``parts`` along the features; [R, out_features].

        The first linear map is split over the parts, so that gathered parts are mapped before they are gathered.
        """
        return self.after_first(self.first(*parts))

    def first(self, *parts: Rows) -> Tensor:
        """The first linear layer of the concatenated parts."""
        layer = self.fc[0]
        if len(parts) == 1:
            return linear(parts[0], layer.weight, layer.bias)
        if not self.work.hoist:
            return layer(torch.cat([dense(part) for part in parts], dim=1))
        maps = layer.weight.split([width(part) for part in parts], dim=1)
        out = linear(parts[0], maps[0], layer.bias)
        for part, weight in zip(parts[1:], maps[1:], strict=True):
            out = add(out, linear(part, weight))
        return out

    def after_first(self, z: Tensor) -> Tensor:
        """Everything after the first linear layer."""
        if len(self.fc) > 1:
            before = self.before_last(z)
            z = linear(before, self.fc[-1].weight, self.fc[-1].bias)
            z = add(z, before) if self.skip else z
        return norm_act(z, None, self.final_activation, self.w0)

    def before_last(self, z: Tensor) -> Tensor:
        """What the last linear layer reads, from what the first one gave."""
        before = self._between(z, 0)
        for index in range(1, len(self.fc) - 1):
            x = self._between(linear(before, self.fc[index].weight, self.fc[index].bias), index)
            before = add(x, before) if self.skip else x
        return before

    @property
    def ends_linear(self) -> bool:
        """Whether the mlp is the last linear layer of `before_last`, and nothing after."""
        return len(self.fc) > 1 and not self.skip and self.final_activation == "identity"

    def _between(self, z: Tensor, index: int) -> Tensor:
        norm = None if self.ln is None else self.ln[index]
        if self.bn is not None and (z.shape[0] or not self.training):
            z, norm = self.bn[index](z if norm is None else norm(z)), None
        return dropout(norm_act(z, norm, self.activation, self.w0), self.dropout, self.training)

    def symmetrized(self, rows: Rows) -> Rows:
        """``mlp(x) + mlp(-x)`` (even in x).

        With one hidden layer the first linear map runs once and the last is left to the reader. Batch normalisation
        acts on the two halves apart, so with it both run; dropout does too, behind the shared first map.
        """
        plain = len(self.fc) == 2 and self.ends_linear
        if self.bn is not None or not plain or not self.work.share:
            return add(self(rows), self(negate(rows)))
        first, last = self.fc
        norm = self.ln[0] if self.ln is not None else None
        hidden = linear(rows, first.weight)
        if self.training and self.dropout > 0:
            branches = (self._between(add_vector(half, first.bias), 0) for half in (hidden, negate(hidden)))
            hidden = add(*branches)
        else:
            hidden = symmetrize(hidden, first.bias, norm, self.activation, self.w0)
        mapped = MappedRows(hidden, last.weight, None if last.bias is None else 2 * last.bias)
        return mapped if self.work.compose else dense(mapped)


class MlpNet(PlannedModule):
    """A plain mlp in the place of an equivariant module; parameter name ``rho``.

    ``d_extra`` is the width of the positional embedding it reads beside x (0: none).
    """

    def __init__(self, d_in: int, d_out: int, mlp_args: dict, d_extra: int = 0):
        super().__init__()
        self.d_extra = d_extra
        self.rho = Mlp(d_in + d_extra, d_out, **mlp_args)

    def forward(self, *parts: Rows) -> Tensor:
        """The mlp of the concatenated parts; [R, d_out]."""
        return self.rho(*parts)


__all__ = ["ACTIVATIONS", "Mlp", "MlpNet"]
