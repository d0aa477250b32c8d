"""Messages, edge updates and node updates as row programs: the modules trace themselves on `TracedRows`.

A round's message and edge update are one program over the edges (`ops.row_program`), so that an edge's state is read
once and its gradient written once. Rows are cut into sections by class and where the edge update ends; rows of the two
symmetries of ``hetero`` go through programs of their own, whose sums add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import backends
from ..ops.row_program import RowProgram, SectionWriter
from .rows import FactoredEdges, GatheredRows, RowClasses, Rows, TracedRows, UpdatedEdges, clamped, count, take
from .work import PlannedModule, WorkPlan

CLASS_NAMES = ("last", "hidden", "first")
_SERVED = (WorkPlan(), WorkPlan(across=False))


def serves(module: PlannedModule, x: Tensor) -> bool:
    """Whether an engine of `row_program` runs the module on tensors like x."""
    return module.work in _SERVED and backends.fuses(x)


def _sections(
    program: RowProgram, classes: RowClasses, cut: int, runs: tuple = ()
) -> Iterator[tuple[SectionWriter, dict, bool, int | None]]:
    """Sections of the classes that have rows, cut at row ``cut`` and at the ends of ``runs`` (`Direction.runs`).

    Gives (section, context of its rows, whether before the cut, edge type of its run or None). One without rows if no
    class has any, so that parameters get zero gradients.
    """
    present = [name for name in CLASS_NAMES if classes.range_of(name)[1]] or ["hidden"]
    absent = tuple(name for name in CLASS_NAMES if name not in present)
    for name in present:
        start, length = classes.range_of(name)
        for low, high, kind in _pieces(start, start + length, runs):
            middle = clamped(cut, low, high)
            for begin, end, before in ((low, middle, True), (middle, high, False)):
                if end > begin or (before and not length):
                    yield program.section(end - begin), {"row_class": name, "absent": absent}, before, kind
                    absent = ()


def _pieces(start: int, stop: int, runs: tuple) -> Iterator[tuple[int, int, int | None]]:
    """(first row, end, type) of the parts of a range inside of the runs, and with type None of those between them."""
    for first, length, kind in runs:
        low, high = (clamped(bound, start, stop) for bound in (first, first + length))
        yield start, low, None
        yield low, high, kind
        start = high
    yield start, stop, None


def _read_edges(
    section: SectionWriter, context: dict, e: Rows, order: Tensor | None, kind: int | None = None
) -> TracedRows:
    """Edge features of a section's rows, of layer-0 type ``kind`` if they have one; factored ones stay factored."""
    if isinstance(e, UpdatedEdges):
        return e.update.trace(_read_edges(section, context, e.base, order, kind), e.ends)
    if isinstance(e, FactoredEdges):
        return TracedRows(section, e if kind is None else e.of_type(kind), **context)
    return TracedRows(section, section.load(e, order), **context)


def _ordered(e: Rows, order: Tensor | None) -> tuple[Rows, Tensor | None]:
    """Edge features in the program's order, and what a table of them is read by."""
    if order is None or isinstance(e, Tensor):
        return e, order
    if isinstance(e, FactoredEdges):
        return take(e, order), None
    base, left = _ordered(e.base, order)
    return e._replace(base=base, ends=tuple(take(end, order) for end in e.ends)), left


def messages(
    body: Callable[[TracedRows], TracedRows],
    e: Rows,
    edges,
    update=None,
    updated_rows: int = 0,
    symmetry: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sums [T, d] of ``body(edge rows)`` per receiver, and updated edges [updated_rows, d].

    Args:
        body: traces a message; called once per section.
        e: edge features, read by number or by ``edges.order``.
        edges: `Direction`.
        update: traces ``update(edge rows)``, the edge update, on rows below ``updated_rows``; or None.
        symmetry: of all rows (``hetero``).
    """
    program = RowProgram()
    e, order = _ordered(e, edges.order)
    runs = edges.runs if isinstance(e, UpdatedEdges) else ()
    for section, context, before, kind in _sections(program, edges.classes, updated_rows, runs):
        context["symmetry"] = symmetry
        rows = _read_edges(section, context, e, order, kind)
        section.add_up(body(rows).value())
        if update is not None and before:
            section.write(update(rows).value())
    sums, written = program.run(edges.ptr.long())
    return sums, written if update is not None else None


def edges(update: Callable[[TracedRows], TracedRows], e: Rows, rows: int) -> Tensor:
    """The edge update alone, on the first ``rows`` edges."""
    program = RowProgram()
    section = program.section(rows)
    section.write(update(_read_edges(section, {}, e, None)).value())
    return program.run()[1]


def written(e: Rows) -> Rows:
    """Edge features, written out if they are updated ones that are not."""
    return edges(lambda rows: rows, e, count(e)) if isinstance(e, UpdatedEdges) else e


def net(module: PlannedModule, x: Tensor, extra: GatheredRows | None, classes: RowClasses) -> Tensor:
    """``module(x, extra, classes)`` of an `EquivariantNet` on rows [R, d]."""
    if module.symmetry == "hetero":
        start, stop = classes.start, classes.start + classes.last + classes.hidden + classes.first
        chosen = classes.split.select(start, stop)
        parts = []
        for side, (name, rows) in enumerate(zip(("sign", "scale"), chosen, strict=True)):
            part = None if extra is None else take(extra, rows)
            parts.append(_net(module, x, part, subset(classes, side), rows, name))
        out = parts[0].new_empty(x.shape[0], parts[0].shape[1])
        return out.index_copy(0, chosen[0], parts[0]).index_copy(0, chosen[1], parts[1])
    return _net(module, x, extra, classes, None, None)


def _net(module, x, extra, classes: RowClasses, order: Tensor | None, symmetry: str | None) -> Tensor:
    program = RowProgram()
    for section, context, *_ in _sections(program, classes, x.shape[0]):
        context["symmetry"] = symmetry
        rows = TracedRows(section, section.load(x, order), **context)
        p = None if extra is None else TracedRows(section, extra, **context)
        section.write(module(rows, p, classes).value())
    return program.run()[1]


def subset(classes: RowClasses, side: int) -> RowClasses:
    """Classes of the rows of one symmetry: side 0 those of sign, 1 those of scale."""
    counts = []
    for name in CLASS_NAMES:
        start, length = classes.range_of(name)
        start += classes.start
        counts.append(classes.split.select(start, start + length)[side].shape[0] if length else 0)
    return RowClasses(*counts, split=classes.split)


def subset_direction(edges, classes: RowClasses, side: int):
    """The messages of a `Direction` whose row in ``classes`` has one symmetry."""
    total = classes.last + classes.hidden + classes.first
    rows = classes.split.select(classes.start, classes.start + total)[side]
    ptr = torch.searchsorted(rows, edges.ptr.long())
    pairs = None if edges.pairs is None else (*edges.pairs[:2], edges.pairs[2][rows])
    order = rows if edges.order is None else edges.order[rows]
    return edges._replace(
        sender=edges.sender[rows],
        receiver=edges.receiver[rows],
        ptr=ptr,
        order=order,
        classes=subset(classes, side),
        pairs=pairs,
        sender_split=None,
        runs=(),
    ), rows
