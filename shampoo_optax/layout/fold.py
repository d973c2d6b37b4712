"""Arrays of any shape to matrices: the default folding, and the reference system's."""

from __future__ import annotations

import math

from shampoo_optax.layout.plan import Shape


def fold(shape: Shape) -> Shape:
    """The default folding: an array of three or more dimensions becomes a matrix.

    Dimensions of size one are dropped. Of all ways to cut the others into a left
    and a right group the one nearest to a square is taken, the later cut on a tie.
    A matrix stays a matrix, whatever its size.

    Args:
      shape: of the parameter, without batch axes.

    Returns:
      No, one or two dimensions.

    Example:
      >>> fold((3, 3, 64, 128)), fold((512, 8, 64)), fold((1, 5))
      ((576, 128), (512, 512), (5,))
    """
    dims = tuple(d for d in shape if d != 1)
    if len(dims) < 3:
        return dims
    cuts = [
        (math.prod(dims[:i]), math.prod(dims[i:])) for i in range(len(dims) - 1, 0, -1)
    ]
    return min(cuts, key=lambda cut: max(cut) / min(cut))


def merge(shape: Shape, *, threshold: float, target: float) -> Shape:
    """The reference folding: Meta's ``merge_small_dims``.

    Dimensions of size one are dropped; then, from the last to the first, a
    dimension joins its right neighbour while the product stays within
    ``threshold`` and the number of dimensions above ``target``.

    Args:
      shape: of the parameter.
      threshold: largest merged dimension, may be infinite.
      target: dimensionality at which merging stops; infinite keeps the shape.

    Returns:
      The merged shape; ``(1,)`` for a scalar.

    Example:
      >>> merge((64, 3, 7, 7), threshold=1024, target=1)
      (64, 147)
      >>> merge((10, 20), threshold=1024, target=1)
      (200,)
    """
    if target == math.inf:
        return shape or (1,)
    dims = [d for d in shape if d != 1] or [1]
    merged = [dims.pop()]
    while dims:
        size = dims[-1] * merged[0]
        if len(merged) + len(dims) > target and size <= threshold:
            merged[0] = size
        else:
            merged.insert(0, dims[-1])
        dims.pop()
    return tuple(merged)
