"""What a plan says of the ends of messages, on networks of two layouts."""

import pytest
import torch

from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.graph.ends import reversed_edge_types, rows_by_graph, sender_pairs, types_at
from scalegmn_fast.testing import random_network

TYPES = (2, 2)  # input neurons and hidden layers


@pytest.fixture
def plan():
    return GraphBatch.cat(
        [GraphBatch.from_weights(*random_network(layout, 2)) for layout in ([2, 3, 4, 2], [2, 2])]
    ).plan


def test_types_of_ends_are_those_of_their_nodes(plan):
    types = plan.node_types(*TYPES)
    order = plan.index("source_order")
    assert torch.equal(types_at(plan, "source", *TYPES), types[plan.index("source")])
    assert torch.equal(types_at(plan, "target", *TYPES), types[plan.index("target")])
    assert torch.equal(types_at(plan, "reversed", *TYPES), types[plan.index("target")[order]])
    outer = torch.tensor([plan.num_last, plan.num_hidden, plan.num_first]).cumsum(0)
    assert torch.equal(types_at(plan, "outer", *TYPES), torch.cat([types[: outer[0]], types[outer[1] :]]))
    assert torch.equal(reversed_edge_types(plan, *TYPES), plan.edge_types(*TYPES)[order])
    assert types_at(plan, "source", *TYPES) is types_at(plan, "source", *TYPES)


def test_a_message_s_pair_is_its_sender_with_the_edge_s_type(plan):
    count, last = plan.num_edges, plan.edges_into(plan.num_last)
    pairs = sender_pairs(plan, plan.num_nodes, count, last, *TYPES)
    assert torch.equal(pairs.node[pairs.index], plan.index("source"))
    assert torch.equal(pairs.type[pairs.index], plan.edge_types(*TYPES))
    assert pairs.node.shape[0] == plan.num_nodes + last
    few = sender_pairs(plan, plan.num_nodes, last, last, *TYPES)
    assert torch.equal(few.node[few.index], plan.index("source")[:last])


@pytest.mark.parametrize("hidden_only", [False, True])
def test_rows_by_graph(plan, hidden_only):
    owner = plan.index("node_graph")
    owner = owner[plan.num_last : plan.num_last + plan.num_hidden] if hidden_only else owner
    order, ptr = rows_by_graph(plan, hidden_only)
    assert torch.equal(order.sort().values, torch.arange(owner.shape[0]))
    assert torch.equal(owner[order], torch.repeat_interleave(torch.arange(4), ptr.diff().long()))
