"""Every op in plain, differentiable PyTorch: any device, any floating dtype, second order included.

The oracle of the tests, the baseline of the benchmarks and the backend of last resort. float16 and bfloat16 inputs are
computed in float32 and cast once at the end, as the fused kernels do; products of row programs with a bfloat16 weight
take bfloat16 rows.
"""

from scalegmn_fast.reference.edge_mlp import edge_mlp
from scalegmn_fast.reference.pna_message import pna_message
from scalegmn_fast.reference.relational_attention import relational_attention
from scalegmn_fast.reference.row_program import row_program
from scalegmn_fast.reference.segment_reduce import segment_reduce
from scalegmn_fast.reference.symmetrize import symmetrize

__all__ = ["edge_mlp", "pna_message", "relational_attention", "row_program", "segment_reduce", "symmetrize"]
