"""BlockLayout: the one word about how parameters become blocks."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from shampoo_optax import _checks
from shampoo_optax.layout import placement
from shampoo_optax.layout.fold import fold, merge
from shampoo_optax.layout.merging import at_most, merged
from shampoo_optax.layout.plan import Leaf, Plan, Shape, block_sides, make_plan
from shampoo_optax.layout.routes import Devices, Spec, route_leaf

# Stacks: with more of them a program takes minutes to compile. Few models have as many.
MANY = 32
# Sizes of factors where there are more stacks: roots are compiled for every size.
SIDES = 8


@dataclass(frozen=True, repr=False)
class BlockLayout:
    """How parameters are folded into matrices and cut into blocks.

    By default a matrix stays a matrix, an array of more dimensions (a convolution
    kernel, an attention projection) becomes the matrix nearest to a square, and
    scalars and vectors are not blocked: they get the magnitude rule alone. ``repr``
    says the rule in words.

    Args:
      max_preconditioner_dim: largest dimension of a block; a larger dimension is cut,
        the last block is smaller. ``math.inf`` never cuts. The cost of a root grows
        with its cube, the memory of a parameter does not depend on it.
      target_parameter_dimensionality: None for the folding above. A whole number or
        ``math.inf`` asks for the reference system's merging: adjacent dimensions
        merge while their product is within ``max_preconditioner_dim`` and the number
        of dimensions above this one. Its default there is 1, which turns every
        matrix of at most ``max_preconditioner_dim`` elements into a vector.
      one_sided_above: the longer side of a matrix (an embedding, an output layer) is
        neither cut nor given a factor where it is larger than this; the shorter side
        has one. Half the memory and none of the roots of the long side, and every
        row of a vocabulary is measured by the same factor. ``math.inf`` for never.
        Not with ``target_parameter_dimensionality``.
      skip: which parameters are not blocked and get the magnitude rule alone: a
        regular expression that is searched in the path (``"embed|lm_head"``), or a
        function of path and shape.
      precondition_vectors: give vectors and scalars a factor too.
      turn_wide_blocks: with ``block_axes``, let a stack hold a wide block transposed,
        its longer side first, so that ``384x1024`` and ``1024x384`` are one stack and
        one exchange. No update depends on it, unless a transformation tells rows from
        columns. Not with ``target_parameter_dimensionality``.
      batch_axes: function of a parameter's path (``"blocks/kernel"``) and shape that
        says how many leading axes hold separate arrays: 1 for the layers of a scanned
        model or the experts of a mixture, 0 for plain parameters. None means 0.
      mesh: the devices; None means the mesh in use (``jax.set_mesh``).
      block_axes: axes of the mesh among whose devices the blocks, their state and
        their roots are spread. Empty for one device's program. Replicated parameters
        with ``("data",)`` are ZeRO-1, sharded ones with ``("fsdp",)`` are FSDP, with
        ``("data", "fsdp")`` HSDP. The updates do not depend on it.
      param_specs: where parameters lie: a tree of ``PartitionSpec`` like theirs, or a
        function of path and shape. None takes what explicit axes say, and on others
        replicated parameters.
      merge_stacks: let blocks of neighbouring shapes share a stack, filled with zeros,
        where that costs all devices less than the slots that both would leave empty,
        or where there are more than 32 shapes: each is compiled by itself, and roots
        for every size of a factor.
      exchange_dtype: in which blocks of updates travel back, for example
        ``jnp.bfloat16``; None means their own.
      deterministic: update one block at a time, so that every bit is the same on
        every mesh. Slower where a device owns many blocks.

    Raises:
      ValueError, TypeError: a number is out of range or not a whole number.

    Example:
      >>> layout = BlockLayout(max_preconditioner_dim=4)
      >>> layout.plan(["kernel", "bias"], [(10, 4), (4,)]).stacks
      {'4x4': (2, 4, 4), '2x4': (1, 2, 4)}
    """

    max_preconditioner_dim: int | float = 1024
    target_parameter_dimensionality: int | float | None = None
    one_sided_above: int | float = 8192
    skip: str | Callable[[str, Shape], bool] | None = None
    precondition_vectors: bool = False
    turn_wide_blocks: bool = True
    batch_axes: Callable[[str, Shape], int] | None = None
    mesh: Mesh | None = None
    block_axes: tuple[str, ...] = ()
    param_specs: Any | Callable[[str, Shape], PartitionSpec] | None = None
    merge_stacks: bool = True
    exchange_dtype: DTypeLike | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        size, target = self.max_preconditioner_dim, self.target_parameter_dimensionality
        name = "BlockLayout"
        _checks.whole(name, "max_preconditioner_dim", size, low=1, infinite=True)
        if target is not None:
            which = "target_parameter_dimensionality"
            _checks.whole(name, which, target, low=1, infinite=True)
        placement.check_axes(self.mesh, self.block_axes)
        above = self.one_sided_above
        _checks.whole(name, "one_sided_above", above, low=1, infinite=True)
        if isinstance(self.skip, str):
            try:
                re.compile(self.skip)
            except re.error as error:
                raise ValueError(
                    f"BlockLayout(skip={self.skip!r}): not a regular expression "
                    f"({error}); wanted one that is searched in parameter paths such "
                    "as 'decoder/embed/kernel', or a function of path and shape."
                ) from None

    def __repr__(self) -> str:
        """The arguments that are not the defaults, and what they mean."""
        given = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        rules = "".join(f"\n  # {rule}" for rule in in_words(self))
        return f"BlockLayout({', '.join(given)}){rules}"

    @property
    def largest_factor(self) -> int | float:
        """A dimension of a block above this has no factor."""
        if self.target_parameter_dimensionality is not None:
            return self.max_preconditioner_dim
        return min(self.max_preconditioner_dim, self.one_sided_above)

    def plan(
        self,
        names: Sequence[str],
        shapes: Sequence[Shape],
        specs: Sequence[Spec] | None = None,
    ) -> Plan:
        """The blocks of named parameters, and their way to the devices that own them.

        Args:
          names: paths of the parameters, in the order of the flattened tree.
          shapes: their shapes.
          specs: where they lie, see :func:`placement.specs_of`; None for one device.

        Returns:
          The plan, a static object.

        Raises:
          ValueError: ``batch_axes`` returned something else than a number of axes.
        """
        mesh = None if specs is None else placement.mesh_of(self.mesh, self.block_axes)
        sizes = {} if mesh is None else dict(mesh.shape)
        devices = Devices(sizes, () if mesh is None else self.block_axes)
        merging = self.target_parameter_dimensionality is not None
        above = math.inf if merging else self.one_sided_above
        leaves = []
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            axes = self.leading_axes(name, shape)
            batch, dims = math.prod(shape[:axes]), self._fold(shape[axes:])
            if dims is None or batch == 0 or self._skips(name, shape):
                leaves.append(Leaf(shape, shape, batch, None))
            elif specs is None or mesh is None:
                leaves.append(Leaf(shape, shape, batch, dims))
            else:
                sides = block_sides(dims, self.largest_factor, one_sided_above=above)
                leaves.append(route_leaf(shape, axes, dims, sides, specs[i], devices))
        plan = make_plan(
            tuple(leaves),
            self.largest_factor,
            above,
            turn=self.turn_wide_blocks and not merging and mesh is not None,
            axis_sizes=tuple(devices.sizes.items()),
            block_axes=devices.block_axes,
        )
        # Kernels of another shape round otherwise.
        if not self.merge_stacks or self.deterministic:
            return plan
        joined = merged(plan) if plan.devices > 1 else plan
        if len(joined.groups) > MANY:
            return at_most(plan, MANY, SIDES, self.largest_factor)
        return joined

    def folded(self, shape: Shape) -> Shape | None:
        """What an array without batch axes is folded to; None if it is not blocked."""
        return self._fold(shape)

    def _skips(self, name: str, shape: Shape) -> bool:
        if self.skip is None:
            return False
        if isinstance(self.skip, str):
            return re.search(self.skip, name) is not None
        return bool(self.skip(name, shape))

    def leading_axes(self, name: str, shape: Shape) -> int:
        """How many leading axes of a parameter hold separate arrays."""
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


def variants(layout: BlockLayout) -> tuple[BlockLayout, ...]:
    """A layout, and what aliases make of it where a direction tells rows from columns.

    A state is of the one whose stacks it has: the others cut the same stacks only where
    there is nothing to turn and nothing to merge.
    """
    level = dataclasses.replace(layout, turn_wide_blocks=False)
    return layout, level, dataclasses.replace(level, merge_stacks=False)


def in_words(layout: BlockLayout) -> list[str]:
    """What happens to which parameters, a line for each kind.

    Example:
      >>> print(BlockLayout(512, skip="embed"))
      BlockLayout(max_preconditioner_dim=512, skip='embed')
        # parameters that match skip: the magnitude rule alone
        # scalars and vectors: the magnitude rule alone
        # matrices: blocks of at most 512x512, a factor for each side
        # a side above 8192, if it is the longer one: not cut, no factor
        # arrays of more dimensions: folded into the matrix nearest to a square
    """
    alone = "the magnitude rule alone"
    size, above = layout.max_preconditioner_dim, layout.one_sided_above
    lines = []
    if layout.skip is not None:
        lines.append(f"parameters that match skip: {alone}")
    if layout.precondition_vectors:
        lines.append("scalars and vectors: blocks with one factor")
    else:
        lines.append(f"scalars and vectors: {alone}")
    cut = "not cut" if size == math.inf else f"blocks of at most {size}x{size}"
    lines.append(f"matrices: {cut}, a factor for each side")
    if layout.block_axes:
        lines.append(f"blocks and their state: spread over {layout.block_axes}")
    if layout.target_parameter_dimensionality is not None:
        target = layout.target_parameter_dimensionality
        lines.append(
            f"neighbouring dimensions: merged up to {size}, while there are more than "
            f"{target}"
        )
        return lines
    if above != math.inf:
        lines.append(
            f"a side above {above}, if it is the longer one: not cut, no factor"
        )
    lines.append(
        "arrays of more dimensions: folded into the matrix nearest to a square"
    )
    return lines
