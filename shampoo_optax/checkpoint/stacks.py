"""Stacks in a checkpoint as they lie, and a table of whose blocks their rows are.

So nothing is moved to save a state, and nothing to open it where it lay so before. On
another mesh, or for a model that changed, the table is what blocks are found by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from shampoo_optax.checkpoint import moves
from shampoo_optax.checkpoint.entries import Cut, Entry, Kind, box_of
from shampoo_optax.layout.owners import Held
from shampoo_optax.layout.plan import Box

Table = dict[str, Any]
ByLeaf = dict[str, dict[str, Any]]  # {stack: {leaf of it: ...}}


def leaf_name(entry: Cut) -> str:
    """What a leaf is called beside the others of its stack."""
    return entry.slot if entry.dim is None else f"{entry.slot}/{entry.dim}"


def by_leaf(entries: Sequence[Entry], leaves: Sequence[Any]) -> ByLeaf:
    """The leaves in stacks of a state, by stack and name."""
    found: ByLeaf = {}
    for entry, leaf in zip(entries, leaves, strict=True):
        if isinstance(entry, Cut):
            found.setdefault(entry.key, {})[leaf_name(entry)] = leaf
    return found


def table_of(entries: Sequence[Entry]) -> Table:
    """Whose blocks the rows of all stacks are, in what JSON can hold.

    Args:
      entries: of a state.

    Returns:
      ``{"leaves": {stack: {leaf: {"slot", "dim", "kind", "rows"}}}, "rows": [[{"name",
      "block", "turned", "rows"}, ...], ...]}``: leaves of the same rows say only which.
    """
    rows: list[list[dict[str, Any]]] = []
    leaves: ByLeaf = {}
    seen: dict[int, int] = {}  # one transformation's leaves share their members
    for entry in entries:
        if not isinstance(entry, Cut):
            continue
        of = seen.setdefault(id(entry.members), len(rows))
        if of == len(rows):
            named = zip(entry.members, entry.names, strict=True)
            rows.append([_said(member, name) for member, name in named])
        leaves.setdefault(entry.key, {})[leaf_name(entry)] = {
            "slot": entry.slot,
            "dim": entry.dim,
            "kind": entry.kind,
            "rows": of,
        }
    return {"leaves": leaves, "rows": rows}


def entries_said(table: Any, shapes: Mapping[str, Any]) -> dict[str, dict[str, Cut]]:
    """The entries that a table tells of, by stack and leaf.

    Args:
      table: of :func:`table_of`, from anywhere.
      shapes: of the stacks that there are, by stack and leaf.

    Raises:
      ValueError, TypeError, KeyError, IndexError: it is no table, or not of these.
    """
    said = {key: set(leaves) for key, leaves in table["leaves"].items()}
    if said != {key: set(leaves) for key, leaves in shapes.items()}:
        raise ValueError("the table is of other stacks")
    held = [[_member(one) for one in members] for members in table["rows"]]
    found: dict[str, dict[str, Cut]] = {}
    for key, leaves in table["leaves"].items():
        for name, one in leaves.items():
            of = held[one["rows"]]
            entry = Cut(
                _is(str, one["slot"]),
                _is(str, key),
                None if one["dim"] is None else _is(int, one["dim"]),
                _one_of(get_args(Kind), one["kind"]),
                tuple(member for member, _ in of),
                tuple(name for _, name in of),
            )
            _check_inside(entry, shapes[key][name].shape)
            found.setdefault(key, {})[name] = entry
    return found


def put_parts(
    parameters: dict[str, Any], entry: Cut, parts: Sequence[Any]
) -> dict[str, Any]:
    """Parts of a leaf, put where a view's parameters have them."""
    for member, name, part in zip(entry.members, entry.names, parts, strict=True):
        slots = parameters.setdefault(name, {}).setdefault(box_of(member), {})
        slots[entry.slot_of(member)] = part
    return parameters


def view_said(
    entries: Mapping[str, Mapping[str, Cut]],
    shapes: Mapping[str, Any],
    whole: Mapping[str, Any],
    leaf_of: Callable[[tuple[int, ...], Any], Any],
) -> dict[str, Any]:
    """The view's parameters as shapes, of stacks and of what is in no stack."""
    found = {
        name: {block: dict(slots) for block, slots in blocks.items()}
        for name, blocks in whole.items()
    }
    for key, leaves in entries.items():
        for name, entry in leaves.items():
            like = shapes[key][name]
            parts = [
                leaf_of(moves.shape_of(entry, member, like.shape), like.dtype)
                for member in entry.members
            ]
            put_parts(found, entry, parts)
    return found


def same_rows(one: Cut, other: Cut) -> bool:
    """Whether the rows of two leaves are the same blocks, and lie the same way."""
    if (one.kind, one.names) != (other.kind, other.names) or one.dim != other.dim:
        return False
    return all(
        (a.box.whole, a.box.turned) == (b.box.whole, b.box.turned)
        and np.array_equal(a.rows, b.rows)
        for a, b in zip(one.members, other.members, strict=True)
    )


def _said(member: Held, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "block": list(member.box.whole),
        "turned": member.box.turned,
        "rows": member.rows.tolist(),
    }


def _member(said: Any) -> tuple[Held, str]:
    sides = tuple(_is(int, side) for side in _is(list, said["block"]))
    rows = [_is(int, row) for row in _is(list, said["rows"])]
    if not sides or not rows or min(sides) < 1 or min(rows) < 0:
        raise ValueError("a block without sides or rows")
    box = Box((), (), sides, sides, _is(bool, said["turned"]))
    return Held(0, box, np.asarray(rows, np.int64)), _is(str, said["name"])


def _check_inside(entry: Cut, stack: tuple[int, ...]) -> None:
    """Raise unless all rows are in the stack, each once, and blocks in its sides."""
    rows = np.concatenate([member.rows for member in entry.members])
    if len(np.unique(rows)) < len(rows) or rows.max() >= stack[0]:
        raise ValueError("rows that are not there, or twice")
    for member in entry.members:
        own = moves.sides_of(entry, member, stack, own=False)
        if len(own) != len(stack) - 1 or any(
            a > b for a, b in zip(own, stack[1:], strict=True)
        ):
            raise ValueError("blocks that are larger than their stack")


def _is(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _one_of(allowed: Sequence[str], value: Any) -> Any:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {allowed}")
    return value
