"""Triton kernels, one module per op, imported at an op's first call on the ``triton`` backend.

Each op's module holds its kernels and the functions the op's device implementation calls: they take validated,
contiguous tensors, allocate, and launch on the current stream of the tensors' device. With ``TRITON_INTERPRET=1`` set
before Triton is first imported, the same functions run on CPU tensors.

``activations`` and ``tiles`` hold the code that kernels share; ``launching`` starts them, or only compiles what a piece
of code would start (`launching.compile_ahead`); ``tuning`` chooses tiles by time; ``compile`` builds every kernel in
every launch configuration for a named architecture, without a GPU; ``report`` prints what each of them needs.
"""
