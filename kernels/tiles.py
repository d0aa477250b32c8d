"""What kernels and their launchers share: the arithmetic type, row statistics, tile shapes."""

import torch
import triton
import triton.language as tl

LAYER_NORM_EPS = 1e-5

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# A tile holds 8 elements per thread: two 16-byte loads of float32 in flight per tensor, and room in registers for the
# nine tiles that the widest backward pass keeps.
ELEMENTS_PER_THREAD = 8
WARPS = 4
TILE = ELEMENTS_PER_THREAD * 32 * WARPS
MIN_COLS = 32
MAX_WIDTH = 4096


def next_power_of_2(n):
    """Smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def launch_options(num_warps):
    """Compiler options of every launch. Fused multiply-add is pinned: its default differs between Triton's versions."""
    return {"num_warps": num_warps, "enable_fp_fusion": True}


def row_tile(width):
    """Launch configuration for whole rows of `width` in registers: the kernel's constants and the compiler's options.

    Up to 1024 columns a tile is 1024 elements in 4 warps; wider rows stand alone in a tile and take more warps.
    """
    cols = max(MIN_COLS, next_power_of_2(width))
    return {"BLOCK_ROWS": max(1, TILE // cols), "BLOCK_COLS": cols, **launch_options(max(WARPS, WARPS * cols // TILE))}


def accumulator_type(dtype):
    """Type a kernel computes in for tensors of `dtype`: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def standardize(x, mask, width, EPS: tl.constexpr):
    """(x - mean) / sqrt(var + EPS) of each row, 0 outside `mask`, and 1 / sqrt(var + EPS). x is 0 outside `mask`."""
    mean = tl.sum(x, 1) / width
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def standardize_backward(grad, normal, rstd, width):
    """Gradient of `standardize` for x, from that of its first result; all tiles are 0 outside the mask."""
    mean = tl.sum(grad, 1) / width
    slope = tl.sum(grad * normal, 1) / width
    return (grad - mean[:, None] - normal * slope[:, None]) * rstd[:, None]
