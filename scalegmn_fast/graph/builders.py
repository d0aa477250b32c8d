"""`GraphBatch` from state dicts and from live modules.

Neurons, and channels of convolutions, are nodes. An edge feature holds everything that joins two of them, in ``d_e``
numbers:

* a convolution's kernel, padded with zeros to the largest kernel on each axis (``kernel_size``), its centre kept in the
  centre, row by row;
* a linear layer's weight as a kernel of size 1 x 1, so at the centre tap, or with ``linear_tap="first"`` as the first
  number, as the original implementation has it;
* a linear layer on flattened channels of s > 1 pixels: the s weights that read one channel, in the pixels' order, as
  the first s numbers; ``d_e`` is the larger of s and the kernel's size.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .architecture import Architecture
from .batch import GraphBatch
from .layers import Network, check_list, check_tensors, edge_features, grid_of, layout_of, pixels_of

_KINDS = {
    "sign": frozenset({"sign"}),
    "scale": frozenset({"scale"}),
    "permutation": frozenset(),
}
_BOTH = frozenset({"sign", "scale"})

_MODULE_KINDS: dict[type[nn.Module], frozenset[str]] = {
    **dict.fromkeys((nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink), _KINDS["sign"]),
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU), _KINDS["scale"]),
    **dict.fromkeys((nn.MaxPool2d, nn.AdaptiveMaxPool2d), _KINDS["scale"]),
    **dict.fromkeys((nn.Identity, nn.Flatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d), _BOTH),
    **dict.fromkeys((nn.Dropout, nn.Dropout2d), _BOTH),
    **dict.fromkeys((nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Softplus), _KINDS["permutation"]),
    **dict.fromkeys((nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish), _KINDS["permutation"]),
    **dict.fromkeys((nn.Hardswish, nn.ReLU6), _KINDS["permutation"]),
}
_PASSIVE = (
    nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.Flatten, nn.ZeroPad2d, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_SUPPORTED = (
    f"Linear, Conv2d, {', '.join(cls.__name__ for cls in _MODULE_KINDS)}, Hardtanh, sine modules, "
    "containers of these whose children run in order, and classes named in module_symmetry"
)


# -- state dicts -----------------------------------------------------------------------------------------------------


def from_state_dicts(
    state_dicts: Sequence[Mapping[str, Tensor]],
    *,
    input_value: float | None = None,
    sign_mask: Tensor | Sequence[Tensor | bool] | None = None,
    names: Sequence[tuple[str, str | None]] | None = None,
    kernel_size: tuple[int, int] | None = None,
    linear_tap: str = "centre",
) -> GraphBatch:
    """Batch of the networks whose parameters are given, one state dict per network, in the order of the list.

    Tensors of 2 or 4 dimensions are weights ([out, in] and [out, in, kh, kw]), those of 1 dimension biases. Layers
    stand in the order of the numbers in the weights' names where these differ in their numbers alone (``seq.2.weight``
    before ``seq.10.weight``), else in the order of the dict. A bias belongs to the weight of the same name but for
    ``weight`` / ``bias`` (or ``kernel`` / ``bias``, ``w`` / ``b``); if none is named so, biases belong to weights in
    order. A layer without bias has the bias 0.

    Args:
        state_dicts: one mapping of names to tensors per network. Architectures may differ; equal ones next to each
            other are the fastest.
        input_value: node feature of first-layer neurons; None for 1 in networks of linear layers and 0 in networks with
            convolutions, as the published models have it.
        sign_mask: bool [B], [B, neurons], or a list of one bool or bool [neurons] per network; see
            `GraphBatch.from_weights`.
        names: (weight, bias or None) names of the layers in order, instead of the rules above.
        kernel_size: height and width to pad kernels to; None for the largest kernel of all networks on each axis.
        linear_tap: where a linear weight stands among ``d_e`` numbers, "centre" or "first".

    Returns:
        A `GraphBatch` of d_v = 1 and d_e as the module's docstring says. Deterministic; differentiable in every tensor.

    Raises:
        TypeError, ValueError: an empty list; an argument or tensor of a wrong type, shape, dtype or device; layers that
            do not fit each other; parameters of anything but linear layers and convolutions (normalisation).
        KeyError: a name of ``names`` is not in a state dict.
    """
    check_list("state_dicts", state_dicts)
    networks: list[Network] = []
    pairs: dict[tuple, list[tuple[str, str | None]]] = {}  # state dicts of equal names and shapes are read alike
    for index, state in enumerate(state_dicts):
        label = f"state_dicts[{index}]"
        if not isinstance(state, Mapping):
            raise TypeError(f"{label} must be a mapping of names to tensors, got {type(state).__name__}")
        networks.append(network_of_state(label, state, names, pairs))
    masks = _split_sign_mask(sign_mask, networks)
    return _build(networks, input_value=input_value, masks=masks, kernel_size=kernel_size, linear_tap=linear_tap)


def network_of_state(label: str, state: Mapping[str, Tensor], names, known: dict) -> Network:
    """The layers of one state dict; ``names`` as for `from_state_dicts`.

    ``known`` has the (weight, bias) names of state dicts read before, by names and shapes; it is added to.

    Raises:
        TypeError, ValueError, KeyError: as `from_state_dicts`.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{label}[{name!r}] must be a torch.Tensor, got {type(value).__name__}")
    if names is None:
        key = tuple((name, value.shape) for name, value in state.items())
        if key not in known:
            known[key] = _paired_names(label, state)
        pairs = known[key]
    else:
        pairs = list(names)
        if not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
            raise ValueError(f"names must hold one pair (weight, bias or None) per layer, got {names!r}")
    for name in itertools.chain.from_iterable(pairs):
        if name is not None and name not in state:
            raise KeyError(f"names: {label} must hold {name!r}, got {_shown(state)}")
    weights = [state[weight] for weight, _ in pairs]
    biases = [None if bias is None else state[bias] for _, bias in pairs]
    for (weight, bias), w, b in zip(pairs, weights, biases, strict=True):
        if w.ndim not in (2, 4):
            raise ValueError(f"{label}[{weight!r}] must be [out, in] or [out, in, kh, kw], got shape {list(w.shape)}")
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"{label}[{bias!r}] must have shape {list(w.shape[:1])}, got {list(b.shape)}")
    return Network(label, [f"[{weight!r}]" for weight, _ in pairs], weights, biases)


def _paired_names(label: str, state: Mapping[str, Tensor]) -> list[tuple[str, str | None]]:
    weights = [name for name, value in state.items() if value.ndim in (2, 4)]
    biases = [name for name, value in state.items() if value.ndim == 1]
    for name, value in state.items():
        last = name.rsplit(".", 1)[-1]
        scale_of_norm = value.ndim == 1 and ("weight" in last or "running" in last)
        if value.ndim not in (1, 2, 4) or scale_of_norm:
            raise ValueError(
                f"{label} must hold weights [out, in] or [out, in, kh, kw] and biases [out] of linear layers and "
                f"convolutions, got {name!r} of shape {list(value.shape)}"
            )
    if not weights:
        raise ValueError(f"{label} must hold at least one weight [out, in] or [out, in, kh, kw], got {_shown(state)}")
    if len({re.sub(r"\d+", "#", name) for name in weights}) == 1:
        weights.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    named = {name: _bias_name(name, biases) for name in weights}
    if biases and not any(named.values()) and len(biases) == len(weights):
        return list(zip(weights, biases, strict=True))
    unused = [name for name in biases if name not in named.values()]
    if unused:
        raise ValueError(f"{label} must hold a weight for every bias, got {unused[0]!r} beside the weights {weights}")
    return list(named.items())


def _bias_name(weight: str, biases: Sequence[str]) -> str | None:
    head, dot, last = weight.rpartition(".")
    for pattern, replacement in (("weight", "bias"), ("kernel", "bias"), ("w", "b")):
        candidate = head + dot + last.replace(pattern, replacement, 1)
        if candidate in biases:
            return candidate
    return None


def _shown(state: Mapping[str, Any]) -> str:
    names = list(state)
    return str(names if len(names) <= 8 else [*names[:8], "..."])


def _split_sign_mask(mask, networks: list[Network]) -> list[Tensor] | None:
    """One bool [] or [neurons] per network."""
    if mask is None:
        return None
    if isinstance(mask, Tensor) and (mask.dtype != torch.bool or mask.ndim not in (1, 2)):
        raise TypeError(f"sign_mask must be bool [B] or [B, neurons], got {mask.dtype} {list(mask.shape)}")
    if not isinstance(mask, Tensor | Sequence):
        raise TypeError(f"sign_mask must be a bool tensor or a list of one per network, got {type(mask).__name__}")
    if len(mask) != len(networks):
        raise ValueError(f"sign_mask must have one entry per network, {len(networks)}, got {len(mask)}")
    masks = []
    for index, (entry, network) in enumerate(zip(mask, networks, strict=True)):
        device = network.weights[0].device
        if isinstance(entry, bool):
            entry = torch.tensor(entry, device=device)
        neurons = sum(layout_of(network))
        if not isinstance(entry, Tensor) or entry.dtype != torch.bool:
            raise TypeError(f"sign_mask[{index}] must be a bool, got {getattr(entry, 'dtype', type(entry).__name__)}")
        if entry.shape not in ((), (neurons,)):
            raise ValueError(f"sign_mask[{index}] must have shape [] or [{neurons}], got {list(entry.shape)}")
        if entry.device != device:
            raise ValueError(f"sign_mask[{index}] must be on {device}, got {entry.device}")
        masks.append(entry)
    return masks


def _build(
    networks: list[Network],
    *,
    input_value: float | None,
    masks: list[Tensor] | None,
    kernel_size: tuple[int, int] | None,
    linear_tap: str,
) -> GraphBatch:
    check_tensors(networks)
    pixels = {network.shapes(): pixels_of(network) for network in networks}
    grid = grid_of(networks, max(itertools.chain.from_iterable(pixels.values())), kernel_size, linear_tap)
    batches = []
    position = 0
    for shapes, run in itertools.groupby(networks, key=Network.shapes):
        run = list(run)
        weights, biases = [], []
        for layer, shape in enumerate(shapes):
            stacked = torch.stack([network.weights[layer] for network in run])
            weights.append(edge_features(stacked, pixels[shapes][layer], grid))
            found = [network.biases[layer] for network in run]
            biases.append(torch.stack([stacked.new_zeros(shape[0]) if b is None else b for b in found]))
        value = (0.0 if any(len(shape) == 4 for shape in shapes) else 1.0) if input_value is None else input_value
        mask = None
        if masks is not None:
            entries = masks[position : position + len(run)]
            size = 1 if all(entry.ndim == 0 for entry in entries) else sum(layout_of(run[0]))
            mask = torch.stack([entry.expand(size) for entry in entries])
            mask = mask.squeeze(1) if size == 1 else mask
        batches.append(GraphBatch.from_weights(weights, biases, input_value=value, sign_mask=mask))
        position += len(run)
    batch = GraphBatch.cat(batches)
    batch.architectures = tuple(Architecture(tuple(w.ndim == 4 for w in network.weights)) for network in networks)
    return batch


# -- live modules ----------------------------------------------------------------------------------------------------


class _Item(NamedTuple):
    """A layer, or a module that stands between layers, with the containers around it, outermost first.

    ``weight`` is None for all but layers. ``kinds`` are the symmetries of a known module, None for an unknown one;
    ``activates`` tells activations from pooling and the like. A container is (path, whether it runs its children in
    order for certain).
    """

    path: str
    cls: str
    containers: tuple[tuple[str, bool], ...]
    weight: Tensor | None = None
    bias: Tensor | None = None
    kinds: frozenset[str] | None = None
    activates: bool = True


def from_modules(
    modules: Sequence[nn.Module],
    *,
    inputs: Tensor | Sequence[Tensor] | None = None,
    input_value: float | None = None,
    activation: str | None = None,
    module_symmetry: Mapping[type[nn.Module], str] | None = None,
    kernel_size: tuple[int, int] | None = None,
    linear_tap: str = "centre",
) -> GraphBatch:
    """Batch of live networks, in the order of the list, with the symmetry that their activations have.

    A network is a stack of Linear and Conv2d with activations, dropout, Flatten and pooling between them: an
    nn.Sequential, or a module whose children, in the order of their definition, are such a stack. ``forward`` is not
    read. Sine layers are known by their class's name (Sine, Siren, SineLayer) or an attribute ``w0`` or ``omega_0``, on
    their own or around one linear layer. With ``inputs`` any feed-forward module goes: `tracing.trace` reads
    ``forward``, and says what is understood and which symmetries neurons have.

    What stands between two layers decides on the neurons there: odd functions (tanh, sine, softsign, shrinkages) have
    the sign symmetry, positively homogeneous ones (ReLU, LeakyReLU, max pooling) the scale symmetry, linear ones
    (identity, average pooling) both, others neither. What stands before the first and after the last layer does not
    matter.

    The batch's ``symmetry`` is "sign" or "scale" if all hidden neurons of all networks have it, "permutation" if some
    neuron has neither, else "hetero"; where only linear functions occur, "scale". Its ``sign_mask`` is set for all but
    "permutation"; input and output neurons take the value of the hidden layer next to them.

    Args:
        modules: the networks; architectures may differ.
        inputs: an example of what ``forward`` takes; then `trace` reads the modules one by one, and ``activation``,
            ``module_symmetry`` and ``linear_tap`` are not needed. For many modules of one architecture `trace` and
            `TracedNetwork.batch` are faster.
        input_value, kernel_size, linear_tap: see `from_state_dicts`.
        activation: "sign", "scale" or "permutation": the symmetry of what ``forward`` applies between two layers with
            no activation module between them. Needed where ``forward`` may apply one: outside nn.Sequential.
        module_symmetry: the symmetry ("sign", "scale" or "permutation") of the user's own activation classes.

    Returns:
        A `GraphBatch`. Deterministic; gradients flow to the modules' parameters.

    Raises:
        TypeError, ValueError: an empty list; an entry that is no module; a module that is no such stack (the message
            names the child and what is supported); parameters of several dtypes or devices; layers that do not fit.
    """
    check_list("modules", modules)
    if inputs is not None:
        unread = {"activation": activation, "module_symmetry": module_symmetry}
        unread["linear_tap"] = None if linear_tap == "centre" else linear_tap
        for name, value in unread.items():
            if value is not None:
                raise ValueError(f"{name} must be left out with inputs (forward says it), got {value!r}")
        return _from_traces(modules, inputs, input_value, kernel_size)
    between = None if activation is None else _kinds("activation", activation)
    own = {cls: _kinds(f"module_symmetry[{cls.__name__}]", kind) for cls, kind in (module_symmetry or {}).items()}
    networks, hidden = [], []
    for index, module in enumerate(modules):
        label = f"modules[{index}]"
        if not isinstance(module, nn.Module):
            raise TypeError(f"{label} must be a torch.nn.Module, got {type(module).__name__}")
        items: list[_Item] = []
        _read(module, label, (), own, items)
        layers = [k for k, item in enumerate(items) if item.weight is not None]
        if not layers:
            raise ValueError(f"{label} must hold at least one Linear or Conv2d, got {type(module).__name__}")
        weights, biases = [items[k].weight for k in layers], [items[k].bias for k in layers]
        networks.append(Network("", [items[k].path for k in layers], weights, biases))
        hidden.append([_kinds_between(items[a : b + 1], between) for a, b in itertools.pairwise(layers)])
    symmetry, masks = _symmetry_of(networks, hidden)
    batch = _build(networks, input_value=input_value, masks=masks, kernel_size=kernel_size, linear_tap=linear_tap)
    batch.symmetry = symmetry
    return batch


def _from_traces(modules: Sequence[nn.Module], inputs, input_value, kernel_size) -> GraphBatch:
    from .tracing import trace

    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    traced = [trace(module, *inputs, input_value=input_value, kernel_size=kernel_size) for module in modules]
    return GraphBatch.cat([network.batch([module]) for network, module in zip(traced, modules, strict=True)])


def _kinds(name: str, kind: str) -> frozenset[str]:
    if kind not in _KINDS:
        raise ValueError(f"{name} must be one of {', '.join(_KINDS)}, got {kind!r}")
    return _KINDS[kind]


def _read(module: nn.Module, path: str, containers, own, items: list[_Item]) -> None:
    """Append the items of ``module`` in the order in which they run."""
    cls = type(module).__name__

    def unsupported(problem: str) -> ValueError:
        return ValueError(f"{path} is a {cls} {problem}; supported are {_SUPPORTED}")

    def add(**values) -> None:
        items.append(_Item(path, cls, containers, **values))

    if isinstance(module, (*own,)):
        add(kinds=next(kinds for base, kinds in own.items() if isinstance(module, base)))
    elif isinstance(module, nn.Linear | nn.Conv2d):
        if nn.parameter.is_lazy(module.weight):
            raise unsupported("that has no parameters before its first call")
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            raise unsupported(f"with groups={module.groups}, and only groups=1 joins every two channels")
        add(weight=module.weight, bias=module.bias)
    elif (known := _known_kinds(module, unsupported)) is not None:
        add(kinds=known, activates=not isinstance(module, _PASSIVE))
    elif _is_sine(module) and _read_sine(module, path, containers, own, items):
        return
    elif any(parameter is not None for parameter in module._parameters.values()):
        raise unsupported(f"with the parameters {[k for k, v in module._parameters.items() if v is not None]}")
    elif module._modules or isinstance(module, nn.Sequential):
        in_order = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        for name, child in module._modules.items():  # children() would leave out a module that occurs twice
            if child is not None:
                _read(child, f"{path}.{name}", (*containers, (path, in_order)), own, items)
    else:
        add()


def _known_kinds(module: nn.Module, unsupported) -> frozenset[str] | None:
    if isinstance(module, nn.PReLU) and module.num_parameters != 1:
        raise unsupported(f"with num_parameters={module.num_parameters}: slopes per neuron are no part of the graph")
    if isinstance(module, nn.Flatten) and (module.start_dim not in (1, -3) or module.end_dim not in (-1, 3)):
        raise unsupported(
            f"of dimensions {module.start_dim} to {module.end_dim}, and only 1 to -1 keeps channels together"
        )
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return _KINDS["sign" if module.min_val == -module.max_val else "permutation"]
    return next((kinds for base, kinds in _MODULE_KINDS.items() if isinstance(module, base)), None)


def _is_sine(module: nn.Module) -> bool:
    named = type(module).__name__ in ("Sine", "Siren", "SineLayer", "SirenLayer")
    return named or any(hasattr(module, name) for name in ("w0", "omega_0"))


def _read_sine(module: nn.Module, path: str, containers, own, items: list[_Item]) -> bool:
    """A sine, alone or around one linear layer; False if the module is neither (such as a whole network of them)."""
    cls = type(module).__name__
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    children = [(f"{path}.{name}", child) for name, child in module._modules.items() if child is not None]
    layers = [child for _, child in children if isinstance(child, nn.Linear | nn.Conv2d)]
    inside = (*containers, (path, True))
    if "weight" in parameters and parameters.keys() <= {"weight", "bias"} and not layers:
        items.append(_Item(path, cls, inside, weight=parameters["weight"], bias=parameters.get("bias")))
    elif parameters or len(layers) > 1 or (children and not layers):
        return False
    for name, child in children:
        _read(child, name, inside, own, items)
    if len(children) == len(layers):
        items.append(_Item(path, cls, containers, kinds=_KINDS["sign"]))
    return True


def _kinds_between(items: list[_Item], between: frozenset[str] | None) -> frozenset[str]:
    """The symmetries of the neurons between two layers, the first and the last of ``items``."""
    first, *middle, last = items
    kinds = _BOTH
    for item in middle:
        if item.kinds is None:
            raise ValueError(f"{item.path} is a {item.cls}, whose symmetry is unknown; supported are {_SUPPORTED}")
        kinds &= item.kinds
    shared = sum(a == b for a, b in zip(first.containers, last.containers, strict=False))
    around = first.containers[shared - 1 :] + last.containers[shared - 1 :]
    if any(item.activates for item in middle) or all(in_order for _, in_order in around):
        return kinds
    if between is None:
        raise ValueError(
            f"activation must say what forward applies between {first.path} and {last.path} ({', '.join(_KINDS)}): "
            "no activation module stands there, got None"
        )
    return kinds & between


def _symmetry_of(networks: list[Network], hidden: list[list[frozenset[str]]]) -> tuple[str, list[Tensor] | None]:
    """(symmetry of the batch, bool [neurons] per network: True for sign) from the symmetries of each hidden layer."""
    found = set(itertools.chain.from_iterable(hidden))
    if frozenset() in found:
        return "permutation", None
    linear_is_sign = _KINDS["sign"] in found and _KINDS["scale"] not in found
    masks, values = [], set()
    for network, layers in zip(networks, hidden, strict=True):
        signs = [kinds == _KINDS["sign"] or (kinds == _BOTH and linear_is_sign) for kinds in layers] or [linear_is_sign]
        values.update(signs)
        per_layer = [signs[0], *signs, signs[-1]] if layers else signs * 2
        mask = torch.from_numpy(np.repeat(per_layer, layout_of(network)))
        masks.append(mask.to(network.weights[0].device))
    return "hetero" if len(values) == 2 else "sign" if True in values else "scale", masks
