"""The reference system's state, exported as arrays, into one of our optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from shampoo_optax.checkpoint import moves
from shampoo_optax.checkpoint.compare import WHOLE
from shampoo_optax.checkpoint.names import by_name
from shampoo_optax.checkpoint.view import abstract_view, from_param_view
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.layout.plan import Shape, block_sides

Block = Mapping[str, Any]
# The last field of our slot: where it stands in a block of theirs.
SOURCES: dict[str, tuple[str, ...]] = {
    "mu": ("filtered_grad",),
    "factors": ("shampoo", "factor_matrices"),
    "roots": ("shampoo", "inv_factor_matrices"),
    "bases": ("shampoo", "factor_matrices_eigenvectors"),
    "nu": ("adagrad",),
    "trace": ("momentum_buffer",),
}
CORRECTED = ("shampoo", "corrected_eigenvalues")  # nu, in SOAP's bases


def from_reference(
    arrays: Mapping[str, Mapping[str, Any]],
    state_like: Any,
    params: Any,
    layout: BlockLayout,
) -> Any:
    """The state of an optimizer that goes on where the reference system's is.

    Takes what ``optimizer.state_dict()["state"]`` of Meta's Distributed Shampoo holds,
    with tensors as NumPy arrays (no torch is needed): for each parameter ``step`` and,
    by block (``block_0``, ``rank_0-block_0``), ``shampoo`` (``factor_matrices``,
    ``inv_factor_matrices``, ``factor_matrices_eigenvectors``,
    ``corrected_eigenvalues``, each by dimension), ``filtered_grad``,
    ``momentum_buffer`` and ``adagrad``, the grafting method's second moment. Symmetric
    matrices may be packed (the upper triangle, row by row).

    Args:
      arrays: by our parameter path (``"layers/0/kernel"``), in our shapes: a kernel
        that was transposed on its way from torch has to be so in its state, too.
      state_like: ``tx.init(params)`` or its shapes.
      params: or shapes of them.
      layout: as the reference had it, for example
        ``BlockLayout(1024, target_parameter_dimensionality=1,
        precondition_vectors=True)``.

    Returns:
      The state, every counter at ``step``.

    Raises:
      ValueError: something is missing, has another shape, or steps differ; it says of
        which parameter and block. The eigendecomposed form, whose roots the reference
        makes anew at every step, is not read.

    Source: the state of `facebookresearch/optimizers
    <https://github.com/facebookresearch/optimizers>`_, ``distributed_shampoo``.
    """
    view = abstract_view(state_like, params, layout)
    steps = {int(of["step"]) for of in arrays.values()}
    if len(steps) != 1:
        raise ValueError(
            f"from_reference: parameters are at the steps {sorted(steps)}; wanted one."
        )
    known = by_name(params)
    made: dict[str, Any] = {}
    for name, boxes in view["parameters"].items():
        if name not in arrays:
            raise ValueError(
                f"from_reference: there is no state of parameter '{name}', only of "
                f"{sorted(arrays)[:4]}. Name states by our paths."
            )
        dims = layout.folded(known[name].shape)
        if dims is None:
            raise ValueError(
                f"from_reference: the layout does not block parameter '{name}', and "
                "the reference does. Pass target_parameter_dimensionality=1 and "
                "precondition_vectors=True."
            )
        cut = _Cut(name, arrays[name], dims, block_sides(dims, layout.largest_factor))
        made[name] = {
            box: {slot: cut.read(box, slot, like) for slot, like in slots.items()}
            for box, slots in boxes.items()
        }
    (step,) = steps
    shared = {slot: _counter(slot, step) for slot in view["shared"]}
    found = {"parameters": made, "shared": shared, "version": moves.VERSION}
    arrived = jax.tree.map(_arrived, view, found)
    return from_param_view(arrived, state_like, params, layout)


class _Cut:
    """What the reference has of one parameter, block after block."""

    def __init__(self, name: str, state: Block, dims: Shape, sides: Shape) -> None:
        self.name, self.dims = name, dims
        starts = [range(0, d, side) for d, side in zip(dims, sides, strict=True)]
        self.where = [
            tuple(
                slice(a, min(a + side, d))
                for a, side, d in zip(corner, sides, dims, strict=True)
            )
            for corner in itertools.product(*starts)
        ]
        blocks = {
            int(key.rsplit("_", 1)[-1]): block
            for key, block in state.items()
            if "block_" in key
        }
        if sorted(blocks) != list(range(len(self.where))):
            raise ValueError(
                f"from_reference: parameter '{name}' has the blocks {sorted(blocks)}; "
                f"the layout cuts {dims} into {len(self.where)}. Pass the reference's "
                "max_preconditioner_dim."
            )
        self.blocks = [blocks[i] for i in range(len(blocks))]

    def read(self, box: str, slot: str, like: Any) -> np.ndarray:
        """One slot of the blocks of one shape."""
        field, dim = _field(slot)
        if box == WHOLE:  # in the parameter's own shape
            whole = np.zeros(self.dims, like.dtype)
            for i, where in enumerate(self.where):
                whole[where] = self._get(i, field, dim)
            return whole.reshape(like.shape)
        chosen = [
            i
            for i, where in enumerate(self.where)
            if "x".join(str(side.stop - side.start) for side in where) == box
        ]
        if field in ("failures", "null"):
            return np.zeros(like.shape, like.dtype)
        found = [self._get(i, field, dim) for i in chosen]
        return np.stack([_unpacked(x, like.shape[1:]) for x in found])

    def _get(self, number: int, field: str, dim: int | None) -> np.ndarray:
        node: Any = self.blocks[number]
        soap = "corrected_eigenvalues" in node.get("shampoo", {})
        path: tuple[Any, ...] = CORRECTED if field == "nu" and soap else SOURCES[field]
        path += () if dim is None else (dim,)
        for key in path:
            if not isinstance(node, Mapping) or (
                key not in node and str(key) not in node
            ):
                raise ValueError(
                    f"from_reference: block {number} of parameter '{self.name}' has no "
                    f"{'/'.join(map(str, path))}, which this optimizer's '{field}' is. "
                    "Pass an optimizer of the reference's configuration."
                )
            node = node[key] if key in node else node[str(key)]
        return np.asarray(node)


def _field(slot: str) -> tuple[str, int | None]:
    """The last named step of a slot, and its dimension."""
    *before, last = slot.split("/")
    dim = int(last) if last.isdigit() else None
    field = before[-1] if dim is not None else last
    if field not in (*SOURCES, "failures", "null"):
        raise ValueError(
            f"from_reference: the reference has nothing that '{slot}' could be."
        )
    return field, dim


def _counter(slot: str, step: int) -> np.ndarray:
    if slot.split("/")[-1].split("#")[0] != "count":
        raise ValueError(
            f"from_reference: '{slot}' is no counter, and the reference has nothing it "
            "could be. Read the state of the inner optimizer alone."
        )
    return np.asarray(step, np.int32)


def _unpacked(array: np.ndarray, shape: Shape) -> np.ndarray:
    """A symmetric matrix from its upper triangle, row by row; others as they are."""
    side = shape[0] if shape else 0
    if array.shape == shape or array.shape != (side * (side + 1) // 2,):
        return array
    full = np.zeros(shape, array.dtype)
    rows, columns = np.triu_indices(side)
    full[rows, columns] = array
    full[columns, rows] = array
    return full


def _arrived(like: Any, found: Any) -> jax.Array:
    array = np.asarray(found)
    if array.shape != tuple(like.shape):
        raise ValueError(
            f"from_reference: an array of shape {array.shape} came where "
            f"{tuple(like.shape)} is wanted. Pass the layout that the reference had."
        )
    return moves.constant(array.astype(like.dtype), like.sharding)
