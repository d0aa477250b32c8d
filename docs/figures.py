"""Draws the figures of docs/how-the-kernels-work.md: `python docs/figures.py [FOLDER]`.

The order of nodes and edges, and the steps of the row program, are those of a `GraphPlan` and of a model that run here.
Needs matplotlib and the compiled module.
"""

import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch.utils._python_dispatch import TorchDispatchMode

from scalegmn_fast.graph import GraphBatch, GraphPlan
from scalegmn_fast.models import from_config, published_config
from scalegmn_fast.reference.row_program import sections

INK, GREY, PAPER = "#22303c", "#8795a1", "#ffffff"
GRAPHS = ("#a8d0e6", "#f6c89f")
MEMORY, CACHE, PARAMETER, GRADIENT = "#e3e8ee", "#d3ecd5", "#efe3f7", "#fbd9d3"
THREADS = ("#a8d0e6", "#f6c89f", "#c9e4b4")
STYLE = {"svg.hashsalt": "scalegmn_fast", "font.size": 10, "text.color": INK}


def canvas(width, height):
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text="", color=MEMORY, size=10, edge=INK):
    shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.06", fc=color, ec=edge, lw=1)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size)


def arrow(axes, start, end, color=INK, style="-|>", width=1.3):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=11, color=color, lw=width, shrinkA=0))


def bracket(axes, left, right, y):
    axes.plot([left, left, right, right], [y + 0.08, y, y, y + 0.08], color=INK, lw=1)


def plan_order():
    layout = (2, 3, 3, 1)
    plan = GraphPlan.from_layout(layout, 2)
    owner, layer, place = (plan.index(name).tolist() for name in ("node_graph", "node_layer", "node_position"))
    source, target = plan.index("source").tolist(), plan.index("target").tolist()
    figure, axes = canvas(10, 5.9)

    where = {}
    for node in range(plan.num_nodes):
        middle = (layout[layer[node]] - 1) / 2
        where[node] = (0.75 + 4.9 * owner[node] + 1.15 * layer[node], 4.55 - 0.62 * (place[node] - middle))
    for a, b in zip(source, target, strict=True):
        axes.plot(*zip(where[a], where[b], strict=True), color=GREY, lw=0.7, zorder=1)
    for node, (x, y) in where.items():
        axes.plot(x, y, "o", ms=19, mfc=GRAPHS[owner[node]], mec=INK, zorder=2)
        axes.text(x, y, str(node), ha="center", va="center", size=9, zorder=3)
    for graph in range(2):
        axes.text(2.45 + 4.9 * graph, 5.6, f"network {graph}, layers {'-'.join(map(str, layout))}", ha="center")

    axes.text(0.3, 3.55, "nodes", weight="bold")
    cell, left = 9.2 / plan.num_nodes, 0.4
    for node in range(plan.num_nodes):
        axes.add_patch(Rectangle((left + node * cell, 2.75), cell, 0.4, fc=GRAPHS[owner[node]], ec=INK, lw=0.8))
        axes.text(left + (node + 0.5) * cell, 2.95, str(node), ha="center", va="center", size=9)
    row = 0
    names = iter(["last", "hidden, one edge from the output", "hidden, two edges", "first"])
    for block in plan.blocks:
        axes.text(left + (row + block.nodes / 2) * cell, 3.28, next(names), ha="center", size=9)
        row += block.nodes
        if row < plan.num_nodes:
            axes.plot([left + row * cell] * 2, [2.65, 3.25], color=INK, lw=2)
    for distance, y in ((0, 2.55), (1, 2.2), (2, 1.85)):
        text = ("nodes that the last round computes", "those of the round before", "and before that")[distance]
        count = plan.live_nodes(distance)
        bracket(axes, left, left + count * cell, y)
        axes.text(left + count * cell + 0.1, y - 0.03, text, va="center", size=9)

    axes.text(0.3, 1.38, "edges, by target, then by source", weight="bold")
    cell = 9.2 / plan.num_edges
    for edge, end in enumerate(target):
        axes.add_patch(Rectangle((left + edge * cell, 0.85), cell, 0.4, fc=GRAPHS[owner[end]], lw=0))
        axes.plot([left + edge * cell] * 2, [0.85, 0.93], color=INK, lw=0.6)
    start = 0
    for edge in range(1, plan.num_edges + 1):
        if edge == plan.num_edges or target[edge] != target[start]:
            axes.text(left + (start + edge) / 2 * cell, 1.05, f"to {target[start]}", ha="center", va="center", size=7)
            axes.plot([left + edge * cell] * 2, [0.78, 1.32], color=INK, lw=1.6)
            start = edge
    counts = [plan.edges_into(plan.live_nodes(distance)) for distance in (0, 1)]
    for count, y in zip(counts, (0.68, 0.3), strict=True):
        bracket(axes, left, left + count * cell, y)
    axes.text(left + counts[0] * cell + 0.1, 0.65, "edges that the last round reads", va="center", size=9)
    axes.text(left + counts[1] * cell + 0.1, 0.27, "those of the round before", va="center", size=9)
    return figure


class Programs(TorchDispatchMode):
    """Keeps the arguments of the row programs that run within it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.scalegmn_fast.row_program.default:
            self.found.append(args)
        return function(*args, **(kwargs or {}))


def hidden_section():
    """The section of the third of five rounds that has messages into hidden neurons and updates of their edges."""
    shapes = ((2, 32), (32, 32), (32, 1))
    weights, biases = [torch.ones(4, *shape) for shape in shapes], [torch.ones(4, width) for _, width in shapes]
    batch = GraphBatch.from_weights(weights, biases)
    config = published_config("mnist_cls/scalegmn")
    config["scalegmn_args"]["num_layers"] = 5
    with torch.no_grad(), Programs() as programs:
        from_config(config).eval()(batch)
    rounds = [list(sections(*args[2:5])) for args in programs.found]
    rounds = [round for round in rounds if any(section.reduced >= 0 for section in round)]
    return max(rounds[2], key=lambda section: len(section.steps))


# Centres of the boxes of its steps, by number.
PLACES = (
    (4.9, 6.6), (4.2, 5.8), (4.2, 5.0), (4.2, 4.2), (4.2, 3.4), (4.2, 2.6), (4.2, 1.8), (4.2, 1.0),
    (2.55, 4.2), (2.55, 0.2), (5.9, 4.2), (7.5, 5.0), (7.5, 4.2), (7.5, 3.4), (7.5, 2.6), (5.9, 0.2),
)  # fmt: skip


def row_program():
    section = hidden_section()
    if len(section.steps) != len(PLACES):
        raise ValueError(f"PLACES has {len(PLACES)} steps, the program {len(section.steps)}")
    figure, axes = canvas(10.6, 8.05)
    bottom = 0.75
    axes.add_patch(Rectangle((1.7, bottom - 0.2), 6.6, 7.15, fc=CACHE, ec=INK, lw=1.2, ls="--"))
    axes.text(5.0, bottom + 7.05, "a tile of 16 to 256 rows (edges), in the L2 cache", ha="center", size=9.5)

    where = [(x, y + bottom - 0.1) for x, y in PLACES]
    half_width, half_height = 0.68, 0.22
    for step, (x, y) in zip(section.steps, where, strict=True):
        for operand in (step.a, step.b):
            if operand >= 0:
                from_x, from_y = where[operand]
                arrow(axes, (from_x, from_y - half_height), (x, y + half_height))
    for number, (step, (x, y)) in enumerate(zip(section.steps, where, strict=True)):
        corner = (x - half_width, y - half_height)
        box(axes, *corner, 2 * half_width, 2 * half_height, step.op, PAPER, size=9.5)
        axes.text(corner[0] + 0.05, y + half_height - 0.03, str(number), ha="left", va="top", size=6.5, color=GREY)

    for number, x, text in (
        (0, 0.1, "edge state\n[E, d], by rows"),
        (2, 0.1, "node rows w_v x\n[N, d], gathered"),
        (11, 9.0, "node rows, source\n[N, d], gathered"),
        (12, 9.0, "node rows, target\n[N, d], gathered"),
    ):
        y = where[number][1]
        box(axes, x, y - 0.3, 1.5, 0.6, text, MEMORY, size=8.5)
        side = half_width if x > where[number][0] else -half_width
        arrow(axes, (x + 1.5 if x < 5 else x, y), (where[number][0] + side, y))
    for number, x, text in (
        (section.reduced, 0.1, "added up\nper receiver [N, d]"),
        (section.rows, 9.0, "new edge state\n[E, d], by rows"),
    ):
        y = where[number][1]
        box(axes, x, y - 0.3, 1.5, 0.6, text, MEMORY, size=8.5)
        side = half_width if x > where[number][0] else -half_width
        arrow(axes, (where[number][0] + side, y), (x + 1.5 if x < 5 else x, y))
    axes.text(where[section.reduced][0] + 0.85, where[section.reduced][1], "the message", size=9.5, va="center")
    axes.text(where[section.rows][0] + 0.85, where[section.rows][1] + 0.14, "the updated edge", size=9.5, va="bottom")
    axes.text(5.0, 0.2, "In between nothing of size edges x width reaches memory.", ha="center", size=9.5)
    return figure


def backward():
    figure, axes = canvas(12, 5.2)
    for left, width, title in ((0.3, 2.6, "forward"), (4.9, 5.2, "backward, the same tile again")):
        axes.add_patch(Rectangle((left, 1.35), width, 3.25, fc=CACHE, ec=INK, lw=1.2, ls="--"))
        axes.text(left + width / 2, 4.75, title, ha="center", size=10, weight="bold")
    heights = (3.95, 3.15, 2.35, 1.55)
    names = ("load", "linear", "symmetrize", "linear")
    for text, y in zip(names, heights, strict=True):
        box(axes, 0.55, y, 2.1, 0.45, text, PAPER)
        box(axes, 5.15, y, 2.0, 0.45, text, PAPER)
        box(axes, 7.85, y, 2.05, 0.45, f"gradient of {text}", GRADIENT, size=9)
    for upper, lower in zip(heights[:-1], heights[1:], strict=True):
        arrow(axes, (1.6, upper), (1.6, lower + 0.45))
        arrow(axes, (6.15, upper), (6.15, lower + 0.45))
        arrow(axes, (8.87, lower + 0.45), (8.87, upper))
    for y in heights:
        arrow(axes, (7.15, y + 0.22), (7.85, y + 0.22), color=GREY, width=1)
        axes.plot([9.9, 10.35], [y + 0.22] * 2, color=INK, lw=1.3)
    axes.text(7.5, heights[1] - 0.17, "values,\nslopes", ha="center", va="center", size=7.5, color=GREY)
    box(axes, 3.2, heights[0] - 0.1, 1.4, 0.65, "inputs,\nin memory", MEMORY, size=9)
    arrow(axes, (3.2, heights[0] + 0.22), (2.65, heights[0] + 0.22))
    arrow(axes, (4.6, heights[0] + 0.22), (5.15, heights[0] + 0.22))
    axes.text(3.9, 2.75, "nothing else\nis kept", ha="center", va="center", size=9)
    box(axes, 0.75, 0.4, 1.7, 0.5, "result", MEMORY, size=9)
    arrow(axes, (1.6, heights[-1]), (1.6, 0.9))
    box(axes, 7.85, 0.4, 2.05, 0.5, "gradient of the result", GRADIENT, size=9)
    arrow(axes, (8.87, 0.9), (8.87, heights[-1]))
    axes.plot([10.35, 10.35], [heights[-1] + 0.22, heights[0] + 0.22], color=INK, lw=1.3)
    arrow(axes, (10.35, 2.97), (10.6, 2.97))
    box(axes, 10.6, 2.5, 1.25, 0.95, "gradients:\nedges, nodes,\nparameters", GRADIENT, size=8.5)
    return figure


def partitions():
    figure, axes = canvas(10, 4.6)
    axes.text(0.3, 4.3, "rows of a program, cut by their number alone", weight="bold")
    axes.text(4.05, 4.3, "a free thread takes the next", size=9, color=GREY)
    width, owners = 9.4 / 8, (0, 1, 2, 0, 2, 1, 0, 1)
    for part, owner in enumerate(owners):
        left = 0.3 + part * width
        axes.add_patch(Rectangle((left, 3.5), width, 0.55, fc=THREADS[owner], ec=INK, lw=1))
        axes.text(left + width / 2, 3.78, f"part {part}", ha="center", va="center", size=9)
        arrow(axes, (left + width / 2, 3.5), (left + width / 2, 2.75))
        box(axes, left + 0.12, 2.25, width - 0.24, 0.5, f"place {part}", PARAMETER, size=9)
    for k, color in enumerate(THREADS):
        axes.add_patch(Rectangle((6.6 + 1.1 * k, 4.28), 0.18, 0.18, fc=color, ec=INK, lw=0.8))
        axes.text(6.85 + 1.1 * k, 4.37, f"thread {k}", va="center", size=9)
    axes.text(0.3, 0.55, "the places are added in order, after all parts are done", size=9, color=GREY)
    previous = None
    for part in range(8):
        middle = 0.3 + (part + 0.5) * width
        arrow(axes, (middle, 2.25), (middle, 1.4))
        axes.text(middle, 1.2, "+", ha="center", va="center", size=12)
        axes.plot(middle, 1.2, "o", ms=15, mfc="none", mec=INK)
        if previous is not None:
            arrow(axes, (previous + 0.15, 1.2), (middle - 0.15, 1.2))
        previous = middle
    arrow(axes, (previous, 1.05), (previous, 0.65))
    box(axes, previous - 2.6, 0.15, 3.1, 0.5, "gradient: the same bits every time", GRADIENT, size=9)
    return figure


def draw(folder):
    """Writes NAME.svg for each figure."""
    with rc_context(STYLE):
        for figure in (plan_order, row_program, backward, partitions):
            figure().savefig(folder / f"{figure.__name__}.svg", metadata={"Date": None}, facecolor=PAPER)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
