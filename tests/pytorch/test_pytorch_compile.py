"""torch.compile, torch.export and AOTInductor of whole models."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from small_models import FromWeights, graphs, labels, leaves, network, neural_graphs, scalegmn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_equal(actual, expected):
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        assert torch.equal(a, b)


BOTH_WAYS = {"symmetry": "permutation", "direction": "bidirectional", "num_layers": 1}


@pytest.mark.parametrize("options", [{}, BOTH_WAYS], ids=["forward", "bidirectional"])
def test_training_steps_of_any_batch_size_are_two_programs(options):
    model = scalegmn(**options)
    plain = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda g, y: F.cross_entropy(model(g), y), fullgraph=True, backend=counter)
    losses = compiled, lambda g, y: F.cross_entropy(plain(g), y)
    optimizers = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(plain.parameters())
    for size in (3, 4, 9, 20):
        batch, target = graphs(size), labels(size)
        found = []
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value = loss(batch, target)
            value.backward()
            optimizer.step()
            found.append(value.detach())
        assert torch.equal(*found)
    assert_equal(list(model.parameters()), list(plain.parameters()))
    assert counter.frame_count == 2  # the first size, then sizes as variables


@pytest.mark.parametrize("name", ["gnn", "transformer"])
def test_neural_graphs_compile_once_their_plan_is_known(name):
    model = neural_graphs(name)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in (3, 4, 9):
        batch = graphs(size)
        expected = model(batch)  # derives what the model needs of the plan
        assert_equal(compiled(batch), expected)
    assert counter.frame_count == 2


def test_equivariant_heads_compile():
    model = scalegmn(equivariant=True, num_layers=1)
    assert_equal(torch.compile(model, fullgraph=True, backend="aot_eager")(graphs(3)), model(graphs(3)))


def test_building_the_batch_is_part_of_the_program():
    model = FromWeights(scalegmn(symmetry="permutation").eval())
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in (3, 9):
        assert_equal(compiled(*network(size)), model(*network(size)))
    assert counter.frame_count == 1


def exported(model, **options):
    return torch.export.export(model, network(3), **options)


def test_exported_programs_serve_any_batch_size_and_are_saved():
    model = FromWeights(scalegmn().eval())
    batch = {0: Dim("batch", min=2, max=4096)}
    program = exported(model, dynamic_shapes=([batch] * 3, [batch] * 3))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 9, 40):
        assert_equal(loaded(*network(size, seed=1)), model(*network(size, seed=1)))


@pytest.mark.parametrize("name", ["gnn", "transformer"])
def test_exported_neural_graphs_have_their_batch_size(name):
    model = FromWeights(neural_graphs(name).eval())
    model(*network(3))
    assert_equal(exported(model).module()(*network(3, seed=1)), model(*network(3, seed=1)))


def test_ahead_of_time_compiled_packages_run(tmp_path):
    model = FromWeights(scalegmn(symmetry="permutation", num_layers=1).eval())
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    path = torch._inductor.aoti_compile_and_package(
        exported(model), package_path=str(tmp_path / "model.pt2"), inductor_configs=quick
    )
    package = torch._inductor.aoti_load_package(path)
    torch.testing.assert_close(package(*network(3, seed=1)), model(*network(3, seed=1)))
