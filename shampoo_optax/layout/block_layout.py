"""BlockLayout: the one word about how parameters become blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shampoo_optax import _checks
from shampoo_optax.layout.plan import Plan, Shape, fold, make_plan, merge


@dataclass(frozen=True)
class BlockLayout:
    """How parameters are folded into matrices and cut into blocks.

    By default a matrix stays a matrix, an array of more dimensions (a convolution
    kernel, an attention projection) becomes the matrix nearest to a square, and
    scalars and vectors are not blocked: they get the magnitude rule alone.

    Args:
      max_preconditioner_dim: largest dimension of a block; a larger dimension is cut,
        the last block is smaller. ``math.inf`` never cuts. The cost of a root grows
        with its cube, the memory of a parameter does not depend on it.
      target_parameter_dimensionality: None for the folding above. A whole number or
        ``math.inf`` asks for the reference system's merging: adjacent dimensions
        merge while their product is within ``max_preconditioner_dim`` and the number
        of dimensions above this one. Its default there is 1, which turns every
        matrix of at most ``max_preconditioner_dim`` elements into a vector.
      precondition_vectors: give vectors and scalars a factor too.
      batch_axes: function of a parameter's path (``"blocks/kernel"``) and shape that
        says how many leading axes hold separate arrays: 1 for the layers of a scanned
        model or the experts of a mixture, 0 for plain parameters. None means 0.

    Raises:
      ValueError, TypeError: a number is out of range or not a whole number.

    Example:
      >>> layout = BlockLayout(max_preconditioner_dim=4)
      >>> layout.plan(["kernel", "bias"], [(10, 4), (4,)]).stacks
      {'4x4': (2, 4, 4), '2x4': (1, 2, 4)}
    """

    max_preconditioner_dim: int | float = 1024
    target_parameter_dimensionality: int | float | None = None
    precondition_vectors: bool = False
    batch_axes: Callable[[str, Shape], int] | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        size, target = self.max_preconditioner_dim, self.target_parameter_dimensionality
        name = "BlockLayout"
        _checks.whole(name, "max_preconditioner_dim", size, low=1, infinite=True)
        if target is not None:
            which = "target_parameter_dimensionality"
            _checks.whole(name, which, target, low=1, infinite=True)

    def plan(self, names: Sequence[str], shapes: Sequence[Shape]) -> Plan:
        """The blocks of named parameters.

        Args:
          names: paths of the parameters, in the order of the flattened tree.
          shapes: their shapes.

        Returns:
          The plan, a static object.

        Raises:
          ValueError: ``batch_axes`` returned something else than a number of axes.
        """
        folded = []
        for name, shape in zip(names, shapes, strict=True):
            axes = self._batch_axes(name, shape)
            batch, dims = math.prod(shape[:axes]), self._fold(shape[axes:])
            blocked = dims is not None and batch > 0
            folded.append((shape, batch, dims if blocked else None))
        return make_plan(tuple(folded), self.max_preconditioner_dim)

    def _batch_axes(self, name: str, shape: Shape) -> int:
        axes = 0 if self.batch_axes is None else self.batch_axes(name, shape)
        if not 0 <= axes <= len(shape):
            raise ValueError(
                f"BlockLayout(batch_axes=...) returned {axes!r} for parameter '{name}' "
                f"of shape {shape}; wanted the number of its leading batch axes, "
                f"0 to {len(shape)}."
            )
        return axes

    def _fold(self, shape: Shape) -> Shape | None:
        if 0 in shape:
            return None
        if self.target_parameter_dimensionality is None:
            dims = fold(shape)
        else:
            dims = merge(
                shape,
                threshold=self.max_preconditioner_dim,
                target=self.target_parameter_dimensionality,
            )
        if self.precondition_vectors:
            return dims or (1,)
        return dims if sum(d > 1 for d in dims) > 1 else None
