"""Options that row programs do not have: one warning each, where row programs would have served."""

import warnings

import pytest
import torch
from neural_graphs_cases import BACKBONE, BASES, LAYOUT

import scalegmn_fast
from scalegmn_fast import backends
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import ScaleGMNConfig, from_config
from scalegmn_fast.nn import WorkPlan, set_work_plan


def scalegmn(**sections):
    return ScaleGMNConfig(LAYOUT, symmetry="scale", d_hid=6, num_layers=2, d_out=3, sections=sections)


def neural_graph(**backbone):
    return {**BASES["gnn"], "gnn_backbone": {**BACKBONE, **backbone}}


UNFUSED = {
    "gnn_args.aggregator 'max'": scalegmn(gnn_args={"aggregator": "max"}),
    "mlp_args.batch_norm": scalegmn(mlp_args={"batch_norm": True}),
    "gnn_backbone.towers above 1": neural_graph(towers=2),
    "gnn_backbone.act 'mish'": neural_graph(act="mish"),
}
FUSED = {"ScaleGMN": scalegmn(), "mean": scalegmn(gnn_args={"aggregator": "mean"}), "NG-GNN": neural_graph()}


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())


def batch():
    pairs = list(zip(LAYOUT[:-1], LAYOUT[1:], strict=True))
    return GraphBatch.from_weights([torch.randn(2, a, b) for a, b in pairs], [torch.randn(2, b) for _, b in pairs])


def warnings_of(model, graph):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(graph)
    return [str(entry.message) for entry in caught if "PyTorch operators" in str(entry.message)]


@pytest.mark.parametrize("option", UNFUSED)
def test_an_option_without_row_programs_warns_once(option):
    models, graph = [from_config(UNFUSED[option]) for _ in range(2)], batch()
    (message,) = warnings_of(models[0], graph)
    assert message.startswith(f"{option}: ") and "docs/models.md" in message
    assert warnings_of(models[0], graph) == warnings_of(models[1], graph) == []


@pytest.mark.parametrize("name", FUSED)
def test_other_options_do_not(name):
    assert warnings_of(from_config(FUSED[name]), batch()) == []


@pytest.mark.parametrize("option", UNFUSED)
def test_nobody_is_warned_of_what_was_chosen(option):
    model = from_config(UNFUSED[option])
    with scalegmn_fast.backend("reference"):
        assert warnings_of(model, batch()) == []


def test_a_work_plan_and_compiled_models_do_not_warn():
    model, graph = from_config(UNFUSED["gnn_args.aggregator 'max'"]), batch()
    torch.compiler.reset()
    assert warnings_of(torch.compile(model, backend="eager", fullgraph=True), graph) == []
    torch.compiler.reset()
    assert warnings_of(set_work_plan(model, WorkPlan.none()), graph) == []
    assert len(warnings_of(set_work_plan(model, WorkPlan()), graph)) == 1
