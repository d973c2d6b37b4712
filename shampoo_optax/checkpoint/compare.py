"""Does a view, or what a checkpoint says of one, fit? Sentences where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

View = Mapping[str, Any]
WHOLE = "whole"  # in place of a block's shape: an array in the parameter's own
# What each method keeps that the other does not.
METHODS = {"roots": "Shampoo's inverse roots", "bases": "SOAP's eigenbases"}


def compare_params(found: View, wanted: View) -> None:
    """Raise unless parameters by name have the shapes and dtypes that are wanted."""
    _same_names("parameter", found, wanted, RENAMED)
    for name, leaf in wanted.items():
        _same_leaf(f"parameter '{name}'", found[name], leaf)


def compare_names(found: View, wanted: View) -> None:
    """Raise unless a view is of the method and the parameters that are wanted."""
    _same_method(found, wanted)
    _same_names("parameter", found["parameters"], wanted["parameters"], RENAMED)


def compare(found: View, wanted: View) -> None:
    """Raise unless a view has the parameters, slots, shapes and dtypes that are wanted.

    Args:
      found: a view, or anything with ``shape`` and ``dtype`` in its leaves.
      wanted: from :func:`abstract_view`.

    Raises:
      ValueError: naming the first leaf that differs, what is there, what is wanted, and
        what to do.
    """
    compare_names(found, wanted)
    for name, blocks in wanted["parameters"].items():
        _same_blocks(name, found["parameters"][name], blocks)
        there = found["parameters"][name]
        if WHOLE in there and WHOLE not in blocks:
            _same_names(f"state of parameter '{name}'", there[WHOLE], {}, CHANGED)
        for block, slots in blocks.items():
            there = found["parameters"][name].get(block, {})
            _same_names(f"state of parameter '{name}'", there, slots, CHANGED)
            for slot, leaf in slots.items():
                _same_leaf(f"'{name}' {block} {slot}", there[slot], leaf)
    _same_names("shared state", found["shared"], wanted["shared"], CHANGED)
    for slot, leaf in wanted["shared"].items():
        _same_leaf(f"'{slot}'", found["shared"][slot], leaf)


RENAMED = (
    "Pass the parameters that it was saved with; new ones are begun afresh with "
    "restore(..., fresh='REGULAR EXPRESSION'), renamed ones found with "
    "restore(..., renamed={'NEW': 'OLD'})."
)
CHANGED = "Restore into the optimizer that it was saved from."


def _same_names(what: str, found: View, wanted: View, advice: str) -> None:
    for name in wanted:
        if name not in found:
            raise ValueError(
                f"checkpoint: {what} '{name}' is wanted and not there; there are "
                f"{_some(found)}. {advice}"
            )
    for name in found:
        if name not in wanted:
            raise ValueError(
                f"checkpoint: {what} '{name}' is there and nothing asks for it; wanted "
                f"are {_some(wanted)}. {advice}"
            )


def _same_blocks(name: str, found: View, wanted: View) -> None:
    if found.keys() - {WHOLE} != wanted.keys() - {WHOLE}:
        raise ValueError(
            f"checkpoint: parameter '{name}' is there in blocks of {_some(found)}, and "
            f"the layout cuts it into {_some(wanted)}. Pass the "
            "max_preconditioner_dim (and the rules) that it was saved with, or cut it "
            "anew: restore(..., reblock=tx)."
        )


def _same_leaf(name: str, found: Any, wanted: Any) -> None:
    shapes = tuple(found.shape), tuple(wanted.shape)
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"checkpoint: {name} has shape {shapes[0]} there; wanted {shapes[1]}. The "
            f"parameters or the layout changed. {CHANGED}"
        )
    if str(found.dtype) != str(wanted.dtype):
        raise ValueError(
            f"checkpoint: {name} is {found.dtype} there; wanted {wanted.dtype}. "
            "Nothing is cast silently: restore in the dtype that it was saved in, and "
            "cast afterwards."
        )


def _same_method(found: View, wanted: View) -> None:
    here, there = methods(wanted), methods(found)
    if here and there and not here & there:
        kept, asked = (" and ".join(METHODS[m] for m in ms) for ms in (there, here))
        raise ValueError(
            f"checkpoint: it holds {kept}, and this optimizer wants {asked}; one "
            "cannot be made of the other. Restore into the alias that it was saved "
            "from, or begin the optimizer afresh and restore the parameters alone."
        )


def methods(view: View) -> set[str]:
    """What a view holds of :data:`METHODS`; empty where neither."""
    fields = {
        field
        for blocks in view.get("parameters", {}).values()
        for slots in blocks.values()
        for slot in slots
        for field in slot.split("/")
    }
    # Shampoo with a cached basis has both, and its roots are what tells it.
    found = fields & METHODS.keys()
    return {"roots"} if "roots" in found else found


def _some(names: View) -> str:
    listed = [f"'{name}'" for name in list(names)[:4]]
    return ", ".join(listed) + (", ..." if len(names) > 4 else "") or "none"
