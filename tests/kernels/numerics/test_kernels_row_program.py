"""Row programs in Triton: every step and activation, forward and backward, against the reference in float64."""

import copy

import pytest
import torch
from scalegmn_fast.kernels import row_program as kernels
from scalegmn_fast.kernels import sorted_index, tuning
from scalegmn_fast.kernels.launching import compile_ahead
from scalegmn_fast.kernels.row_source import parts_of

from scalegmn_fast import backend, testing
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config, published_config
from scalegmn_fast.ops.row_program import RowProgram
from scalegmn_fast.reference.row_program import (
    ACTIVATIONS,
    OPERATIONS,
    row_program_backward,
    row_program_forward,
    sections,
)
from scalegmn_fast.reference.symmetrize import ACTIVATIONS as SYMMETRIC
from scalegmn_fast.testing import assert_close_to_float64, nan_poisoned, relative_error

NODES = 7
LAYOUT = [2, 3, 4, 1]
SEGMENTS = {
    "no rows": [0, 0, 0],
    "one row": [1],
    "one huge among many tiny": [1, 0, 2, 90, 1, 3, 0, 1],
    "one across all tiles": [100],
    "ends on tiles": [32, 32, 64],
    "all of one row": [1] * 70,
    "isolated first and last": [0, 5, 40, 0],
}


class Inputs:
    """Tensors of one dtype, two indices (one sorted) and segments."""

    def __init__(self, lengths, width, dtype, device):
        rows = sum(lengths)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, dtype)

        self.rows, self.width = rows, width
        self.ptr = torch.tensor([0, *lengths], device=device).cumsum(0)
        self.index = [torch.randint(NODES, (rows,)), torch.randint(NODES, (rows,)).sort().values.int()]
        self.index = [index.to(device) for index in self.index]
        self.tensors = {
            "e": draw(rows + 2, width),
            "x": draw(NODES, width),
            "u": draw(NODES, width),
            "factor": draw(rows, 1),
            "factors": draw(NODES, 1),
            "wide": draw(width, 2 * width, scale=width**-0.5),
            **{name: draw(width, width, scale=width**-0.5) for name in ("w", "w_1", "w_2", "w_3")},
            **{name: draw(width) for name in ("b_1", "b_2", "b_3", "shift", "shift_2")},
            **{name: 1 + draw(width, scale=0.1) for name in ("weight", "weight_2")},
        }


def message(inputs, activation="silu", norm=True, dropout=0.0, cuts=(1 / 3, 2 / 3)):
    """Arguments of a program with every step of the published configurations in three sections."""
    t, index, rows = inputs.tensors, inputs.index, inputs.rows
    symmetric = activation if activation in SYMMETRIC else "silu"
    run, bounds = RowProgram(), [0, *(int(rows * cut) for cut in cuts), rows]
    for number, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        s = run.section(end - begin)
        e = s.load(t["e"])
        m = s.load_mul(s.linear(e, t["w"]), t["x"], index[0])
        h = s.linear(m, t["w_1"])
        norms = (t["weight"], t["shift"]) if norm else (None, None)
        even = s.symmetrize(h, t["b_1"] if number else None, *norms, symmetric, 1.5)
        z = s.load_add(s.linear(even, t["w_2"], t["b_2"]), t["u"], index[1])
        z = s.dropout(z, dropout) if dropout and number else z
        gate = s.norm_act(z, *((t["weight_2"], t["shift_2"]) if norm else (None, None)), activation, 1.5)
        out = s.mul(m, s.linear(gate, t["w_3"], t["b_3"]))
        if number == 2:  # a value that is read twice by one step, tables that are read again, and steps for nobody
            s.negate(s.load(t["u"], index[1]))
            out = s.add(s.add(out, s.mul(z, z)), s.scale(s.load(t["x"], index[0]), t["factors"], index[1]))
        s.add_up(out)
        if number == 0:
            pair = s.concat(s.abs(s.negate(e)), s.normalize(m, 1e-10))
            s.write(s.scale(s.add_vector(s.linear(pair, t["wide"]), t["b_3"]), t["factor"]))
    return list(run.arguments(inputs.ptr))


def cast(arguments, dtype):
    return [[t.to(dtype) for t in arguments[0]], *arguments[1:]]


def results(module, arguments):
    """[sums, rows] and the gradients of all tensors; outputs of the kernels are poisoned first."""
    forward, backward = module
    dtype = arguments[0][0].dtype
    out = forward(*arguments)
    cotangents = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).cos().view(o.shape) for o in out[:2]]
    cotangents = [c.to(out[0].device, dtype) for c in cotangents]
    wanted = [True] * len(arguments[0])
    return [*out[:2], *backward(*cotangents, out[0], *out[2:], *arguments, wanted)]


REFERENCE = row_program_forward, row_program_backward
TRITON = kernels.row_program, kernels.row_program_backward


def assert_as_reference(arguments):
    """As near to float64 as the reference in the same dtype; in float64 to 1e-10."""
    dtype = arguments[0][0].dtype
    exact = results(REFERENCE, cast(arguments, torch.float64))
    with nan_poisoned():
        found = results(TRITON, arguments)
    plain = exact if dtype == torch.float64 else results(REFERENCE, arguments)
    for k, (a, p, e) in enumerate(zip(found, plain, exact, strict=True)):
        if dtype == torch.float64:
            assert relative_error(a, e) < 1e-10, k
        else:
            assert_close_to_float64(a, p, e, ulps=64, name=f"result {k}")


@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_segments(lengths, device):
    assert_as_reference(message(Inputs(lengths, 5, torch.float64, device)))


@pytest.mark.parametrize("width", [1, 33, 123, 130])
def test_widths(width, device):
    assert_as_reference(message(Inputs([3, 40], width, torch.float64, device), norm=width > 1))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation, norm, device):
    assert_as_reference(message(Inputs([9, 2], 5, torch.float64, device), activation, norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_float64_as_the_reference(dtype, device):
    assert_as_reference(message(Inputs([4, 0, 21, 18], 32, dtype, device)))


@pytest.mark.parametrize(
    ("tables", "weights", "kept"),
    [("bfloat16", "bfloat16", "bf16"), ("float32", "bfloat16", "fp32"), ("float16", "float16", "fp32")],
)
def test_backward_keeps_rows_in_the_type_of_results_or_wider(tables, weights, kept, device):
    arguments = message(Inputs([4, 2], 5, torch.float32, device))
    linear = {step.t0 for section in sections(*arguments[2:5]) for step in section.steps if step.op == "linear"}
    types = [getattr(torch, weights if k in linear else tables) for k in range(len(arguments[0]))]
    tensors = [tensor.to(dtype) for tensor, dtype in zip(arguments[0], types, strict=True)]
    planned = kernels.plan_of(tensors, *arguments[1:5], [True] * len(tensors))
    assert {section.source.saved_type for section in planned} == {kept}


def test_dropout_is_the_reference_s_mask(device):
    inputs = Inputs([4, 0, 21, 18], 13, torch.float64, device)
    arguments = message(inputs, dropout=0.4)
    assert_as_reference(arguments)
    assert relative_error(kernels.row_program(*arguments)[0], kernels.row_program(*message(inputs))[0]) > 0.1


def test_tiles_that_share_a_place(device, monkeypatch):
    """Launches after the first add to what the first left."""
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 2)
    assert_as_reference(message(Inputs([100, 3, 100], 5, torch.float64, device)))


def test_tuned_tiles_give_what_pinned_ones_give(device, monkeypatch, tmp_path):
    """What is run to be timed leaves nothing behind: outputs and gradients are those of the tile alone, to the bit."""
    arguments = message(Inputs([4, 21, 2], 3, torch.float32, device), dropout=0.2)
    monkeypatch.setenv(kernels.PRECISION, "tf32")  # the table's tile has 64 rows in both directions
    monkeypatch.setenv(kernels.ROWS, "128")
    expected = results(TRITON, arguments)
    monkeypatch.delenv(kernels.ROWS)
    timed = []
    monkeypatch.setenv(tuning.TUNE, "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "possible", lambda device: True)
    monkeypatch.setattr(tuning, "spills", lambda launched: 0)
    monkeypatch.setattr(tuning, "milliseconds", lambda call: timed.append(call()) or -(len(timed) % 3 == 2))
    with nan_poisoned():
        found = results(TRITON, arguments)
    assert [section.tile.rows for section in tuning._chosen.values()] == [128] * 6 and len(timed) == 18
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def test_twice_the_same_bits(device):
    arguments = message(Inputs([4, 40, 2], 5, torch.float32, device), dropout=0.2)
    for first, second in zip(results(TRITON, arguments), results(TRITON, arguments), strict=True):
        assert torch.equal(first, second)


def test_nothing_runs_while_it_is_compiled_ahead_and_all_is_right_after_it(device):
    arguments = message(Inputs([4, 40, 2], 6, torch.float32, device), dropout=0.2)
    with compile_ahead(2), nan_poisoned():
        _, rows, *_ = results(TRITON, arguments)
    assert rows.isnan().all()
    assert_as_reference(arguments)


def test_an_index_is_sorted_once(device, monkeypatch):
    """For as long as it lives and stays what it was; parts of one tensor share what is kept."""
    arguments, sorts = message(Inputs([40, 30, 2], 3, torch.float64, device)), []
    original = torch.sort
    monkeypatch.setattr(torch, "sort", lambda *a, **k: sorts.append(0) or original(*a, **k))
    both = arguments[1][0].repeat(2)
    kept, rows = len(sorted_index._kept), both.shape[0] // 2
    for first, expected in ((0, 3), (0, 0), (rows, 1)):
        sorts.clear()
        arguments[1] = [both[first : first + rows], arguments[1][1]]
        assert_as_reference(arguments)
        assert len(sorts) == expected
    both.copy_(both.flip(0))
    sorts.clear()
    assert_as_reference(arguments)
    assert len(sorts) == 1
    assert len(sorted_index._kept) == kept + 2
    del both, arguments
    assert len(sorted_index._kept) == kept


def test_only_wanted_gradients(device):
    arguments = message(Inputs([4, 7], 5, torch.float64, device))
    exact = row_program_forward(*arguments)
    cotangents = [torch.randn_like(out) for out in exact[:2]]
    count = len(arguments[0])
    for chosen in range(0, count, 3):
        wanted = [k == chosen for k in range(count)]
        found = kernels.row_program_backward(*cotangents, *exact[:1], *exact[2:], *arguments, wanted)
        expected = row_program_backward(*cotangents, *exact[:1], *exact[2:], *arguments, wanted)
        for a, e in zip(found, expected, strict=True):
            assert a.shape == e.shape and relative_error(a, e) < 1e-10


def test_a_nan_stays_in_its_segment(device):
    inputs = Inputs([3, 4, 5], 5, torch.float32, device)
    inputs.tensors["e"][4, 1] = float("nan")
    out = kernels.row_program(*message(inputs))[0]
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_every_operation_is_in_the_test_program(device):
    arguments = message(Inputs([4, 7], 5, torch.float64, device), dropout=0.5)
    seen = {step.op for section in sections(*arguments[2:5]) for step in section.steps}
    assert seen | {"head_dot"} == set(OPERATIONS)  # in test_kernels_row_reductions


def test_rows_wider_than_a_tile_are_parts():
    assert parts_of(64) == (64,) and parts_of(192) == (64, 64, 64) and parts_of(130) == (64, 64, 2)


def test_too_wide(device):
    program = RowProgram()
    section = program.section(2)
    section.write(section.load(torch.randn(2, 1025, device=device)))
    with backend("triton"), pytest.raises(RuntimeError, match="step 0 has rows of width 1025, of 1024 at most"):
        program.run()


def test_precision_follows_pytorch_s_setting(monkeypatch):
    monkeypatch.delenv(kernels.PRECISION, raising=False)
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert kernels.dot_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)
    monkeypatch.setenv(kernels.PRECISION, "tf32x3")
    assert kernels.dot_precision() == "tf32x3"
    monkeypatch.setenv(kernels.PRECISION, "fp8")
    with pytest.raises(ValueError, match=f"{kernels.PRECISION}: expected one of ieee, tf32x3, tf32, got 'fp8'"):
        kernels.dot_precision()


def model_results(model, numbers, name, dtype, device):
    """Output and gradients of a copy of the model, for its parameters and networks of `numbers` per weight."""
    copied = copy.deepcopy(model).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    drawn = testing.random_network(LAYOUT, 2, d_e=numbers, generator=generator, dtype=torch.float64)
    weights, biases = ([t.to(device, dtype).requires_grad_() for t in group] for group in drawn)
    mask = testing.random_sign_mask(LAYOUT, 2, generator=generator).to(device)
    with backend(name):
        batch = GraphBatch.from_weights(weights, biases, input_value=1.0 if numbers == 1 else 0.0, sign_mask=mask)
        out = copied(batch)
        outputs = [out] if torch.is_tensor(out) else [*out[0], *out[1]]
        leaves = [*weights, *biases, *(p for p in copied.parameters() if p.requires_grad)]
        total = sum((o * torch.linspace(-1, 1, o.numel()).cos().view(o.shape).to(o)).sum() for o in outputs)
        grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*outputs, *grads]


def assert_model_as_reference(model, numbers, device, monkeypatch):
    """Output and all gradients of a whole model, whose every row program runs here, against float64."""
    testing.randomize_parameters(model, generator=torch.Generator().manual_seed(1), spread=0.02)
    exact = model_results(model, numbers, "reference", torch.float64, device)
    eager = model_results(model, numbers, "reference", torch.float32, device)
    if device.type == "cuda":  # a hundred kernels
        with compile_ahead():
            model_results(model, numbers, "triton", torch.float32, device)
    calls = []
    for entry in ("row_program", "row_program_backward"):
        original = getattr(kernels, entry)
        monkeypatch.setattr(kernels, entry, lambda *a, f=original, n=entry: calls.append(n) or f(*a))
    found = model_results(model, numbers, "triton", torch.float32, device)
    assert calls.count("row_program") >= 4 and calls.count("row_program_backward") >= 4
    exact = [e.detach() for e in exact]
    scale = max(float(e.abs().max()) for e in exact[1:])
    for a, p, e in zip(found, eager, exact, strict=True):
        if float(e.abs().max()) > 1e-6 * scale:  # else rounding alone
            assert_close_to_float64(a, p, e, factor=8, ulps=256)


@pytest.mark.parametrize("name", ["mnist_cls/scalegmn", "mnist_editing/scalegmn_bidir", "cifar10/scalegmn_hetero"])
@pytest.mark.filterwarnings("ignore:d_hid and dropout_all override:UserWarning")
def test_published_models(name, device, monkeypatch):
    config = published_config(name)
    config["data"]["layer_layout"] = LAYOUT
    config["scalegmn_args"] |= {"d_hid": 16, "num_layers": 2}
    numbers = 9 if name.startswith("cifar10") else 1
    assert_model_as_reference(from_config(config).eval(), numbers, device, monkeypatch)
