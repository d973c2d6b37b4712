r"""A view in other blocks: moments are cut anew, factors as far as they tell.

A factor of a block :math:`G` sums over all its other sides: :math:`A_1 = \sum G G^T`
and :math:`A_2 = \sum G^T G`. Of a piece of the block, rows :math:`I` and columns
:math:`J`,

- the entries of :math:`A_1` on :math:`I` are exact where :math:`J` is all columns;
- where it is not, they count for as much of it as :math:`J` has of the squares, which
  :math:`A_2` knows: :math:`A_1[I, I] \cdot tr A_2[J, J] / tr A_2`.

So traces are exact wherever one side is cut. Of blocks that are joined, the sum over
the other side is exact, and what rows of one block have in common with those of another
was never measured: it begins at zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_optax import _checks
from shampoo_optax._paths import escaped, keys_of
from shampoo_optax.checkpoint.compare import WHOLE
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.layout.owners import held
from shampoo_optax.linalg import codes, packing

FACTORS, ROOTS, FAILURES = "factors", "roots", "failures"
# Compiled whole: operation by operation they are dozens of programs for every shape.
PACK, UNPACK = jax.jit(packing.pack), jax.jit(packing.unpack)
Slots = Mapping[str, Any]  # of one parameter and block shape
Blocks = Mapping[str, Slots]  # of one parameter, by block shape


@dataclass(frozen=True)
class Place:
    """Where one block lies in its folded parameter."""

    shape: str  # of the block, as the view names it
    number: int  # among those of its shape
    batch: int
    ranges: tuple[range, ...]


def places_of(layout: BlockLayout, params: Any) -> dict[str, list[Place]]:
    """All blocks of all parameters, by name; of those that are not blocked none."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [escaped(keys_of(path)) for path, _ in leaves]
    plain = [_checks.name_of(path) for path, _ in leaves]
    shapes = [tuple(leaf.shape) for _, leaf in leaves]
    axes = [layout.leading_axes(*of) for of in zip(plain, shapes, strict=True)]
    plan = layout.plan(plain, shapes)
    found: dict[str, list[Place]] = {}
    for members in held(plan, None, axes).values():
        for member in members:
            box = member.box
            cells = list(itertools.product(*map(range, box.grid)))
            for number in range(len(member.rows)):
                batch, cell = divmod(number, len(cells))
                ranges = tuple(
                    range(start + at * side, start + (at + 1) * side)
                    for start, at, side in zip(
                        box.start, cells[cell], box.whole, strict=True
                    )
                )
                shape = "x".join(map(str, box.whole))
                place = Place(shape, number, batch, ranges)
                found.setdefault(names[member.leaf], []).append(place)
    return found


def recut(
    parameters: Mapping[str, Blocks], old: BlockLayout, new: BlockLayout, params: Any
) -> dict[str, Blocks]:
    """The parameters of a view in the blocks of another layout; roots are identities.

    Args:
      parameters: in the blocks of ``old``, of arrays on the host.
      old: the layout that they were cut by, on one device.
      new: the layout that is wanted, on one device.
      params: or shapes of them.

    Returns:
      The same in the blocks of ``new``; it shares what both cut alike.

    Raises:
      ValueError: blocks of one do not nest in those of the other, or something in the
        state cannot be cut.
    """
    before, after = places_of(old, params), places_of(new, params)
    found = dict(parameters)
    for name, blocks in parameters.items():
        cut, wanted = before.get(name, []), after.get(name, [])
        if cut != wanted and blocks.keys() != {WHOLE}:
            _check_nesting(name, cut, wanted)
            made = _recut(name, _squared(blocks), cut, wanted, new.largest_factor)
            found[name] = _packed_as(blocks, made)
    return found


def _mapped(blocks: Blocks, change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Blocks with their factors and roots changed."""
    return {
        block: {
            slot: np.asarray(change(slot, jnp.asarray(array)))
            if _is_square(slot)
            else array
            for slot, array in slots.items()
        }
        for block, slots in blocks.items()
    }


def _is_square(slot: str) -> bool:
    field, dim = _field(slot)
    return dim is not None and field in (FACTORS, ROOTS)


def _squared(blocks: Blocks) -> dict[str, Any]:
    """Packed factors and roots as they are without packing.

    Of int8 with their noise on the diagonal: of less than all of a matrix it is not
    known any more.
    """

    def square(_: str, array: Any) -> Any:
        if codes.is_coded(array):
            return codes.certain(array)
        return UNPACK(array) if packing.is_packed(array) else array

    return _mapped(blocks, square)


def _packed_as(like: Blocks, blocks: Blocks) -> dict[str, Any]:
    """Factors and roots packed, where those of ``like`` are."""
    kept = {
        slot.rsplit("/", 1)[0]: array
        for slots in like.values()
        for slot, array in slots.items()
        if _is_square(slot)
    }

    def again(slot: str, array: Any) -> Any:
        was = kept[slot.rsplit("/", 1)[0]]
        if codes.is_coded(was):
            return codes.encoded(PACK(array))
        return PACK(array) if packing.is_packed(was) else array

    return _mapped(blocks, again)


def _check_nesting(name: str, old: list[Place], new: list[Place]) -> None:
    sides = [len(place.ranges) for place in old[:1] + new[:1]]
    if len(sides) < 2 or sides[0] != sides[1]:
        raise ValueError(
            f"checkpoint: parameter '{name}' is blocked in one layout and not in the "
            "other, or folded otherwise; wanted the same folding. Name it in "
            "restore(..., fresh=...)."
        )
    for dim in range(sides[0]):
        here, there = ({p.ranges[dim].start for p in places} for places in (old, new))
        if not (here <= there or there <= here):
            raise ValueError(
                f"checkpoint: the blocks of parameter '{name}' begin at "
                f"{_some(here)} there and at {_some(there)} in the layout, along side "
                f"{dim}; wanted the ones among the others, so that blocks nest. Choose "
                "a max_preconditioner_dim that divides the old one, or a multiple."
            )


def _recut(
    name: str, blocks: Blocks, old: list[Place], new: list[Place], largest: float
) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for place in new:
        counts[place.shape] = counts.get(place.shape, 0) + 1
    first = {place.shape: place for place in reversed(new)}
    made: dict[str, Any] = {k: v for k, v in blocks.items() if k == WHOLE}
    example = {p.shape: (p, blocks[p.shape]) for p in reversed(old)}
    slots = {slot: of for of in example.values() for slot in of[1]}
    for shape, count in counts.items():
        made[shape] = {}
        for slot, (place, there) in slots.items():
            dim = _field(slot)[1]
            if dim is None or _sides(first[shape])[dim] <= largest:
                begun = _begun(name, slot, there[slot], place, first[shape], count)
                made[shape][slot] = begun
    for place in new:
        for piece in _overlaps(place, old):
            for slot, into in made[place.shape].items():
                _put(into[place.number], blocks[piece.shape], slot, place, piece)
    return made


def _begun(
    name: str, slot: str, array: Any, old: Place, new: Place, count: int
) -> np.ndarray:
    """What a slot holds before anything is put into it."""
    field, dim = _field(slot)
    sides, wanted = _sides(old), _sides(new)
    if dim is None and tuple(array.shape[1:]) == sides:
        return np.zeros((count, *wanted), array.dtype)
    if dim is not None and field == FACTORS:
        return np.zeros((count, wanted[dim], wanted[dim]), array.dtype)
    if dim is not None and field == ROOTS:
        eye = np.eye(wanted[dim], dtype=array.dtype)
        return np.broadcast_to(eye, (count, *eye.shape)).copy()
    if field == FAILURES:
        return np.zeros((count, *array.shape[1:]), array.dtype)
    raise ValueError(
        f"checkpoint: '{slot}' of parameter '{name}' belongs to blocks of "
        f"{old.shape} and cannot be cut into {new.shape}: only moments, factors and "
        "inverse roots can (a second moment in an eigenbasis is of that basis alone). "
        "Restore with the old block size, or the parameters alone."
    )


def _overlaps(place: Place, old: list[Place]) -> Iterator[Place]:
    for other in old:
        shared = zip(place.ranges, other.ranges, strict=True)
        if other.batch == place.batch and all(_common(a, b) for a, b in shared):
            yield other


def _put(into: np.ndarray, there: Slots, slot: str, place: Place, piece: Place) -> None:
    """What an old block tells of a new one that it overlaps."""
    field, dim = _field(slot)
    if dim is None and field != FAILURES:
        own, its = _inside(place, piece)
        into[own] = there[slot][piece.number][its]
    elif dim is not None and field == FACTORS and slot in there:
        _add(into, there, slot, dim, place, piece)


def _add(
    into: np.ndarray, there: Slots, slot: str, dim: int, place: Place, piece: Place
) -> None:
    """What a piece of an old block adds to the factor of a new one."""
    into_new, cut = _inside(place, piece)
    own, its = into_new[dim], cut[dim]
    share = 1.0
    for other, inside in enumerate(cut):
        factor = there.get(f"{slot.rsplit('/', 1)[0]}/{other}")
        length = len(piece.ranges[other])
        if other == dim or inside == slice(0, length):
            continue
        if factor is None:  # no factor tells: as though squares were spread evenly
            share *= (inside.stop - inside.start) / length
            continue
        squares = np.diagonal(factor[piece.number]).astype(np.float64)
        share *= float(squares[inside].sum() / max(squares.sum(), math.ulp(0.0)))
    into[own, own] += (
        np.asarray(share, into.dtype) * there[slot][piece.number][its, its]
    )


def _inside(place: Place, piece: Place) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where two blocks overlap, as the one and as the other counts."""
    own, its = [], []
    for a, b in zip(place.ranges, piece.ranges, strict=True):
        both = _common(a, b)
        own.append(slice(both.start - a.start, both.stop - a.start))
        its.append(slice(both.start - b.start, both.stop - b.start))
    return tuple(own), tuple(its)


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _sides(place: Place) -> tuple[int, ...]:
    return tuple(map(len, place.ranges))


def _field(slot: str) -> tuple[str, int | None]:
    """The field that a slot is of, and the dimension that it belongs to."""
    *path, last = slot.split("/")
    field = path[-1] if last.isdigit() and path else last
    return field.split("#")[0], int(last) if last.isdigit() else None


def _some(starts: set[int]) -> str:
    listed = sorted(starts)
    return str(listed[:4])[:-1] + (", ...]" if len(listed) > 4 else "]")
