"""The exponents of the roots that a checkpoint holds: said in its spec, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shampoo_optax.checkpoint.entries import Cut, Entry, box_of

# {parameter: {block: {slot: exponent}}}: the view's own names, of roots alone.
Said = dict[str, dict[str, dict[str, float]]]


def exponents_of(entries: Sequence[Entry]) -> Said:
    """The exponents of all roots of a state, by the names of the parameter view.

    Returns:
      Them; nothing of roots that do not say theirs.
    """
    found: Said = {}
    for entry in entries:
        if not isinstance(entry, Cut) or entry.exponent is None:
            continue
        for member, name in zip(entry.members, entry.names, strict=True):
            slots = found.setdefault(name, {}).setdefault(box_of(member), {})
            slots[entry.slot_of(member)] = entry.exponent
    return found


def other_exponent(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """What to say of the first root with another exponent; None where all are alike.

    Roots of which one side says nothing are not compared.
    """
    for name, blocks in wanted.items():
        for block, slots in blocks.items():
            there = found.get(name, {}).get(block, {})
            for slot, power in slots.items():
                if there.get(slot, power) != power:
                    return (
                        f"checkpoint: '{name}' {block} {slot} are roots with exponent "
                        f"{there[slot]:.6g} there, and this optimizer wants {power:.6g}"
                        ". Restore with the exponents (and the correction) that it was "
                        "saved with, or compute all roots anew: "
                        "restore(..., reblock=tx)."
                    )
    return None


def sound(said: Any, depth: int = 3) -> bool:
    """Whether it is of the type that :func:`exponents_of` gives."""
    if depth == 0:
        return isinstance(said, float | int)
    return isinstance(said, dict) and all(sound(n, depth - 1) for n in said.values())
