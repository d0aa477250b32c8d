"""The ops: one module each with schema, fake, autograd and the public function. Importing needs torch alone."""

from scalegmn_fast.ops.row_program import RowProgram, row_program
from scalegmn_fast.ops.segment_reduce import segment_reduce
from scalegmn_fast.ops.symmetrize import symmetrize

__all__ = ["RowProgram", "row_program", "segment_reduce", "symmetrize"]
