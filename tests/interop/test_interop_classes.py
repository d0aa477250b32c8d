"""Classes to import in the place of the originals': their constructors, their calls, their state dicts."""

import inspect

import pytest
import standins
import torch
from compared import flat
from test_accelerate import neural_graphs_case, neural_graphs_small, scalegmn_case, scalegmn_config

from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.interop import neural_graphs, scalegmn
from scalegmn_fast.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:not exactly equivariant", "ignore:d_hid and dropout_all")


@pytest.mark.parametrize("name", ["mnist_cls/scalegmn", "cifar10/scalegmn_hetero_bidir", "mnist_editing/scalegmn"])
def test_scalegmn_takes_the_originals_dictionary_batches_and_checkpoints(name):
    model, (batch,) = scalegmn_case(name, torch.float64)
    args = scalegmn_config(name)
    ours = getattr(scalegmn, type(model).__name__)(args).double().eval()
    assert args == scalegmn_config(name)
    ours.load_state_dict(model.state_dict(), strict=True)
    weights, biases, value = standins.networks_of(batch, args["layer_layout"])
    expected, found = flat(model.eval()(batch)), flat(ours(batch, weights, biases))
    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(found, expected, strict=True))
    graph = GraphBatch.from_weights(weights, biases, input_value=value, sign_mask=getattr(batch, "sign_mask", None))
    assert all(torch.equal(a, b) for a, b in zip(flat(ours(graph)), found, strict=True))


def test_scalegmn_names_what_does_not_fit():
    args = scalegmn_config("mnist_cls/scalegmn")
    with pytest.raises(ValueError, match=r"model_args\['equivariant'\] must be True for ScaleGMN_equiv, got False"):
        scalegmn.ScaleGMN_equiv(args)
    model = scalegmn.ScaleGMN(args)
    other = standins.scalegmn_batch({**args, "layer_layout": [2, 3, 2]}, dtype=torch.float32)
    with pytest.raises(ValueError, match="layouts must be the model's"):
        model(other)
    with pytest.raises(ValueError, match="batch.x must be a tensor"):
        model(object())


@pytest.mark.parametrize("name", ["mnist_cls/pna", "mnist_cls/rtransformer", "mnist_dilation/rtransformer"])
def test_neural_graphs_take_the_originals_arguments_and_pairs(name):
    model, inputs = neural_graphs_case(name, torch.float64)
    config = neural_graphs_small(name)
    ours = getattr(neural_graphs, config.pop("_target_").rpartition(".")[2])(**config).double().eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    expected, found = flat(model.eval()(*inputs)), flat(ours(*inputs))
    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="weights"):
        ours(([], []))


def test_constructors_have_the_originals_arguments():
    expected = ["d_hid", "d_out", "graph_constructor", "gnn_backbone", "layer_layout", "rev_edge_features"]
    assert [*inspect.signature(neural_graphs.GNNForClassification).parameters][:6] == expected
    assert [*inspect.signature(scalegmn.ScaleGMN).parameters] == ["model_args", "kwargs"]
