"""Paths in trees: which leaf of a state belongs to which parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax

Path = tuple[Any, ...]
Keys = tuple[str, ...]
T = TypeVar("T")


def keys_of(path: Path) -> Keys:
    """A path whose keys compare across containers; without a box's ``value``.

    Example:
      >>> keys_of((jax.tree_util.DictKey("w"), jax.tree_util.GetAttrKey("value")))
      ('w',)
    """
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    last = path[-1] if path else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value":
        keys.pop()
    return tuple(keys)


def owner_of(
    keys: Keys,
    shape: tuple[int, ...],
    owners: Mapping[Keys, tuple[tuple[int, ...], T]],
) -> T | None:
    """That of the parameter whose path a leaf's path ends with, if it has its shape.

    Example:
      >>> owner_of(("mu", "w"), (2,), {("w",): ((2,), "here")})
      'here'
    """
    for length in range(len(keys), -1, -1):
        owner = owners.get(keys[len(keys) - length :])
        if owner is not None and owner[0] == shape:
            return owner[1]
    return None


def escaped(keys: Keys) -> str:
    """Keys as one name that no other keys have, and no file system or dot splits.

    Example:
      >>> escaped(("layers", "0", "a.b")), escaped(("a/b",)), escaped(("..",))
      ('layers/0/a%2Eb', 'a%2Fb', '%2E%2E')
    """
    safe = (
        key.replace("%", "%25").replace("/", "%2F").replace(".", "%2E") for key in keys
    )
    return "/".join(safe)
