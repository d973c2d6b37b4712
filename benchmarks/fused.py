"""A candidate for GPUs: products of symmetric matrices as one kernel each.

Beside XLA's in `make bench-gpu`, to be taken into the library if it is faster there. It
needs Hopper or newer, JAX's Triton backend, and sides that are multiples of 128.

What a coupled iteration multiplies are polynomials in one matrix: they commute, and
their products are symmetric. So a kernel computes the tiles on and above the diagonal,
in float16 parts (as ``precision="fp16x3"``), adds what else its step asks for, cuts the
sum into parts and writes each tile twice, once transposed. Between products nothing is
read or written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from shampoo_optax.linalg.minimax import Minimax
from shampoo_optax.linalg.precisions import SCALE, Arithmetic, float16_parts

# Rows and columns of a tile, and how many entries of them are multiplied at a time:
# four slices of 128 x 64 in three stages are 192 of the 227 KB a processor shares.
TILE, DEPTH, STAGES, WARPS = 128, 64, 3, 8


class Parts(NamedTuple):
    """A stack of symmetric matrices, ``SCALE`` times as large, cut in two."""

    high: jax.Array  # [..., d, d], float16
    low: jax.Array  # [..., d, d], float16: what high leaves


@dataclass(frozen=True)
class Fused(Minimax):
    """Minimax roots whose products are kernels of our own on NVIDIA's GPUs."""

    precision: str = "fp16x3"

    def products(self, size: int) -> dict[str, Arithmetic]:
        """As elsewhere, but for sides of whole tiles on a GPU."""
        ours = {} if size % TILE else {"cuda": fused()}
        return super().products(size) | ours


def fused(
    *, tile: int = TILE, depth: int = DEPTH, interpret: bool = False
) -> Arithmetic:
    """Products of :class:`Parts`; quadratics ``a I + b M + c M^2`` are one kernel, too.

    Args:
      tile: rows and columns of a tile.
      depth: how many entries of its rows are multiplied at a time.
      interpret: run the kernels as ordinary operations, on any platform.

    Returns:
      Products for ``Minimax``.

    Source: Ootomo and Yokota, `Recovering single precision accuracy from Tensor Cores
    <https://arxiv.org/abs/2203.03341>`_, 2022 (the parts, and sums of small products
    apart from the large ones).
    """
    multiply = partial(_multiply, tile=tile, depth=depth, interpret=interpret)
    return Arithmetic(
        product=lambda x, y: multiply(x, y, None),
        square=lambda x: multiply(x, x, None),
        quadratic=lambda step, x: multiply(x, x, step),
        hold=lambda matrices: Parts(*float16_parts(matrices)),
        free=_free,
        symmetric=lambda x: x,
    )


def _free(parts: Parts) -> jax.Array:
    return (parts.high.astype(jnp.float32) + parts.low) / SCALE


def _multiply(
    x: Parts,
    y: Parts,
    step: jax.Array | None,
    *,
    tile: int,
    depth: int,
    interpret: bool,
) -> Parts:
    """``x y``; with a step ``[3]``, ``step[0] I + step[1] x + step[2] x y``."""
    shape = x.high.shape
    operands = [part.reshape(-1, *shape[-2:]) for part in (*x, *y)]
    if step is not None:
        # In the type of the operands, which inside shard_map differ among devices.
        corner = jnp.zeros_like(operands[0][0, 0, :3], jnp.float32)
        operands.append(step.astype(jnp.float32) + corner)
    number, size, _ = operands[0].shape
    across = size // tile
    whole = jax.typeof(operands[0])
    # Inside shard_map: among which devices the results differ.
    manual = {"manual_axis_type": whole.manual_axis_type}
    out = jax.ShapeDtypeStruct(whole.shape, whole.dtype, **manual)
    kernel = pl.pallas_call(
        partial(_kernel, size=size, tile=tile, depth=depth),
        out_shape=(out, out),
        grid=(across * (across + 1) // 2, number),
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=(pl.no_block_spec, pl.no_block_spec),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="product" if step is None else "quadratic",
    )
    return Parts(*(part.reshape(shape) for part in kernel(*operands)))


def _kernel(*refs: Any, size: int, tile: int, depth: int) -> None:
    """One tile on or above the diagonal, and its mirror image."""
    *inputs, high_out, low_out = refs
    x_high, x_low, y_high, y_low, *step = inputs
    above, across = _place(pl.program_id(0))
    matrix = pl.program_id(1)
    rows, columns = pl.ds(above * tile, tile), pl.ds(across * tile, tile)

    def add(k: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple:
        inner = pl.ds(k * depth, depth)
        a, b = x_high[matrix, rows, inner], x_low[matrix, rows, inner]
        c, d = y_high[matrix, inner, columns], y_low[matrix, inner, columns]
        large, small = sums
        # The units round off what a small term leaves of a large sum: two of them.
        return large + _dot(a, c), small + _dot(a, d) + _dot(b, c)

    zero = jnp.zeros((tile, tile), jnp.float32)
    large, small = lax.fori_loop(0, size // depth, add, (zero, zero))
    total = (large + small) * (1 / SCALE)
    row = lax.broadcasted_iota(jnp.int32, (tile, tile), 0) + above * tile
    column = lax.broadcasted_iota(jnp.int32, (tile, tile), 1) + across * tile
    if step:
        own = x_high[matrix, rows, columns].astype(jnp.float32)
        own += x_low[matrix, rows, columns].astype(jnp.float32)
        identity = jnp.where(row == column, SCALE, 0.0)
        a, b, c = (step[0][i] for i in range(3))
        total = a * identity + b * own + c * total
    # Both of two threads that write an entry of the diagonal's tiles write the same.
    total = jnp.where(row > column, total.T, total)
    high = total.astype(jnp.float16)
    low = (total - high.astype(jnp.float32)).astype(jnp.float16)
    for out, part in ((high_out, high), (low_out, low)):
        out[matrix, rows, columns] = part
        out[matrix, columns, rows] = part.T


def _place(tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of a tile, those on and above the diagonal by columns."""
    # 8 t + 1 is a square where a column begins, and 8 t + 9 where the next one does.
    root = jnp.sqrt(8.0 * tile.astype(jnp.float32) + 3.0)
    across = ((root - 1.0) * 0.5).astype(jnp.int32)
    return tile - across * (across + 1) // 2, across


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
