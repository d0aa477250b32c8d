"""Layer statistics: against a direct computation, symmetries kept, published files read, bad ones refused."""

import math

import numpy as np
import pytest
import torch

from scalegmn_fast.data import LayerStatistics, PackedDataset, write_packed

LAYOUT = (2, 5, 3)


@pytest.fixture
def dataset(tmp_path):
    generator = torch.Generator().manual_seed(0)
    n = 11
    weights = [2 + 3 * torch.randn(n, a, b, 4, generator=generator) for a, b in zip(LAYOUT, LAYOUT[1:], strict=False)]
    weights[1][..., 2:] = 0.0
    biases = [0.1 * torch.randn(n, b, 1, generator=generator) for b in LAYOUT[1:]]
    write_packed(
        tmp_path / "a.safetensors", weights, biases, np.arange(n), {"train": range(8), "test": range(8, n)}, {}
    )
    return PackedDataset(tmp_path / "a.safetensors")


@pytest.mark.parametrize("chunk", [1, 20, 10**6])
@pytest.mark.parametrize("center", [True, False])
def test_against_direct_computation(dataset, monkeypatch, chunk, center):
    monkeypatch.setattr("scalegmn_fast.data.statistics._CHUNK_FLOATS", chunk)
    statistics = LayerStatistics.from_dataset(dataset, center=center)
    weights, biases = dataset.weights(dataset.split("train"))
    first, last = weights[0].double(), biases[1].double()
    mean = first.mean((0, 1, 2)) if center else torch.zeros(4, dtype=torch.float64)
    assert torch.allclose(statistics.weight_mean[0].double(), mean.reshape(1, 1, 4), rtol=1e-6)
    deviation = (first - mean).square().mean((0, 1, 2)).sqrt()
    assert torch.allclose(statistics.weight_std[0].double(), deviation.reshape(1, 1, 4), rtol=1e-6)
    expected = last.std(correction=0) if center else last.square().mean().sqrt()
    assert statistics.bias_std[1].item() == pytest.approx(expected.item(), rel=1e-6)
    assert statistics.weight_mean[1].flatten()[2:].tolist() == [0, 0]
    assert statistics.weight_std[1].flatten()[2:].tolist() == [1, 1]


def test_normalized_training_networks_are_standard(dataset):
    statistics = LayerStatistics.from_dataset(dataset)
    weights, biases = dataset.weights(dataset.split("train"))
    new_weights, new_biases = statistics.normalize(weights, biases)
    assert torch.allclose(new_weights[0].mean((0, 1, 2)), torch.zeros(4), atol=1e-6)
    assert torch.allclose(new_weights[0].std((0, 1, 2), correction=0), torch.ones(4), atol=1e-6)
    assert torch.equal(new_weights[1][..., 2:], weights[1][..., 2:])
    assert torch.allclose(new_biases[1].std(correction=0), torch.ones(()), atol=1e-6)
    back = statistics.denormalize(new_weights, new_biases)
    for a, b in zip([*back[0], *back[1]], [*weights, *biases], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(weights[0], dataset.weights(dataset.split("train"))[0][0])


def test_symmetries_are_kept(dataset):
    weights, biases = dataset.weights(slice(None))
    order, sign = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1.0, -1, -1, 1, -1])

    def moved(weights, biases, by_sign):
        factor = sign if by_sign else torch.ones(5)
        return (
            [weights[0][:, :, order] * factor[:, None], weights[1][:, order] * factor[:, None, None]],
            [biases[0][:, order] * factor[:, None], biases[1]],
        )

    for center, by_sign, kept in ((True, False, True), (False, True, True), (True, True, False)):
        statistics = LayerStatistics.from_dataset(dataset, center=center)
        one = statistics.normalize(*moved(weights, biases, by_sign))
        two = moved(*statistics.normalize(weights, biases), by_sign)
        same = [torch.allclose(a, b, atol=1e-5) for a, b in zip([*one[0], *one[1]], [*two[0], *two[1]], strict=True)]
        assert all(same) == kept


def test_dtype_and_gradients(dataset):
    statistics = LayerStatistics.from_dataset(dataset)
    weights, biases = dataset.weights([0, 1])
    weights = [w.double().requires_grad_() for w in weights]
    new_weights, _ = statistics.normalize(weights, [b.double() for b in biases])
    assert new_weights[0].dtype == torch.float64
    new_weights[0].sum().backward()
    assert torch.allclose(weights[0].grad, (1 / statistics.weight_std[0].double()).expand_as(weights[0]))


def test_state_dict_and_file(dataset, tmp_path):
    statistics = LayerStatistics.from_dataset(dataset)
    statistics.save(tmp_path / "statistics.pth")
    loaded = LayerStatistics.load(tmp_path / "statistics.pth")
    direct = LayerStatistics.from_state_dict(statistics.state_dict())
    for name in ("weight_mean", "weight_std", "bias_mean", "bias_std"):
        for a, b, c in zip(*(getattr(s, name) for s in (statistics, loaded, direct)), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


def published(inr):
    """As published: one number per parameter for INRs; per kernel tap, or one for linear layers, for CNNs."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.rand(*shape, generator=generator) + 0.5

    weights = [(2, 5, 1), (5, 3, 1)] if inr else [(2, 2), (1,)]
    biases = [(5, 1), (3, 1)] if inr else [(1,), (1,)]
    return {
        kind: {moment: [draw(*s) for s in shapes] for moment in ("mean", "std")}
        for kind, shapes in (("weights", weights), ("biases", biases))
    }


def test_published_statistics_of_inrs(tmp_path):
    state = published(inr=True)
    torch.save(state, tmp_path / "a.pth")
    statistics = LayerStatistics.load(tmp_path / "a.pth")
    weights, biases = [torch.randn(4, 2, 5, 1), torch.randn(4, 5, 3, 1)], [torch.randn(4, 5, 1), torch.randn(4, 3, 1)]
    new_weights, new_biases = statistics.normalize(weights, biases)
    expected = (weights[1] - state["weights"]["mean"][1]) / state["weights"]["std"][1]
    assert torch.allclose(new_weights[1], expected)
    assert torch.allclose(new_biases[0], (biases[0] - state["biases"]["mean"][0]) / state["biases"]["std"][0])


def test_published_statistics_of_cnns():
    state = published(inr=False)
    statistics = LayerStatistics.from_state_dict(state)
    weights, biases = [torch.randn(4, 2, 5, 4), torch.randn(4, 5, 3, 4)], [torch.randn(4, 5, 1), torch.randn(4, 3, 1)]
    weights[1][..., 1:] = 0.0
    new_weights, _ = statistics.normalize(weights, biases)
    taps = (weights[0] - state["weights"]["mean"][0].flatten()) / state["weights"]["std"][0].flatten()
    assert torch.allclose(new_weights[0], taps)
    first = (weights[1][..., 0] - state["weights"]["mean"][1]) / state["weights"]["std"][1]
    assert torch.allclose(new_weights[1][..., 0], first)
    assert torch.equal(new_weights[1][..., 1:], weights[1][..., 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("biases"), "statistics lack 'biases' -> 'mean'"),
        (lambda s: s["weights"].pop("std"), "statistics lack 'weights' -> 'std'"),
        (lambda s: s["weights"]["std"].pop(), r"weight_std: expected one tensor per layer \(2\), got 1"),
        (lambda s: s["weights"]["std"][1].zero_(), r"weight_std\[1\] must be positive"),
        (lambda s: s["biases"]["mean"][0].fill_(math.nan), r"bias_mean\[0\] holds NaN or Inf"),
        (lambda s: s["biases"]["std"].__setitem__(0, torch.ones(1, 2, 3)), r"bias_std\[0\] must have 2 dimensions"),
    ],
)
def test_bad_statistics(tmp_path, change, message):
    state = published(inr=True)
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: {message}"):
        LayerStatistics.load(tmp_path / "a.pth")


def test_foreign_files(tmp_path):
    torch.save([1], tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: not a statistics file: it holds a list"):
        LayerStatistics.load(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="b.pth: truncated, or not a .pth file"):
        LayerStatistics.load(tmp_path / "b.pth")


def test_networks_that_do_not_fit(dataset):
    statistics = LayerStatistics.from_dataset(dataset)
    weights, biases = dataset.weights([0])
    with pytest.raises(ValueError, match="expected weights and biases of 2 layers, got 1 and 2"):
        statistics.normalize(weights[:1], biases)
    with pytest.raises(ValueError, match=r"weights\[0\]: shape \[1, 2, 5, 1\] does not fit"):
        statistics.normalize([weights[0][..., :1], weights[1]], biases)
    with pytest.raises(ValueError, match=r"biases\[1\]: shape \[1, 3\] does not fit"):
        statistics.denormalize(weights, [biases[0], biases[1][..., 0]])
    with pytest.raises(ValueError, match="at least one network"):
        LayerStatistics.from_dataset(dataset, [])
