"""Recorded training steps: what is recorded and what runs as it is, and on a GPU that replays are the same steps."""

import copy

import pytest
import torch
from train_tiny import LAYOUT, tiny_config, write_tiny

from scalegmn_fast.data import PackedDataset
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config
from scalegmn_fast.testing import random_network
from scalegmn_fast.train import GraphedStep, Trainer, TrainingStep, WarmupLRScheduler, load_checkpoint
from scalegmn_fast.train.cuda_graph import make_capturable


class Recorder:
    """Records steps as what they are: a replay calls the step again on the recording's own tensors."""

    def __init__(self):
        self.warmed_up = self.recorded = 0

    def warm_up(self, call):
        self.warmed_up += 1
        return call()

    def record(self, call):
        self.recorded += 1
        return call


def batch(seed, count=4, layout=LAYOUT, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    networks = random_network(layout, count, generator=generator, dtype=torch.float32)
    labels = torch.randint(0, 2, (count,), generator=generator)
    return GraphBatch.from_weights(*networks).to(device), labels.to(device)


def make_step(device="cpu", capturable=False, dropout=0.0, **changes):
    """A step of a tiny model, each call's the same; dropout would draw masks that the next step does not have."""
    torch.manual_seed(0)
    config = tiny_config(data__layer_layout=list(LAYOUT), scalegmn_args__gnn_args__dropout=dropout, **changes)
    model = from_config(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if capturable:
        make_capturable(optimizer, torch.device(device))
    return TrainingStep(model, torch.nn.functional.cross_entropy, optimizer, 1.0)


def assert_same_weights(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_replays_are_the_same_steps_and_other_batches_run_as_they_are():
    eager, recorder = make_step(), Recorder()
    graphed = GraphedStep(make_step(), warm_up=2, recorder=recorder)
    seeds = range(7)
    batches = [batch(seed, count=3 if seed == 5 else 4) for seed in seeds]
    for given in batches:
        expected, found = eager(*given), graphed(*given)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)
    assert_same_weights(eager.model, graphed.step.model)
    assert (recorder.warmed_up, recorder.recorded, graphed.replays) == (2, 1, 3)


def test_a_recording_reads_its_own_tensors_and_leaves_a_batch_alone():
    graphed = GraphedStep(make_step(), warm_up=1, recorder=Recorder())
    batches = [batch(seed) for seed in range(3)]
    before = [(graph.edge_features.clone(), labels.clone()) for graph, labels in batches]
    for given in batches:
        graphed(*given)
    for (graph, labels), (edges, kept) in zip(batches, before, strict=True):
        assert torch.equal(graph.edge_features, edges) and torch.equal(labels, kept)


@pytest.mark.parametrize("kind", ["sign mask", "architectures", "changing plan", "changing type"])
def test_what_cannot_be_recorded_is_not(kind):
    def step(graph, labels):
        return graph, labels

    graphed = GraphedStep(step, warm_up=1, recorder=Recorder())
    for seed in range(4):
        graph, labels = batch(seed)
        if kind == "sign mask":
            graph = GraphBatch(*graph_tensors(graph), graph.plan, torch.ones(graph.num_nodes, dtype=torch.bool))
        elif kind == "architectures":
            graph = GraphBatch(*graph_tensors(graph), graph.plan, architectures=[None] * graph.num_graphs)
        elif kind == "changing plan":
            graph, labels = batch(seed, count=seed + 1)
        elif seed % 2:
            graph = graph.to(torch.float64)
        assert graphed(graph, labels) == (graph, labels)
    assert not graphed.recorded


def graph_tensors(graph):
    return graph.node_features, graph.edge_features


def test_warm_up_has_to_be_positive():
    with pytest.raises(ValueError, match="warm_up must be at least 1, got 0"):
        GraphedStep(make_step(), warm_up=0, recorder=Recorder())


def test_a_trainer_of_recorded_steps_makes_the_same_run(tmp_path):
    dataset = write_tiny(tmp_path / "tiny.safetensors", sizes=(44, 16, 16))  # the last batch of an epoch is smaller
    states, recorder = [], Recorder()
    for recorded in (False, True):
        out = tmp_path / str(recorded)
        run = Trainer.from_config(tiny_config(), PackedDataset(dataset.path), out, make_plots=False)
        if recorded:
            run._training_step = GraphedStep(run._training_step, recorder=recorder)
        run.fit()
        states.append(load_checkpoint(out / "last.pt"))
    assert (
        recorder.recorded == 1 and run._training_step.replays == 11
    )  # 3 epochs of 5 full batches; 3 warm up, 1 records
    assert [row["train"] for row in states[0]["rows"]] == [row["train"] for row in states[1]["rows"]]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())


def test_a_trainer_says_that_graphs_need_a_gpu(tmp_path):
    dataset = write_tiny(tmp_path / "tiny.safetensors")
    config = tiny_config(train_args__cuda_graph=True)
    with pytest.raises(ValueError, match="train_args.cuda_graph: true needs a CUDA device, got device cpu"):
        Trainer.from_config(config, dataset, tmp_path / "out", make_plots=False)
    with pytest.raises(ValueError, match="train_args.cuda_graph must be true or false, got 1"):
        Trainer.from_config(tiny_config(train_args__cuda_graph=1), dataset, tmp_path / "out", make_plots=False)


def test_a_capturable_optimiser_keeps_rate_and_steps_in_tensors():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.8)
    scheduler = WarmupLRScheduler(optimizer, 4)
    weight.grad = torch.ones(3)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):  # as after load_state_dict, too
        make_capturable(optimizer, torch.device("cpu"))
        rate = optimizer.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["capturable"] and rate.dtype == torch.float32
        assert torch.is_tensor(optimizer.state[weight]["step"])
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] is rate  # a recording reads this very tensor
        assert rate.item() == pytest.approx(0.2 * (scheduler.last_epoch + 1))
        optimizer.load_state_dict(saved)


def test_an_optimiser_that_cannot_be_captured_is_refused():
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="an optimiser with the option 'capturable', such as AdamW, got SGD"):
        make_capturable(torch.optim.SGD([weight], lr=0.1), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["scale", "sign"])
def test_captured_steps_equal_eager_ones(name):
    changes = {"scalegmn_args__symmetry": name}
    eager = make_step(device="cuda", capturable=True, **changes)
    graphed = GraphedStep(make_step(device="cuda", capturable=True, **changes))
    for seed in range(8):
        given = batch(seed, device="cuda")
        for a, b in zip(eager(*given), graphed(*given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert graphed.replays == 4
    for a, b in zip(eager.model.parameters(), graphed.step.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_step_waits_for_nothing():
    step, given = make_step(device="cuda"), batch(0, device="cuda")
    step(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_replays_draw_new_dropout_masks():
    step = make_step(device="cuda", capturable=True, dropout=0.5)
    step.optimizer.param_groups[0]["lr"].zero_()
    graphed, given = GraphedStep(step, warm_up=1), batch(0, device="cuda")
    losses = [graphed(*given).loss.item() for _ in range(6)]
    assert graphed.replays == 4 and len(set(losses[2:])) == 4


@pytest.mark.gpu
def test_a_trainer_records_steps_and_resumes(tmp_path):
    dataset = write_tiny(tmp_path / "tiny.safetensors", sizes=(44, 16, 16))
    options = {"device": "cuda", "make_plots": False}

    def config(**changes):
        return tiny_config(scalegmn_args__gnn_args__dropout=0.0, **changes)

    eager = Trainer.from_config(config(), dataset, tmp_path / "eager", **options).fit()
    run = Trainer.from_config(config(train_args__cuda_graph=True), dataset, tmp_path / "graphed", **options)
    graphed = run.fit()
    assert run._training_step.replays == 11
    for a, b in zip(eager["epochs"], graphed["epochs"], strict=True):
        assert a["train"]["loss"] == pytest.approx(b["train"]["loss"], rel=1e-3)
    longer = config(train_args__cuda_graph=True, train_args__num_epochs=5)
    again = Trainer.from_config(longer, dataset, tmp_path / "graphed", resume=True, **options)
    assert len(again.fit()["epochs"]) == 5 and again._training_step.replays == 6
