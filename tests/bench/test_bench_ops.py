"""The cases of the op benchmark run, and their rows make a table."""

import itertools

import torch

from bench import ops


def test_every_case_is_measured_in_both_directions_and_on_both_backends():
    rows = list(itertools.chain(*ops.measure(70, 8, "cpu", ["reference", "cpp"], bandwidth=1e9, peak=1e9, seconds=0.0)))
    names = [case.name for case in ops.op_cases(70, 8, "cpu")]
    assert {(row["op"], row["direction"], row["backend"]) for row in rows} == {
        (name, direction, chosen)
        for name in names
        for direction in ("forward", "backward")
        for chosen in ("reference", "cpp")
    }
    assert all(row["floor_ms"] > 0 for row in rows)
    table = ops.page({"rows": rows})
    assert sum(line.startswith(f"| {name} |") for name in names for line in table.splitlines()) == len(rows) / 2
    assert table.endswith("copy bandwidth 1.0 GB/s, GEMM peak 1 GFLOP/s.")


def test_the_floor_is_the_longer_of_bytes_and_products():
    def floor(**ceilings):
        rows = ops.measure(64, 8, "cpu", ["reference"], seconds=0.0, **ceilings)
        return next(row for row in itertools.chain(*rows) if row["op"] == "row_program message")

    by_bytes, by_products = floor(bandwidth=1.0, peak=1e30), floor(bandwidth=1e30, peak=1.0)
    assert by_bytes["floor_ms"] == 1e3 * by_bytes["bytes"]
    assert by_products["floor_ms"] == 1e3 * 2 * (2 * 64 * 8 * 8)


def test_inputs_get_gradients_in_every_case():
    for case in ops.op_cases(64, 8, "cpu"):
        found = torch.autograd.grad(case.call().sum(), case.inputs)
        assert all(torch.isfinite(grad).all() for grad in found), case.name
