"""Rows of stacks to blocks by parameter and back, on one device or many.

On a mesh the exchange is one all-to-all each way: a stack is laid out along a side of
its blocks in place of its rows, and then every parameter's rows are taken without any
exchange. Where no side divides by the devices, every one of them holds the whole stack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from shampoo_optax.checkpoint.digest import in_turn
from shampoo_optax.checkpoint.entries import Cut
from shampoo_optax.layout import placement
from shampoo_optax.layout.owners import Held
from shampoo_optax.layout.plan import Shape
from shampoo_optax.linalg import codes, packing

# Of the view's names and meanings; golden checkpoints hold every one.
VERSION = np.int32(1)
# What our parts begin with in square matrices that no block fills: the identity, so
# that a basis is one also where it is empty; zeros elsewhere.
IDENTITIES = ("roots", "bases")
# Of symmetric matrices, in a rectangle of fewer bytes.
FOLDED = ("packed", "codes")


class Home:
    """The devices that own blocks; None for one."""

    def __init__(self, mesh: Mesh | None, axes: tuple[str, ...]) -> None:
        """Forget whether axes are explicit: nothing here is typed by sharding."""
        self.axes = axes
        self.mesh = mesh
        self.plain: Mesh | None = None
        if mesh is not None:
            kinds = (AxisType.Auto,) * len(mesh.axis_names)
            self.plain = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)

    @property
    def devices(self) -> int:
        """How many own different blocks."""
        if self.plain is None:
            return 1
        return math.prod(self.plain.shape[axis] for axis in self.axes)

    def typed(self, ndim: int) -> NamedSharding | None:
        """Where stacks lie on the mesh as it is, as a compiled step returns them."""
        if self.mesh is None:
            return None
        return placement.sharding(self.mesh, PartitionSpec(self.axes), ndim)

    def everywhere(self, ndim: int) -> NamedSharding | None:
        """On every device."""
        if self.mesh is None:
            return None
        return placement.sharding(self.mesh, PartitionSpec(), ndim)

    def rows(self) -> NamedSharding | None:
        """Where stacks lie."""
        return self._at(0)

    def aside(self, shape: Shape) -> NamedSharding | None:
        """Where an array lies that is spread along a side, or else along its rows."""
        order = [*range(1, len(shape)), 0][: len(shape)]
        fits = [i for i in order if shape[i] % self.devices == 0]
        return self._at(fits[0] if fits else None)

    def off_rows(self, shape: Shape) -> NamedSharding | None:
        """Where a stack lies so that its rows are everywhere."""
        fits = [i for i in range(1, len(shape)) if shape[i] % self.devices == 0]
        return self._at(fits[0] if fits else None)

    def _at(self, dim: int | None) -> NamedSharding | None:
        if self.plain is None:
            return None
        spec = () if dim is None else (*(None,) * dim, self.axes)
        return NamedSharding(self.plain, PartitionSpec(*spec))


def shape_of(entry: Cut, member: Held, stack: Shape) -> Shape:
    """The shape of one parameter's part of a leaf, in its own orientation."""
    return (len(member.rows), *sides_of(entry, member, stack, own=True))


def taken(
    entry: Cut, stack: jax.Array, home: Home, where: Sharding | None
) -> list[jax.Array]:
    """The members' parts of a leaf in stacks, which lies, or is put, ``where``."""
    run = _taker(
        tuple(len(member.rows) for member in entry.members),
        tuple(sides_of(entry, m, stack.shape, own=False) for m in entry.members),
        turned(entry),
        entry.kind in FOLDED,
        home.off_rows(stack.shape),
        tuple(home.aside(shape_of(entry, m, stack.shape)) for m in entry.members),
    )
    places = [_places(member.rows) for member in entry.members]
    return in_turn(run(placed(stack, where), places))


def given(
    entry: Cut, parts: Sequence[jax.Array], stack: Shape, home: Home
) -> jax.Array:
    """A leaf in stacks from the members' parts; the inverse of :func:`taken`."""
    live = sum(len(member.rows) for member in entry.members)
    source = np.full(stack[0], live)  # dead rows come from one behind the live ones
    start = 0
    for member in entry.members:
        source[member.rows] = np.arange(start, start + len(member.rows))
        start += len(member.rows)
    ordered = bool((source == np.arange(live)).all()) if len(source) == live else False
    run = _giver(
        len(source) > live,
        ordered,
        tuple(stack[1:]),
        turned(entry),
        entry.kind in FOLDED,
        begins_as_identity(entry, stack),
        home.off_rows(stack),
        home.rows(),
    )
    parts = [placed(part, home.aside(part.shape)) for part in parts]
    return in_turn(run(parts, source.astype(np.int32)))


def placed(array: Any, where: Sharding | None) -> jax.Array:
    """An array where it is wanted; a traced one, or on one device, stays."""
    if isinstance(array, np.ndarray):  # copied, so that a step may be given its memory
        array, where = jnp.asarray(array), where or jnp.zeros(()).sharding
    if where is None or isinstance(array, jax.core.Tracer):
        return array
    return in_turn(jax.device_put(array, where))


def begins_as_identity(entry: Cut, stack: Shape) -> bool:
    """Whether what no block fills is an identity, and not zeros."""
    square = entry.kind in ("sides", "packed") and len(stack) == 3
    return square and entry.slot.split("/")[-1].split("#")[0] in IDENTITIES


def nothing(like: Any) -> np.ndarray:
    """An array of size zero."""
    return np.zeros(like.shape, like.dtype)


def constant(value: np.ndarray | np.generic, where: Sharding | None) -> jax.Array:
    """What all processes know, as an array where it is wanted."""
    return jnp.asarray(value) if where is None else jax.device_put(value, where)


def sides_of(entry: Cut, member: Held, stack: Shape, *, own: bool) -> Shape:
    """The sides of a member's part, in its own orientation or the stack's."""
    if entry.kind == "number":
        return tuple(stack[1:])
    if entry.kind == "sides":
        assert entry.dim is not None
        return (member.box.stacked[entry.dim],) * (len(stack) - 1)
    if entry.kind == "packed":
        assert entry.dim is not None
        return packing.packed_shape(member.box.stacked[entry.dim])
    if entry.kind == "codes":
        assert entry.dim is not None
        return codes.coded_shape(member.box.stacked[entry.dim])
    return member.box.whole if own else member.box.stacked


def turned(entry: Cut) -> tuple[bool, ...]:
    """Which members lie transposed in the stack."""
    return tuple(entry.kind == "block" and m.box.turned for m in entry.members)


def neighbours(rows: np.ndarray) -> bool:
    """Whether rows lie one after another, in order."""
    return bool((rows == np.arange(rows[0], rows[0] + len(rows))).all())


def _places(rows: np.ndarray) -> np.ndarray:
    """Rows as data; of a run of neighbours the first."""
    return np.asarray(rows[0] if neighbours(rows) else rows, np.int32)


@functools.lru_cache(maxsize=1024)
def _taker(
    counts: tuple[int, ...],
    sides: tuple[Shape, ...],
    turned: tuple[bool, ...],
    packed: bool,
    between: NamedSharding | None,
    where: tuple[NamedSharding | None, ...],
) -> jax.stages.Wrapped:
    # Slices at places given as data are one kernel for all parameters of one shape.
    def take(stack: jax.Array, places: list[jax.Array]) -> list[jax.Array]:
        stack = _laid(stack, between)
        found = []
        for place, count, own, turn in zip(places, counts, sides, turned, strict=True):
            if place.ndim:
                part = jnp.take(stack, place, axis=0)
            else:
                part = lax.dynamic_slice_in_dim(stack, place, count)
            part = cut(part, own, packed)
            found.append(jnp.swapaxes(part, 1, 2) if turn else part)
        return found

    return jax.jit(take, out_shardings=None if between is None else list(where))


@functools.lru_cache(maxsize=1024)
def _giver(
    dead: bool,
    ordered: bool,
    slot: Shape,
    turned: tuple[bool, ...],
    packed: bool,
    eye: bool,
    between: NamedSharding | None,
    where: NamedSharding | None,
) -> jax.stages.Wrapped:
    def give(parts: list[jax.Array], source: jax.Array) -> jax.Array:
        filled = [
            filled_up(jnp.swapaxes(part, 1, 2) if turn else part, slot, packed, eye)
            for part, turn in zip(parts, turned, strict=True)
        ]
        if dead:
            filled.append(nothing_in(slot, filled[0].dtype, packed, eye))
        stack = _laid(lax.concatenate(filled, 0), between)
        return stack if ordered else jnp.take(stack, source, axis=0)

    return jax.jit(give, out_shardings=where)


def cut(part: jax.Array, own: Shape, packed: bool) -> jax.Array:
    """A part in a block's own shape, of one that zeros may fill."""
    if part.shape[1:] == own:
        return part
    if packed and codes.is_coded(part):
        return codes.resized(part, own[0] - codes.BELOW)
    if packed:
        side = own[0] - 1
        return packing.pack(packing.unpack(part)[:, :side, :side])
    return lax.slice(part, (0,) * part.ndim, (len(part), *own))


def filled_up(part: jax.Array, slot: Shape, packed: bool, eye: bool) -> jax.Array:
    """A part filled up to the stack's shape, with zeros or an identity."""
    if not packed or part.shape[1:] == slot:
        return _filled(part, slot, eye)
    if codes.is_coded(part):
        return codes.resized(part, slot[0] - codes.BELOW)
    return packing.pack(_filled(packing.unpack(part), (slot[0] - 1,) * 2, eye))


def nothing_in(slot: Shape, dtype: Any, packed: bool, eye: bool) -> jax.Array:
    """A row of a stack that holds no block."""
    packed = packed and dtype != jnp.int8  # codes of zeros are zeros
    whole = (slot[0] - 1,) * 2 if packed else slot
    empty = jnp.zeros((1, *(0 if d > 1 else d for d in whole)), dtype)
    row = _filled(empty, whole, eye)
    return packing.pack(row) if packed else row


def _filled(part: jax.Array, slot: Shape, eye: bool) -> jax.Array:
    """Zeros up to the stack's shape; with ``eye`` ones on the diagonal's new part."""
    gaps = [total - own for own, total in zip(part.shape[1:], slot, strict=True)]
    if not any(gaps):
        return part
    padded = jnp.pad(part, [(0, 0), *((0, gap) for gap in gaps)])
    if not eye:
        return padded
    new = jnp.arange(slot[0]) >= part.shape[1]
    return padded + jnp.diag(new.astype(part.dtype))[None]


def _laid(array: jax.Array, where: NamedSharding | None) -> jax.Array:
    return array if where is None else lax.with_sharding_constraint(array, where)
