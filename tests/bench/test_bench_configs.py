"""Counting operations, and the networks of the scaling benchmark."""

import torch

from bench import configs, scaling
from bench.training import Problem, Training
from scalegmn_fast.models import from_config, published_config
from scalegmn_fast.nn import WorkPlan, set_work_plan


def tiny(name="mnist_cls/scalegmn"):
    config = published_config(name)
    config["scalegmn_args"]["d_hid"] = 4
    config["scalegmn_args"]["mlp_args"]["d_k"] = [4]
    config["scalegmn_args"]["num_layers"] = 2
    config["data"]["layer_layout"] = [2, 3, 3, 1]
    return config


def test_flops_of_a_linear_layer():
    layer, rows = torch.nn.Linear(3, 5), torch.ones(7, 3)
    assert configs.flops(layer, rows) == 2 * 7 * 3 * 5
    assert configs.flops(layer, rows, torch.sum) == 2 * (2 * 7 * 3 * 5)  # and the gradient of the weight


def test_flops_do_not_depend_on_fused_ops():
    config = tiny()
    model, graph = from_config(config), Problem(config, 2).graph()
    found = configs.flops(model, graph)
    assert found == configs.flops(set_work_plan(model, WorkPlan(fuse=False)), graph) > 0


def test_flops_leave_the_plan_of_work_as_it_was():
    config = tiny()
    model, graph = from_config(config), Problem(config, 2).graph()
    works = [WorkPlan(compose=False), WorkPlan(share=False)]
    set_work_plan(model, works[0])
    set_work_plan(model.gnn, works[1])
    assert configs.flops(model, graph) > 0
    assert (model.work, model.gnn.work) == tuple(works)


def test_flops_of_large_batches_follow_from_smaller_ones():
    config = tiny()
    model = from_config(config)
    problem = Problem(config, 48)
    graph = problem.graph()
    assert configs.flops_at(model, config, 48) == (
        configs.flops(model, graph),
        configs.flops(model, graph, problem.loss),
    )


def test_preparing_a_training_changes_no_gradient_and_a_step_changes_the_weights():
    config = tiny("mnist_editing/scalegmn")
    model, problem = from_config(config), Problem(config, 2)
    training, graph = Training(model, config), problem.graph()
    training.prepare()
    assert all(parameter.grad is None for parameter in model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    training.step(lambda: model(graph), problem)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_sizes_of_the_scaling_benchmark():
    layouts = scaling.sizes(1e5)
    edges = [2 * w + w * w + w for _, w, _, _ in layouts]
    assert len(edges) == 5
    assert all(abs(found / 10 ** (3 + place / 2) - 1) < 0.02 for place, found in enumerate(edges))


def test_a_failed_row_is_named_in_its_table():
    data = {"rows": [{"edges": 990, "layout": [2, 30, 30, 1], "failed": "out of memory"}]}
    assert scaling.page(data).splitlines()[2].startswith("| 2-30-30-1 | 990 | out of memory |")
