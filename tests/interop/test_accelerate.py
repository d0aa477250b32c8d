"""`accelerate`: the same numbers as the live model's own forward, over the same parameters, for every published one."""

import copy
import logging

import pytest
import standins
import torch
from compared import assert_same_trajectory, flat, gradients, trajectory
from torch import nn

import scalegmn_fast
from scalegmn_fast.interop.twin import reached
from scalegmn_fast.models import neural_graphs_config, neural_graphs_names, published_config, published_names
from scalegmn_fast.testing import random_network, randomize_parameters, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:not exactly equivariant", "ignore:d_hid and dropout_all")
FIXED = [name for name in neural_graphs_names() if "input_channels" not in neural_graphs_config(name)]
VARYING = [name for name in neural_graphs_names() if name not in FIXED]


def scalegmn_config(name, width=6):
    args = published_config(name)["scalegmn_args"]
    args["d_hid"], args["num_layers"] = width, min(args["num_layers"], 3)
    args["layer_layout"] = [1, 3, 3, 2] if "_max_kernel_height" in args else [2, 4, 3, 2]
    args["gnn_args"]["dropout"] = args["mlp_args"]["dropout"] = 0.0
    return args


def neural_graphs_small(name):
    config = neural_graphs_config(name)
    widths = {"d_hid": 8, "d_node": 8, "d_edge": 6, "d_attn_hid": 8, "d_node_hid": 8, "d_edge_hid": 8, "d_out_hid": 8}
    config |= {key: value for key, value in widths.items() if key in config}
    config["layer_layout"], features = [2, 5, 5, 1], config["graph_constructor"]
    if "input_channels" in config:
        config["num_classes"] = 3
        config["layer_layout"] = [config["input_channels"], 4, 5, 4, 3]
    config |= {"n_heads": 2, "n_layers": 3, "dropout": 0.0} if "n_heads" in config else {}
    features |= {"sin_emb_dim": 8} if features.get("sin_emb") else {}
    features |= {"num_probe_features": 4} if features.get("num_probe_features") else {}
    if "gnn_backbone" in config:
        config["gnn_backbone"] |= dict.fromkeys(("in_channels", "hidden_channels", "out_channels", "edge_dim"), 8)
        config["gnn_backbone"]["dropout"] = 0.0
    return config


def scalegmn_case(name, dtype):
    config = scalegmn_config(name)
    torch.manual_seed(0)
    model = standins.scalegmn_model(config)
    batch = standins.scalegmn_batch(config, count=2, dtype=dtype)
    return model.to(dtype), (batch,)


def neural_graphs_case(name, dtype):
    config = neural_graphs_small(name)
    torch.manual_seed(0)
    model = standins.neural_graphs_model(config)
    weights, biases = random_network(config["layer_layout"], 3, generator=torch.Generator().manual_seed(1))
    scale = 0.1  # about what the statistics of the configurations expect
    return model.to(dtype), (([w.to(dtype) * scale for w in weights], [b.to(dtype) * scale for b in biases]),)


def cnns_case(name, dtype):
    config = neural_graphs_small(name)
    torch.manual_seed(0)
    model = standins.neural_graphs_model(config)
    return model.to(dtype), (standins.cnn_batch(config, dtype=dtype),)


CASES = [(scalegmn_case, name) for name in published_names()]
CASES += [(neural_graphs_case, name) for name in FIXED] + [(cnns_case, name) for name in VARYING]
IDS = [f"{make.__name__}-{name}" for make, name in CASES]


def simple():
    model, inputs = scalegmn_case("mnist_cls/scalegmn", torch.float64)
    return model.eval(), inputs


@pytest.mark.parametrize(("make", "name"), CASES, ids=IDS)
def test_outputs_and_gradients_are_the_models_own(make, name):
    model, inputs = make(name, torch.float64)
    randomize_parameters(model, spread=0.1, generator=torch.Generator().manual_seed(0))
    model.eval()
    outputs, grads = gradients(model, inputs)
    before, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())

    assert scalegmn_fast.accelerate(model) is model
    assert scalegmn_fast.report(model).parts[0].fused, scalegmn_fast.report(model)
    ours, our_grads = gradients(model, inputs)

    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(ours, outputs, strict=True))
    largest = max(float(g.abs().max()) for g in grads.values() if g is not None)
    for key, grad in grads.items():
        assert (grad is None) == (our_grads[key] is None), key
        if grad is not None:
            assert float((our_grads[key] - grad).abs().max()) <= 1e-9 * float(grad.abs().max()) + 1e-12 * largest, key
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("make", "name"), CASES, ids=IDS)
def test_twenty_steps_stay_on_the_same_trajectory(make, name, dtype):
    def losses(begin):
        model, inputs = make(name, dtype)
        return trajectory(model, lambda net: sum((t - 0.5).square().mean() for t in flat(net(*inputs))), begin=begin)

    assert_same_trajectory(losses, dtype)


# -- what the originals get wrong, and what ours refuses -----------------------------------------------------------


def test_types_of_edges_are_the_batchs_own():
    """Edges into output neurons numbered as the batch says: like the other order of the embeddings' rows."""
    config = scalegmn_config("mnist_cls/scalegmn")
    model = standins.scalegmn_model(config).double().eval()
    randomize_parameters(model, generator=torch.Generator().manual_seed(0))
    batch = standins.scalegmn_batch(config)
    expected = model(batch)
    scalegmn_fast.accelerate(model)
    first, hidden, last = config["layer_layout"][0], config["layer_layout"][1:-1], config["layer_layout"][-1]
    types = [*torch.arange(first).repeat_interleave(hidden[0]).tolist()]
    types += [first] * (hidden[0] * hidden[1]) + [*range(first + 1, first + 1 + last)] * hidden[1]
    batch.edge2type = torch.tensor(types).repeat(3)
    assert relative_error(model(batch), expected) <= 1e-10

    swapped = batch.edge2type.clone()
    ends = swapped > first
    swapped[ends] = 2 * first + 3 - swapped[ends]  # the two types of the last layer change places
    batch.edge2type = swapped
    assert relative_error(model(batch), expected) > 1e-3
    with torch.no_grad():
        table = model.positional_embeddings_edge.pos_embed
        table[first + 1 :] = table[first + 1 :].flip(0)
    assert relative_error(model(batch), expected) <= 1e-10


def test_a_batch_of_other_networks_runs_on_the_model_itself(caplog):
    model, (batch,) = simple()
    scalegmn_fast.accelerate(model)
    batch.node2type = torch.zeros(len(batch.x), dtype=torch.int64)
    calls = []
    standin = type(model).__mro__[2]
    own = standin.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return own(self, *args, **kwargs)

    standin.forward = counted
    try:
        with caplog.at_level(logging.WARNING, "scalegmn_fast"):
            model(batch), model(batch)
    finally:
        standin.forward = own
    assert len(calls) == 2
    assert len([r for r in caplog.records if "runs unchanged on this batch" in r.message]) == 1
    assert "node2type" in scalegmn_fast.report(model).parts[0].reason


def test_cnns_whose_linear_edges_are_marked_otherwise_run_on_the_model_itself():
    model, (batch,) = cnns_case("cnn_zoo/pna", torch.float64)
    expected = model.eval()(batch)
    scalegmn_fast.accelerate(model)
    assert relative_error(model(batch), expected) <= 1e-10 and "must mark" not in str(scalegmn_fast.report(model))
    batch.mlp_edge_masks = torch.zeros_like(batch.mlp_edge_masks)
    assert torch.equal(model(batch), expected)
    reason = scalegmn_fast.report(model).parts[0].reason
    assert "mlp_edge_masks must mark the edges into linear layers (node_types of 1), got False for edge" in reason


class Adapted(nn.Linear):
    """A layer of somebody else's."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.gnn.fw_layers[0].message_fn.register_forward_hook(lambda *_: None), "message_fn has hooks"),
        (lambda m: setattr(m.gnn.readout.rho.fc, "1", Adapted(6, 10, dtype=torch.float64)), "fc.1 is a Adapted"),
        (lambda m: setattr(m.gnn.readout, "extra", nn.Linear(2, 2)), "gnn.readout.extra is a Linear, which is unknown"),
        (lambda m: setattr(m.gnn.readout.rho, "activation", nn.ELU()), "gnn.readout.rho.activation is 'elu'"),
        (lambda m: setattr(m.gnn.readout.rho.ln[0], "eps", 1e-3), "gnn.readout.rho.ln.0.eps is 0.001"),
        (lambda m: setattr(m.gnn.readout, "forward", lambda *a: a[0]), "gnn.readout has a forward of its own"),
        (lambda m: setattr(m.gnn.readout.rho, "activation", nn.Softmax(-1)), "activation is Softmax"),
    ],
)
def test_a_model_with_an_unknown_part_runs_unchanged_and_the_report_says_so(change, reason):
    model, inputs = simple()
    change(model)
    expected, kind = model(*inputs), type(model)
    scalegmn_fast.accelerate(model)
    part = scalegmn_fast.report(model).parts[0]
    assert not part.fused and reason in part.reason, part.reason
    assert type(model) is kind
    assert torch.equal(model(*inputs), expected)


def test_changes_after_the_call_are_noticed():
    model, inputs = simple()
    scalegmn_fast.accelerate(model)
    seen = []
    handle = model.gnn.readout.register_forward_pre_hook(lambda *_: seen.append(1))
    assert "gnn.readout has hooks" in scalegmn_fast.report(model).parts[0].reason
    handle.remove()
    assert scalegmn_fast.report(model).fused
    model.gnn.readout.rho.fc[1] = nn.Linear(6, 10).double()
    own = scalegmn_fast.restore(copy.deepcopy(model))
    assert scalegmn_fast.report(model).fused
    assert relative_error(model(*inputs), own(*inputs)) <= 1e-10
    model.gnn.readout = nn.Identity()
    assert "gnn.readout is a Identity, expected MLPNet" in scalegmn_fast.report(model).parts[0].reason


def test_a_subclass_with_a_forward_of_its_own_is_left_alone():
    class Doubled(standins.ScaleGMN):
        def forward(self, batch, w=None, b=None):
            return 2 * super().forward(batch, w, b)

    class Renamed(standins.ScaleGMN):
        pass

    config = scalegmn_config("mnist_cls/scalegmn")
    model, batch = Doubled(config).double(), standins.scalegmn_batch(config)
    expected = model(batch)
    assert torch.equal(scalegmn_fast.accelerate(model)(batch), expected)
    assert "forward is that of Doubled" in scalegmn_fast.report(model).parts[0].reason
    assert scalegmn_fast.report(scalegmn_fast.accelerate(Renamed(config).double())).fused


def test_models_inside_other_modules():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.head = inner, nn.Linear(10, 2).double()

        def forward(self, batch):
            return self.head(self.inner(batch))

    inner, (batch,) = simple()
    model = Wrapper(inner)
    expected = model(batch)
    assert relative_error(scalegmn_fast.accelerate(model)(batch), expected) <= 1e-10
    parts = {part.path: part for part in scalegmn_fast.report(model).parts}
    assert parts["inner"].fused and not parts["head"].fused and parts["head"].reason == "not a known model"
    assert str(scalegmn_fast.report(model)).splitlines()[1] == "head (Linear): unchanged: not a known model"


def test_nothing_to_accelerate(caplog):
    model = nn.Sequential(nn.Linear(2, 2))
    assert scalegmn_fast.accelerate(model) is model and type(model) is nn.Sequential
    assert not scalegmn_fast.report(model).fused and "no part of the model" in caplog.text
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        scalegmn_fast.accelerate({})


# -- everything else about the model stays as it was ----------------------------------------------------------------


def test_restore_undoes_it():
    model, inputs = simple()
    kind, keys = type(model), set(vars(model))
    scalegmn_fast.accelerate(model)
    assert type(model) is not kind and isinstance(model, kind) and type(model).__name__ == kind.__name__
    assert scalegmn_fast.restore(model) is model
    assert type(model) is kind and set(vars(model)) == keys


def test_copies_pickles_and_state_dicts(tmp_path):
    model, inputs = simple()
    scalegmn_fast.accelerate(model)
    expected = model(*inputs)
    copied = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copied, loaded):
        assert scalegmn_fast.report(other).fused and type(other) is type(model)
        assert torch.equal(other(*inputs), expected)
        with torch.no_grad():
            next(other.gnn.parameters()).add_(1.0)
        assert not torch.equal(other(*inputs), expected) and torch.equal(model(*inputs), expected)
    fresh = standins.scalegmn_model(scalegmn_config("mnist_cls/scalegmn")).double().eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert relative_error(fresh(*inputs), expected) <= 1e-10
    scalegmn_fast.accelerate(fresh).load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(fresh(*inputs), expected)


def test_moving_and_functional_calls():
    model, (batch,) = simple()
    scalegmn_fast.accelerate(model)
    exact = model(batch)
    narrow = standins.Batch(**{**vars(batch), "x": batch.x.float(), "edge_attr": batch.edge_attr.float()})
    assert model.float()(narrow).dtype == torch.float32
    assert relative_error(model(narrow), exact) <= 1e-4
    model.double()
    halved = {name: p / 2 for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, halved, (batch,))
    own = scalegmn_fast.restore(copy.deepcopy(model))
    assert relative_error(found, torch.func.functional_call(own, halved, (batch,))) <= 1e-10
    assert relative_error(found, exact) > 1e-3


def test_parametrised_weights():
    model, inputs = simple()
    nn.utils.parametrizations.weight_norm(model.gnn.fw_layers[0].w_v)
    outputs, grads = gradients(model, inputs)
    scalegmn_fast.accelerate(model)
    assert scalegmn_fast.report(model).fused
    ours, our_grads = gradients(model, inputs)
    assert relative_error(ours[0], outputs[0]) <= 1e-10
    key = "gnn.fw_layers.0.w_v.parametrizations.weight.original0"
    assert relative_error(our_grads[key], grads[key]) <= 1e-9


def test_copies_of_scripted_layers():
    """They cannot be indexed, unlike the scripted layers that they are copies of."""
    model, inputs = neural_graphs_case("mnist_cls/rtransformer", torch.float64)
    for layer in model.layers:
        layer.node_mlp = copy.deepcopy(torch.jit.script(layer.node_mlp))
    expected = model.eval()(*inputs)
    scalegmn_fast.accelerate(model)
    assert scalegmn_fast.report(model).fused, scalegmn_fast.report(model)
    assert relative_error(model(*inputs), expected) <= 1e-10


def test_hooks_of_the_model_run():
    model, inputs = simple()
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.register_forward_hook(lambda m, i, out: seen.append("after") or out + 1)
    expected = model(*inputs)
    scalegmn_fast.accelerate(model)
    assert relative_error(model(*inputs), expected) <= 1e-10
    assert seen == ["before", "after"] * 2


def test_frozen_parameters_get_no_gradients():
    model, inputs = simple()
    scalegmn_fast.accelerate(model)
    model.gnn.fw_layers.requires_grad_(False)
    _, grads = gradients(model, inputs)
    assert all((grad is None) == key.startswith("gnn.fw_layers") for key, grad in grads.items())
    model.gnn.fw_layers.requires_grad_(True)
    assert all(grad is not None for grad in gradients(model, inputs)[1].values())


def test_dropout_follows_the_model():
    model, inputs = simple()
    scalegmn_fast.accelerate(model).train()
    assert torch.equal(model(*inputs), model(*inputs))
    model.gnn.dropout = 0.5
    assert not torch.equal(model(*inputs), model(*inputs))
    assert "dropout draws other masks" in scalegmn_fast.report(model).parts[0].reason
    assert torch.equal(model.eval()(*inputs), model(*inputs))
    model.gnn.train()
    assert not torch.equal(model(*inputs), model(*inputs))


def test_distributed_data_parallel(tmp_path):
    model, inputs = simple()
    _, grads = gradients(model, inputs)
    scalegmn_fast.accelerate(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second pass fails if a parameter of the first had no gradient
            found = gradients(wrapped, inputs)[1]
    finally:
        torch.distributed.destroy_process_group()
    assert all(
        relative_error(found[f"module.{key}"], grad) <= 1e-8 or grad.abs().max() < 1e-12 for key, grad in grads.items()
    )


# -- the check -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "case", [(scalegmn_case, "mnist_editing/scalegmn_bidir"), (neural_graphs_case, "style_editing/rtransformer")]
)
def test_check_compares_at_the_next_call_and_touches_nothing(case, dtype, caplog):
    model, inputs = case[0](case[1], dtype)
    model.train()
    before = torch.get_rng_state()
    scalegmn_fast.accelerate(model, check=True)
    with caplog.at_level(logging.INFO, "scalegmn_fast"):
        model(*inputs)
    assert len(caplog.records) == 1 and "checked against its original: outputs differ by" in caplog.text
    assert "gradients by" in scalegmn_fast.report(model).parts[0].checked
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    caplog.clear()
    with caplog.at_level(logging.INFO, "scalegmn_fast"):
        model(*inputs)
    assert not caplog.records


def test_check_without_gradients():
    model, inputs = simple()
    with torch.no_grad():
        scalegmn_fast.accelerate(model, check=True)(*inputs)
    checked = scalegmn_fast.report(model).parts[0].checked
    assert "outputs differ by" in checked and "gradients by" not in checked


@pytest.mark.parametrize("wrong", [lambda out: out * 1.001, lambda out: out[:, :-1], lambda out: out + float("nan")])
def test_check_raises_and_restores_where_the_model_computes_something_else(wrong):
    class ScaleGMN(standins.ScaleGMN):
        def forward(self, batch, w=None, b=None):
            return wrong(super().forward(batch, w, b))

    config = scalegmn_config("mnist_cls/scalegmn")
    model, batch = ScaleGMN(config).float(), standins.scalegmn_batch(config, dtype=torch.float32)
    scalegmn_fast.accelerate(model, check=True)
    with pytest.raises(scalegmn_fast.interop.AccelerationError, match="its own forward is back in place"):
        model(batch)
    assert type(model) is ScaleGMN


def test_check_does_not_take_rounding_for_a_difference():
    """Inputs so large that float32 loses digits: the original is as far from float64 as ours."""
    model, ((weights, biases),) = neural_graphs_case("style_editing/rtransformer", torch.float32)
    scalegmn_fast.accelerate(model, check=True)
    model(([300 * w for w in weights], [300 * b for b in biases]))
    assert "as far as rounding moves the original, too" in scalegmn_fast.report(model).parts[0].checked


# -- what a call costs beside the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [False, True])
def test_only_parameters_that_the_backward_pass_does_not_reach_get_gradients_of_zero(pair):
    near, normed, far = (nn.Linear(2, 2) for _ in range(3))
    nn.utils.parametrizations.weight_norm(normed)
    weight, idle = normed.weight, far.weight * 2
    hidden = near(torch.ones(1, 2)) @ weight
    outputs = ([hidden], [hidden + 1]) if pair else hidden
    wanted = [near.weight, near.bias, weight, far.weight, far.bias, idle]
    assert reached(outputs, wanted[:3]) is outputs
    with torch.no_grad():
        assert reached(outputs, wanted) is outputs
    found = flat(reached(outputs, wanted))
    assert all(torch.equal(a, b) for a, b in zip(found, flat(outputs), strict=True))
    grads = torch.autograd.grad(sum(t.sum() for t in found), wanted)
    assert [bool(grad.count_nonzero()) for grad in grads] == [True] * 3 + [False] * 3


def test_a_step_that_reaches_every_parameter_gets_no_more_from_accelerate():
    model, inputs = simple()
    scalegmn_fast.accelerate(model)
    assert "Reached" not in model(*inputs).grad_fn.name()
