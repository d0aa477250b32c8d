"""A training step of every published configuration asks nothing of the host, and how many operators it runs."""

import pytest

from bench import launches
from scalegmn_fast.models import published_names

pytestmark = pytest.mark.filterwarnings("ignore:.*not exactly equivariant", "ignore:.*override other keys")


@pytest.mark.parametrize("path", ["kernels", "row programs"])
@pytest.mark.parametrize("name", published_names())
def test_forward_loss_and_backward_never_leave_the_device(name, path):
    """On `meta` what waits for the device raises, and what copies is listed: a CUDA graph can hold such a step."""
    found = launches.forward_backward(name, 2, path)
    assert found.crossings == []
    assert found.counts["scalegmn_fast::row_program"] == 0 if path == "kernels" else found.total > 0


def test_kernels_and_programs_each_run_fewer_operators():
    row = launches.measure("mnist_cls/scalegmn", 2)
    counts = [row["operators"][path] for path in launches.PATHS]
    assert counts[1] > counts[2] > counts[3] > 0
    assert f"| mnist_cls/scalegmn | 2 | {' | '.join(map(str, counts))} |" in launches.page({"rows": [row]})


def test_programs_are_counted_as_one_operator_each():
    counts = launches.forward_backward("mnist_cls/scalegmn", 2, "row programs").counts
    assert counts["scalegmn_fast::row_program"] == counts["scalegmn_fast::row_program_backward"] > 0
