"""`interop.loader`: the batches of the originals' loaders, from items read once."""

from typing import NamedTuple

import pytest
import standins
import torch
from test_accelerate import scalegmn_config

import scalegmn_fast
from scalegmn_fast.interop import loader
from scalegmn_fast.testing import random_network, relative_error

geometric = pytest.importorskip("torch_geometric.data", reason="the originals' items are PyG's")
geometric_loader = pytest.importorskip("torch_geometric.loader")
LAYOUT = [2, 4, 3, 2]


class Networks(NamedTuple):
    weights: tuple
    biases: tuple
    label: object


class Items(torch.utils.data.Dataset):
    """As the originals': an item is built when it is asked for."""

    def __init__(self, count, make):
        self.count, self.make, self.reads = count, make, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        return self.make(index)


def networks(index):
    weights, biases = random_network(LAYOUT, 1, generator=torch.Generator().manual_seed(index))
    return Networks(tuple(w[0].float() for w in weights), tuple(b[0].float() for b in biases), index % 3)


def graph(index, **changes):
    config = {**scalegmn_config("mnist_cls/scalegmn_bidir"), "layer_layout": LAYOUT}
    item = networks(index)
    fields = standins.graph_fields(config) | {"label": item.label, "y": index / 10, **changes}
    fields["sign_mask"] = torch.tensor([index % 2 == 0])
    x = torch.cat([torch.ones(LAYOUT[0], 1), *item.biases])
    return geometric.Data(x=x, edge_attr=torch.cat([w.flatten(0, 1) for w in item.weights]), **fields)


def graph_and_networks(index):
    return graph(index), networks(index), torch.full((1, 2, 2), float(index))


def assert_same(found, expected):
    if isinstance(expected, geometric.Data):
        found, expected = found.to_dict(), expected.to_dict()
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), [expected[key] for key in found]
    if torch.is_tensor(expected):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, tuple | list):
        assert type(found) is type(expected) and len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert found == expected


@pytest.mark.parametrize("make", [graph, networks, graph_and_networks])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_those_of_the_scripts_loader_from_items_read_once(make, shuffle):
    dataset = Items(7, make)
    torch.manual_seed(3)
    expected = list(geometric_loader.DataLoader(dataset, batch_size=3, shuffle=shuffle))
    packed = loader(dataset, batch_size=3, shuffle=shuffle)
    dataset.reads = 0
    torch.manual_seed(3)
    found = list(packed)
    assert len(packed) == len(found) == 3 and packed.batch_size == 3 and dataset.reads == 0
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


def test_graphs_of_several_structures_are_collated_by_geometric():
    def mixed(index):
        return graph(index) if index % 2 else graph(index, mask_hidden=torch.ones(sum(LAYOUT), 1, dtype=torch.bool))

    dataset = Items(4, mixed)
    expected = list(geometric_loader.DataLoader(dataset, batch_size=2))
    for a, b in zip(loader(dataset, batch_size=2), expected, strict=True):
        assert_same(a, b)


def test_an_accelerated_model_trains_on_it_with_the_scripts_lines():
    config = {**scalegmn_config("mnist_cls/scalegmn_bidir"), "layer_layout": LAYOUT}
    net, dataset = standins.scalegmn_model(config).eval(), Items(5, graph)
    expected = [net(batch) for batch in geometric_loader.DataLoader(dataset, batch_size=2)]
    scalegmn_fast.accelerate(net, check=True)
    for batch, out in zip(loader(dataset, batch_size=2), expected, strict=True):
        batch = batch.to("cpu")
        found = net(batch)
        torch.nn.functional.cross_entropy(found, batch.label).backward()
        assert batch.num_graphs == len(batch.label) and relative_error(found, out) <= 1e-4
    assert scalegmn_fast.report(net).fused and not scalegmn_fast.report(net).parts[0].reason


def test_bad_datasets():
    with pytest.raises(TypeError, match="dataset must have a length and items, got generator"):
        loader(item for item in [])
    with pytest.raises(ValueError, match="at least one item, got none"):
        loader(Items(0, graph))
    augmented = Items(2, graph)
    augmented.augmentation = True
    with pytest.raises(ValueError, match="must not change its items at random to be packed, got augmentation=True"):
        loader(augmented)
    with pytest.raises(ValueError, match=r"item must have one shape to be stacked, got \[\(1,\), \(2,\)\]"):
        loader(Items(2, lambda index: torch.zeros(index + 1)))
