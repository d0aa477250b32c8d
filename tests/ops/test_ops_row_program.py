"""The op `row_program`: programs with every operation, against the reference, finite differences and itself."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import scalegmn_fast
from scalegmn_fast.ops.row_program import RowProgram
from scalegmn_fast.reference.row_program import ACTIVATIONS, OPERATIONS
from scalegmn_fast.reference.symmetrize import ACTIVATIONS as SYMMETRIC_ACTIVATIONS
from scalegmn_fast.testing import assert_close_to_float64, nan_poisoned

WIDTHS = (1, 5, 33, 64, 123, 128)


def inputs(rows, nodes, width, dtype, seed=0):
    """Tensors, two indices (one sorted) and segments, some of them empty."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    matrices = {name: draw(width, width, scale=width**-0.5) for name in ("w_e", "w_1", "w_2", "w_3", "w")}
    vectors = {name: draw(width) for name in ("b_1", "b_2", "b_3", "shift", "shift_2")}
    tensors = {
        "e": draw(rows, width),
        "x": draw(nodes, width),
        "u": draw(nodes, width),
        "factor": draw(rows, 1),
        "weight": 1 + draw(width, scale=0.1),
        "weight_2": 1 + draw(width, scale=0.1),
        "wide": draw(width, 2 * width, scale=width**-0.5),
        **matrices,
        **vectors,
    }
    index = [torch.randint(nodes, (rows,), generator=generator) for _ in range(2)]
    index[1] = index[1].sort().values.int()
    cuts = torch.randint(rows + 1, (nodes - 1,), generator=generator).sort().values
    ptr = torch.cat([torch.zeros(1, dtype=torch.long), cuts, torch.tensor([rows])])
    return tensors, index, ptr


def program(t, index, ptr, rows, activation="silu", norm=True, dropout=0.0):
    """A message with every kind of step in three sections, the first of which also writes rows."""
    symmetric = activation if activation in SYMMETRIC_ACTIVATIONS else "silu"
    run = RowProgram()
    first = rows // 3
    for number, count in enumerate((first, rows - 2 * first, first)):
        s = run.section(count)
        e = s.load(t["e"])
        m = s.load_mul(s.linear(e, t["w_e"]), t["x"], index[0])
        h = s.linear(m, t["w_1"])
        norms = (t["weight"], t["shift"]) if norm else (None, None)
        even = s.symmetrize(h, t["b_1"] if number else None, *norms, symmetric, 1.5)
        z = s.load_add(s.linear(even, t["w_2"], t["b_2"]), t["u"], index[1])
        if dropout and number:
            z = s.dropout(z, dropout)
        gate = s.norm_act(z, *((t["weight_2"], t["shift_2"]) if norm else (None, None)), activation, 1.5)
        out = s.mul(s.linear(m, t["w"]), s.linear(gate, t["w_3"], t["b_3"]))
        if number == 2:  # a value that is read twice by one step, and steps that nobody reads
            s.negate(s.load(t["u"], index[1]))
            out = s.add(out, s.mul(z, z))
        s.add_up(out)
        if number == 0:
            pair = s.concat(s.abs(s.negate(e)), s.normalize(m, 1e-10))
            s.write(s.scale(s.add_vector(s.linear(pair, t["wide"]), t["b_3"]), t["factor"]))
    return run.run(ptr)


def results(backend, t, index, ptr, rows, **options):
    """Sums, rows, and the gradients of all tensors."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in t.items()}
    torch.manual_seed(3)
    with scalegmn_fast.backend(backend):
        out = program(leaves, index, ptr, rows, **options)
        cotangents = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).cos().view(o.shape).to(o) for o in out]
        grads = torch.autograd.grad(out, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
        return [*out, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_result_and_gradients_against_float64(width, dtype):
    rows = 1200 if width in (5, 128) else 70
    norm = {"norm": width > 1}  # what a norm of one number gives is rounding alone
    t, index, ptr = inputs(rows, 40, width, dtype)
    exact = results("reference", {k: v.double() for k, v in t.items()}, index, ptr, rows, **norm)
    lower = torch.float32 if dtype == torch.float64 else dtype
    eager = results("reference", {k: v.to(lower) for k, v in t.items()}, index, ptr, rows, **norm)
    for name, a, e, r in zip(
        ("sums", "rows", *t), results("cpp", t, index, ptr, rows, **norm), eager, exact, strict=True
    ):
        e = r if dtype == torch.float64 else e
        assert_close_to_float64(a, e, r, ulps=64, name=f"{name} at width {width}")


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(activation, norm):
    t, index, ptr = inputs(100, 9, 33, torch.float32)
    options = {"activation": activation, "norm": norm}
    exact = results("reference", {k: v.double() for k, v in t.items()}, index, ptr, 100, **options)
    eager = results("reference", t, index, ptr, 100, **options)
    for name, a, e, r in zip(
        ("sums", "rows", *t), results("cpp", t, index, ptr, 100, **options), eager, exact, strict=True
    ):
        assert_close_to_float64(a, e, r, ulps=64, name=f"{name} with {activation}")


def test_every_operation_is_in_the_test_program():
    t, index, ptr = inputs(9, 4, 3, torch.float64)
    seen = set()
    add = RowProgram.section

    def section(self, rows):
        writer = add(self, rows)
        step = writer._step

        def record(op, *args, **options):
            seen.add(op)
            return step(op, *args, **options)

        writer._step = record
        return writer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowProgram, "section", section)
        program(t, index, ptr, 9, dropout=0.5)
    assert seen | {"head_dot"} == set(OPERATIONS)  # that one: tests/ops/test_ops_row_reductions.py


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_derivatives_by_finite_differences(dropout):
    t, index, ptr = inputs(9, 4, 3, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in t.values()]

    def function(*leaves):
        torch.manual_seed(1)
        return program(dict(zip(t, leaves, strict=True)), index, ptr, 9, dropout=dropout)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("width", [123, 128])
def test_gradients_by_finite_differences_at_production_widths(width):
    t, index, ptr = inputs(9, 4, width, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in t.values()]
    function = lambda *leaves: program(dict(zip(t, leaves, strict=True)), index, ptr, 9)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_dropout_masks():
    """The share that is kept, the reference's mask, another mask at every call, the same one for the same seed."""

    def run(seed, backend):
        torch.manual_seed(seed)
        program = RowProgram()
        section = program.section(3000)
        section.write(section.dropout(section.load(torch.ones(3000, 50)), 0.3))
        with scalegmn_fast.backend(backend):
            return program.run()[1]

    first = run(0, "cpp")
    assert torch.equal(first, run(0, "reference")) and torch.equal(first, run(0, "cpp"))
    assert not torch.equal(first, run(1, "cpp"))
    kept = first != 0
    assert abs(kept.float().mean().item() - 0.7) < 0.01
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / 0.7))
    assert 0.65 < kept.float().mean(0).min() and kept.float().mean(0).max() < 0.75


def test_registration_is_consistent():
    t, index, ptr = inputs(9, 4, 3, torch.float64)
    calls = []
    op = torch.ops.scalegmn_fast.row_program
    run = RowProgram()
    section = run.section(9)
    e = section.load(t["e"].requires_grad_())
    section.write(section.linear(e, t["w"].requires_grad_()))
    section.add_up(section.load_mul(e, t["x"], index[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.scalegmn_fast, "row_program", lambda *args: calls.append(args) or op(*args))
        run.run(ptr)
    torch.library.opcheck(op, calls[0])


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(rows):
    t, index, ptr = inputs(rows, 3, 8, torch.float64)
    for a, b in zip(results("cpp", t, index, ptr, rows), results("reference", t, index, ptr, rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads_and_every_time(dtype):
    t, index, ptr = inputs(7000, 300, 32, dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(results("cpp", t, index, ptr, 7000, dropout=0.2))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_one_segment_across_partitions():
    t, index, _ = inputs(7000, 300, 8, torch.float64)
    ptr = torch.tensor([0, 0, 1, 6998, 6998, 7000])
    for a, b in zip(results("cpp", t, index, ptr, 7000), results("reference", t, index, ptr, 7000), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_every_output_is_written():
    t, index, ptr = inputs(3000, 50, 64, torch.float32)
    plain = results("cpp", t, index, ptr, 3000)
    with nan_poisoned():
        poisoned = results("cpp", t, index, ptr, 3000)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


def test_two_threads_at_once():
    t, index, ptr = inputs(3000, 50, 32, torch.float32)
    expected, found = results("cpp", t, index, ptr, 3000), [None, None]

    def work(k):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in t.items()}
        for _ in range(5):
            out = program(leaves, index, ptr, 3000)
        weights = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).cos().view(o.shape).to(o) for o in out]
        found[k] = [*out, *torch.autograd.grad(out, list(leaves.values()), weights)]

    workers = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in found:
        assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


FORKED = """
import os, torch
from scalegmn_fast.ops.row_program import RowProgram
x, w = torch.randn(5000, 64), torch.randn(64, 64)
def run():
    program = RowProgram()
    section = program.section(5000)
    section.write(section.linear(section.load(x), w))
    return program.run()[1]
expected = run()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(run(), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_after_a_fork():
    assert subprocess.run([sys.executable, "-c", FORKED], timeout=100).returncode == 0


PORTABLE = [
    {"SCALEGMN_FAST_GEMM": "torch"},
    {"SCALEGMN_FAST_GEMM": "blas"},
    {"SCALEGMN_FAST_POOL_MB": "0"},
    {"SCALEGMN_FAST_ISA": "baseline"},
    {"SCALEGMN_FAST_ISA": "avx2"},
]


@pytest.mark.parametrize("variable", PORTABLE, ids=str)
def test_portable_paths(variable):
    """Without products compiled for their shape, without a BLAS, without the pool, and on older processors."""
    chosen = "test_few_rows or (test_result_and_gradients_against_float64 and (33 or 128))"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env={**os.environ, **variable}, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr  # 5 if nothing ran


def test_under_torch_compile():
    t, index, ptr = inputs(40, 6, 8, torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in t.items()}
    compiled = torch.compile(lambda t: program(t, index, ptr, 40), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(leaves), program(leaves, index, ptr, 40), strict=True):
        torch.testing.assert_close(a, b)
    found = torch.autograd.grad(compiled(leaves)[0].sum(), leaves["w_1"])[0]
    torch.testing.assert_close(found, torch.autograd.grad(program(leaves, index, ptr, 40)[0].sum(), leaves["w_1"])[0])


def test_under_autocast():
    """Products and tables in bfloat16: an error of its size, the same numbers compiled, gradients in float32."""
    t, index, ptr = inputs(40, 6, 32, torch.float32)
    expected = program(t, index, ptr, 40)
    leaves = {name: tensor.requires_grad_() for name, tensor in t.items()}
    compiled = torch.compile(lambda t: program(t, index, ptr, 40), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, again = program(leaves, index, ptr, 40), compiled(leaves)
    for a, b, exact in zip(found, again, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)
        assert 1e-4 < float((a - exact).detach().abs().max() / exact.abs().max()) < 0.05
    (grad,) = torch.autograd.grad(found[0].float().sum(), leaves["w_1"])
    assert grad.dtype == torch.float32


BAD = [
    (lambda s, t, i: s.load(t["e"][:3]), "expected a table of at least 9 rows, got 3"),
    (lambda s, t, i: s.load(t["x"], i[0] + 4), r"indices: expected rows in \[0, 4\)"),
    (lambda s, t, i: s.load(t["x"], i[0][:5]), "indices: expected .* R >= 9"),
    (lambda s, t, i: s.linear(s.load(t["e"]), t["wide"]), r"expected a weight \[\*, 3\], got \[3, 6\]"),
    (lambda s, t, i: s.linear(s.load(t["e"]), t["w"], t["e"]), r"expected a bias \[3\]"),
    (lambda s, t, i: s.scale(s.load(t["e"]), t["e"]), "expected a table of width 1"),
    (lambda s, t, i: s.dropout(s.load(t["e"]), 1.0), r"dropout probability in \[0, 1\), got 1"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_programs(build, message):
    t, index, _ = inputs(9, 4, 3, torch.float32)
    run = RowProgram()
    section = run.section(9)
    section.write(build(section, t, index))
    with pytest.raises(ValueError, match=message):
        run.run()


def test_bad_segments():
    t, _, _ = inputs(9, 4, 3, torch.float32)
    for ptr, message in (
        (None, "got none"),
        (torch.tensor([0, 5]), "from 0 to 9"),
        (torch.tensor([0, 7, 5, 9]), "nondecr"),
    ):
        run = RowProgram()
        section = run.section(9)
        section.add_up(section.load(t["e"]))
        with pytest.raises(ValueError, match=f"ptr: .*{message}"):
            run.run(ptr)


def test_few_rows_of_large_tables():
    """Gradients of rows far apart, read by two indices."""
    t, index, _ = inputs(600, 20000, 8, torch.float64)
    ptr = torch.tensor([0, 100, 600])
    for a, b in zip(results("cpp", t, index, ptr, 600), results("reference", t, index, ptr, 600), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def mapped_rows(backend, t, index):
    """Two maps of loaded rows and one of others; result and gradients."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in t.items()}
    run = RowProgram()
    section = run.section(len(index[0]))
    own = section.load(leaves["x"], index[0])
    a = section.linear(own, leaves["w_1"], leaves["b_1"])
    b = section.linear(section.load(leaves["x"], index[0]), leaves["w_2"])
    c = section.linear(section.load(leaves["x"], index[1]), leaves["w_3"], leaves["b_3"])
    section.write(section.add(section.mul(a, b), c))
    with scalegmn_fast.backend(backend):
        out = run.run()[1]
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape).to(out)
        names = ("x", "w_1", "b_1", "w_2", "w_3", "b_3")
        return [out, *torch.autograd.grad(out, [leaves[name] for name in names], weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [5, 32, 123])
def test_rows_that_a_tile_maps_once(width, dtype):
    """Rows of a table that occur often, once, all at once, and in tiles without and with others."""
    t, _, _ = inputs(1, 700, width, dtype)
    generator = torch.Generator().manual_seed(1)
    often = torch.where(torch.rand(700, generator=generator) < 0.7, 699, torch.arange(700))
    index = [often, torch.cat([torch.zeros(300), torch.randperm(400, generator=generator)]).int()]
    exact = mapped_rows("reference", {name: tensor.double() for name, tensor in t.items()}, index)
    lower = torch.float32 if dtype == torch.float64 else dtype
    eager = mapped_rows("reference", {name: tensor.to(lower) for name, tensor in t.items()}, index)
    for number, (a, e, r) in enumerate(zip(mapped_rows("cpp", t, index), eager, exact, strict=True)):
        assert_close_to_float64(a, r if dtype == torch.float64 else e, r, ulps=64, name=f"result {number}")


def test_equal_loads_are_one_step():
    t, index, _ = inputs(9, 4, 3, torch.float32)
    section = RowProgram().section(9)
    first, other = section.load(t["x"], index[0]), section.load(t["x"], index[1])
    assert section.load(t["x"], index[0]).number == first.number
    assert other.number != first.number


@pytest.mark.parametrize("norm", [True, False])
def test_bfloat16_products_of_rows_at_a_kink(norm):
    """Rows rounded to bfloat16 move sums across ReLU's kink, the reference's alike; without such products none move."""
    t, index, ptr = inputs(300, 40, 128, torch.bfloat16)
    options = {"activation": "relu", "norm": norm}
    found = results("cpp", t, index, ptr, 300, **options)
    wide = {name: tensor.double() for name, tensor in t.items()}
    errors = []
    for expected in (
        results("reference", t, index, ptr, 300, **options),
        results("reference", wide, index, ptr, 300, **options),
    ):
        pairs = zip(found, expected, strict=True)
        errors.append(max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs))
    assert min(errors) < 4 * 2**-8
