"""Check this installation: every op and every published model against float64, and equivariance.

Errors are relative to the largest magnitude of the float64 result. Bounds are not constants: each is a small multiple
of the error that the plain PyTorch version makes in the same dtype on the same numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scalegmn_fast
from scalegmn_fast import backends, ops, reference, testing
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config, published_config, published_names
from scalegmn_fast.models.config import resolve
from scalegmn_fast.reference.scalegmn import ACTIVATIONS, scalegmn
from scalegmn_fast.testing import relative_error

__all__ = ["Row", "check_models", "check_ops", "configure", "run"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A bound is a factor times the error of plain PyTorch, in units of rounding, and never less than the second number:
# plain PyTorch may by luck be exact. Half types are computed in float32 and rounded once.
OP_FACTOR, OP_UNITS, OP_UNITS_HALF = 4.0, 16.0, 2.0
MODEL_FACTOR, MODEL_UNITS = 16.0, 256.0
QUICK_WIDTH = 16
BATCH = 2


@dataclass(frozen=True)
class Row:
    """One line of the table: what was compared, and (error, bound) of each quantity."""

    part: str
    case: str
    backend: str
    device: str
    dtype: str
    quantities: Mapping[str, tuple[float, float]]
    note: str = ""

    @property
    def ok(self) -> bool:
        return not self.note and all(error <= bound < math.inf for error, bound in self.quantities.values())


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``scalegmn-fast check``."""
    parser.add_argument(
        "--quick", action="store_true", help=f"models with width {QUICK_WIDTH} instead of the published one"
    )
    parser.add_argument(
        "--backend", action="append", choices=backends.BACKENDS, help="only this backend (may be repeated)"
    )
    parser.add_argument("--device", help="cpu or cuda; default: both where there is a GPU")
    parser.add_argument("--model", action="append", metavar="NAME", help="only this published model (may be repeated)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to FILE as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs all checks and prints the table; 0 if all pass, 1 if any fails.

    Raises:
        ValueError: a backend or device asked for by name is not available here, or an unknown model name.
    """
    start = time.perf_counter()
    devices = [args.device] if args.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    asked = [(backend, device) for device in devices for backend in args.backend or backends.BACKENDS]
    missing = {place: reason for place in asked if (reason := why_unavailable(*place)) is not None}
    places = [place for place in asked if place not in missing]
    unserved = {backend for backend, _ in asked} - {backend for backend, _ in places} if args.backend else set()
    if not places or unserved:
        reasons = [f"{name} on {device}: {why}" for (name, device), why in missing.items()]
        raise ValueError(f"nothing to check with: {'; '.join(reasons)}")
    names = args.model or published_names()
    for name in names:
        if name not in published_names():
            raise ValueError(f"--model must be one of {', '.join(published_names())}, got {name!r}")

    rows = []
    print(_header())
    for row in chain(check_ops(places, seed=args.seed), check_models(names, places, quick=args.quick, seed=args.seed)):
        print(_line(row), flush=True)
        rows.append(row)
    for (backend, device), reason in missing.items():
        print(f"not checked: {backend} on {device}: {reason}")
    failed = [row for row in rows if not row.ok]
    seconds = time.perf_counter() - start
    print(f"{len(rows) - len(failed)} of {len(rows)} checks pass ({seconds:.0f} s)")
    if args.json is not None:
        _write_json(args.json, rows, missing)
    return 1 if failed else 0


def why_unavailable(backend: str, device: str) -> str | None:
    """None if the backend serves tensors of this device here, else the reason it gives."""
    try:
        sample = torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    reasons = (backends.why_not(backend, op, sample) for op in backends.OPS)
    return next((reason for reason in reasons if reason is not None), None)


# Ops.


@dataclass(frozen=True)
class OpCase:
    """``function(module, *leaves)`` calls the op of `ops` or of `reference`; leaves are float64 tensors on the CPU."""

    op: str
    case: str
    leaves: tuple[Tensor, ...]
    function: Callable[..., Tensor]


def op_cases(seed: int = 0) -> Iterator[OpCase]:
    """Every kind, activation and reduction, at a production and at an odd width, with the named edge cases."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for rows, d in ((64, 128), (37, 33)):
        h = randn(rows, d)
        h[0] = 0.0
        vectors = (randn(d), 1 + 0.3 * randn(d), randn(d))
        for activation in ACTIVATIONS:
            # Without any parameter act(h) + act(-h) is a constant where act is odd up to one.
            without = () if activation in ("identity", "tanh", "sigmoid", "sine") else (0,)
            for given in (*without, 1, 3):
                with_what = {0: "", 1: " +bias", 3: " +bias +norm"}[given]

                def activated(module, h, *parameters, activation=activation):
                    return module.symmetrize(h, *parameters, kind="activation", activation=activation, w0=3.0)

                yield OpCase("symmetrize", f"{activation}{with_what} d={d}", (h, *vectors[:given]), activated)
        for kind in ("abs", "normalize"):

            def canonical(module, h, kind=kind):
                return module.symmetrize(h, kind=kind)

            yield OpCase("symmetrize", f"{kind} d={d}", (h,), canonical)

    # One huge segment among tiny and empty ones.
    lengths = torch.tensor([3, 0, 200, 1, 1, 0, 5, 2, 0])
    ptr = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    order = torch.randperm(int(ptr[-1]), generator=generator)
    names = ("sum", "mean", "min", "max", "var", "std")
    # Neighbouring slots lie apart, so that no small segment's deviation is a difference of nearly equal numbers.
    alternating = 2.0 - 4.0 * (torch.arange(int(ptr[-1])) % 2)
    for d in (128, 33):
        slots = alternating[:, None] + 0.5 * randn(int(ptr[-1]), d).tanh()
        # Moments also of rows far from 0, about which the mean is rounded by more than the deviations are.
        for reduce, distance in (*((reduce, 0.0) for reduce in (*names, names)), ("var", 2000.0), ("std", 2000.0)):
            for how in (None, order):
                x = slots + distance
                x = x if how is None else torch.empty_like(x).index_copy(0, order, x)

                def reduced(module, x, reduce=reduce, how=how):
                    index = None if how is None else how.to(x.device)
                    return module.segment_reduce(x, ptr.to(x.device), reduce, order=index)

                label = reduce if isinstance(reduce, str) else "all six at once"
                label += f"{' far from 0' if distance else ''}{'' if how is None else ' +order'}"
                yield OpCase("segment_reduce", f"{label} d={d}", (x,), reduced)

    yield from _row_program_cases(randn, generator)


def _row_program_cases(randn: Callable[..., Tensor], generator: torch.Generator) -> Iterator[OpCase]:
    """A message with its edge update, for every activation, with and without norms."""
    rows, nodes = 300, 40
    ends = [torch.randint(nodes, (rows,), generator=generator) for _ in range(2)]
    ends[1] = ends[1].sort().values
    ptr = torch.searchsorted(ends[1], torch.arange(nodes + 1))
    for d in (128, 33):
        tables = (randn(rows, d), randn(nodes, d), randn(nodes, d))
        maps = [randn(d, d) / math.sqrt(d) for _ in range(4)]
        vectors = (randn(d), 1 + 0.1 * randn(d), 0.1 * randn(d), randn(d))
        for activation, norm in product(ACTIVATIONS, (True, False)):

            def message(module, e, x, u, w_e, w, w_1, w_2, b_1, weight, shift, b_2, activation=activation, norm=norm):
                device = e.device
                source, target = (end.to(device) for end in ends)
                norms = (weight, shift) if norm else (None, None)
                program = ops.RowProgram()
                section = program.section(rows)
                state = section.load(e)
                m = section.load_mul(section.linear(state, w_e), x, source)
                even = section.symmetrize(section.linear(m, w_1), b_1, *norms, activation, 1.5)
                gate = section.load_add(section.linear(even, w_2, b_2), u, target)
                section.add_up(section.mul(section.linear(m, w), gate))
                section.write(section.mul(state, section.norm_act(gate, *norms, activation, 1.5)))
                return torch.cat([out.flatten() for out in module.row_program(program, ptr.to(device))])

            label = f"{activation}{' normed' if norm else ''} d={d}"
            yield OpCase("row_program", label, (*tables, *maps, *vectors), message)


def check_ops(places: Sequence[tuple[str, str]], *, seed: int = 0) -> Iterator[Row]:
    """Every op case on every (backend, device) in every dtype it serves: result, and gradients of all inputs."""
    for case in op_cases(seed):
        for backend, device in places:
            if backend not in ("reference", *backends.OPS[case.op]):
                continue
            for label, dtype in DTYPES.items():
                if dtype in backends.DTYPES[backend]:
                    compute = partial(_check_op, case, backend, device, dtype)
                    yield _guarded(case.op, case.case, backend, device, label, compute)


def _check_op(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    rounded = [leaf.to(dtype) for leaf in case.leaves]
    exact = _op_results(case, reference, [leaf.double() for leaf in rounded])
    lower = torch.float32 if dtype == torch.float64 else dtype
    eager = _op_results(case, reference, [leaf.to(device, lower) for leaf in rounded])
    exact_lower = exact
    if lower != dtype:
        exact_lower = _op_results(case, reference, [leaf.to(lower).double() for leaf in rounded])
    with scalegmn_fast.backend(backend):
        actual = _op_results(case, ops, [leaf.to(device) for leaf in rounded])
    checks = []
    for got, plain, plain_exact, wanted in zip(actual, eager, exact_lower, exact, strict=True):
        units = max(OP_FACTOR * _error_units(plain, plain_exact), OP_UNITS_HALF if dtype.itemsize == 2 else OP_UNITS)
        checks.append((relative_error(got, wanted), units * torch.finfo(dtype).eps))
    return {"output": checks[0], "gradients": _worst(checks[1:])}


def _op_results(case: OpCase, module: Any, leaves: Sequence[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = case.function(module, *leaves)
    cotangent = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).cos().reshape(out.shape)
    grads = torch.autograd.grad(out, leaves, cotangent.to(out), allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


# Models.


def check_models(
    names: Sequence[str], places: Sequence[tuple[str, str]], *, quick: bool = False, seed: int = 0
) -> Iterator[Row]:
    """Every published model on every (backend, device), in float32 and, where served, float64: result and gradients
    against the oracle, and equivariance of the model's exact variant."""
    cases: dict[str, ModelCase] = {}

    def compute(name: str, backend: str, device: str, label: str) -> dict[str, tuple[float, float]]:
        if name not in cases:
            cases.clear()
            cases[name] = ModelCase(name, quick, seed)
        return cases[name].check(backend, device, DTYPES[label])

    for name in names:
        for backend, device in places:
            for label in ("float64", "float32"):
                if DTYPES[label] in backends.DTYPES[backend]:
                    this = partial(compute, name, backend, device, label)
                    yield _guarded("model", name, backend, device, label, this)


class ModelCase:
    """A published configuration with random parameters and networks, and the oracle's results for it."""

    def __init__(self, name: str, quick: bool, seed: int):
        self.config = model_arguments(name, QUICK_WIDTH if quick else None)
        layout, symmetry = self.config["layer_layout"], self.config["symmetry"]
        generator = torch.Generator().manual_seed(seed)
        d_e = self.config["graph_init"]["d_in_e"]
        self.input_value = 1.0 if d_e == 1 else 0.0
        drawn = testing.random_network(layout, BATCH, d_e=d_e, generator=generator, dtype=torch.float32)
        self.weights, self.biases = drawn
        self.mask = testing.random_sign_mask(layout, BATCH, generator=generator)
        self.element = testing.random_group_element(
            layout, symmetry, batch=BATCH, sign_mask=self.mask, generator=generator
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # published models that are not exactly equivariant say so
            torch.manual_seed(seed)
            self.model = from_config(self.config).eval()
            self.exact_model = from_config(exact_variant(self.config)).eval()
        for model in (self.model, self.exact_model):
            testing.randomize_parameters(model, generator=generator, spread=0.02)
        self.cotangents: list[Tensor] | None = None
        self.own_equivariance: dict[tuple[str, torch.dtype], float] = {}
        self.exact = self.oracle(torch.float64)
        self.error_units = {
            key: _error_units(value, self.exact[key]) for key, value in self.oracle(torch.float32).items()
        }

    def results(self, outputs: Any, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = [outputs] if isinstance(outputs, Tensor) else [*outputs[0], *outputs[1]]
        if self.cotangents is None:
            self.cotangents = [
                torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).cos().reshape(out.shape) for out in outputs
            ]
        inputs = list(leaves.values())
        cotangents = [cotangent.to(out) for cotangent, out in zip(self.cotangents, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
        found = {f"output[{k}]": out.detach() for k, out in enumerate(outputs)}
        for name, leaf, grad in zip(leaves, inputs, grads, strict=True):
            found[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
        return found

    def oracle(self, dtype: torch.dtype) -> dict[str, Tensor]:
        parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in _trainable(self.model).items()}
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.model.state_dict().items()}
        weights, biases = ([t.to(dtype).requires_grad_() for t in group] for group in (self.weights, self.biases))
        out = scalegmn(
            self.config,
            {**state, **parameters},
            weights,
            biases,
            input_value=self.input_value,
            sign_mask=self.mask,
        )
        return self.results(out, {**_numbered(weights, biases), **parameters})

    def check(self, backend: str, device: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
        model, exact_model = (deepcopy(m).to(device, dtype) for m in (self.model, self.exact_model))
        weights, biases = (
            [t.detach().to(device, dtype).requires_grad_() for t in group] for group in (self.weights, self.biases)
        )
        mask = self.mask.to(device)
        with scalegmn_fast.backend(backend):
            batch = GraphBatch.from_weights(weights, biases, input_value=self.input_value, sign_mask=mask)
            actual = self.results(model(batch), {**_numbered(weights, biases), **_trainable(model)})
        eps = torch.finfo(dtype).eps
        typical = sorted(self.error_units.values())[len(self.error_units) // 2]
        checks: dict[str, list[tuple[float, float]]] = {"output": [], "gradients": []}
        for key, value in actual.items():
            bound = max(MODEL_FACTOR * max(self.error_units[key], typical), MODEL_UNITS) * eps
            checks["output" if key.startswith("output") else "gradients"].append(
                (relative_error(value, self.exact[key]), bound)
            )
        return {
            **{quantity: _worst(found) for quantity, found in checks.items()},
            "equivariance": self.equivariance(exact_model, backend, device, dtype),
        }

    def equivariance(
        self, model: torch.nn.Module, backend: str, device: str, dtype: torch.dtype
    ) -> tuple[float, float]:
        """Error of the exact variant under a random group element, and a bound from the oracle's own."""
        weights, biases = ([t.to(device, dtype) for t in group] for group in (self.weights, self.biases))
        element = testing.GroupElement(
            tuple(p.to(device) for p in self.element.permutations),
            tuple(s.to(device, dtype) for s in self.element.scales),
        )
        mask = self.mask.to(device)
        with scalegmn_fast.backend(backend):
            error = testing.equivariance_error(
                model, weights, biases, element, sign_mask=mask, input_value=self.input_value
            )
        if (device, dtype) not in self.own_equivariance:
            state, config = model.state_dict(), exact_variant(self.config)

            def oracle(w: Sequence[Tensor], b: Sequence[Tensor], flags: Tensor | None) -> Any:
                return scalegmn(config, state, w, b, input_value=self.input_value, sign_mask=flags)

            own = testing.equivariance_error(oracle, weights, biases, element, sign_mask=mask)
            self.own_equivariance[device, dtype] = own
        eps = torch.finfo(dtype).eps
        return error, max(MODEL_FACTOR * self.own_equivariance[device, dtype], MODEL_UNITS * eps)


def model_arguments(name: str, width: int | None = None) -> dict[str, Any]:
    """The complete arguments of a published model, at another hidden width where one is given."""
    config = published_config(name)
    if width is not None:
        config["scalegmn_args"]["d_hid"] = width
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return resolve(config)


def exact_variant(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model with ``canonical_eps`` 0 and, for bidirectional scale and hetero, backward edges that are exactly
    equivariant."""
    changed = {**config, "canonical_eps": 0.0}
    inexact = config.get("bidirectional_edges", "original") == "original"
    if inexact and config["direction"] == "bidirectional" and config["symmetry"] in ("scale", "hetero"):
        changed["bidirectional_edges"] = "carried"
    return changed


# Errors, bounds and the table.


def _error_units(value: Tensor, exact: Tensor) -> float:
    """Relative error in units of rounding of the value's dtype."""
    return relative_error(value, exact) / torch.finfo(value.dtype).eps


def _worst(checks: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return max(checks, key=lambda check: check[0] / check[1] if check[1] < math.inf else math.inf)


def _numbered(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> dict[str, Tensor]:
    named = {f"weights[{k}]": w for k, w in enumerate(weights)}
    return {**named, **{f"biases[{k}]": b for k, b in enumerate(biases)}}


def _trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _guarded(
    part: str, case: str, backend: str, device: str, dtype: str, compute: Callable[[], dict[str, tuple[float, float]]]
) -> Row:
    """The row that ``compute`` gives; a crash is a failed row."""
    try:
        return Row(part, case, backend, device, dtype, compute())
    except Exception as error:
        return Row(part, case, backend, device, dtype, {}, note=f"{type(error).__name__}: {error}".splitlines()[0])


COLUMNS = (("op or model", 15), ("case", 33), ("backend", 9), ("device", 6), ("dtype", 8))
QUANTITIES = ("output", "gradients", "equivariance")


def _header() -> str:
    names = [name.ljust(width) for name, width in COLUMNS]
    return "  ".join([*names, *(f"{name} (bound)".ljust(17) for name in QUANTITIES), "result"])


def _line(row: Row) -> str:
    values = (row.part, row.case, row.backend, row.device, row.dtype)
    cells = [value.ljust(width) for value, (_, width) in zip(values, COLUMNS, strict=True)]
    for name in QUANTITIES:
        error, bound = row.quantities.get(name, (None, None))
        cells.append(("" if error is None else f"{error:.1e} ({bound:.1e})").ljust(17))
    return "  ".join([*cells, "ok" if row.ok else f"FAIL {row.note}".rstrip()])


def _write_json(path: Path, rows: Sequence[Row], missing: Mapping[tuple[str, str], str]) -> None:
    content = {
        "build": scalegmn_fast.build_info(),
        "not_checked": [{"backend": name, "device": device, "reason": why} for (name, device), why in missing.items()],
        "rows": [
            {
                "part": row.part,
                "case": row.case,
                "backend": row.backend,
                "device": row.device,
                "dtype": row.dtype,
                "ok": row.ok,
                "note": row.note,
                **{name: {"error": error, "bound": bound} for name, (error, bound) in row.quantities.items()},
            }
            for row in rows
        ],
    }
    path.write_text(json.dumps(content, indent=1))
