"""Parameters by name, and names that changed since they were saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from shampoo_optax._paths import escaped, keys_of


def by_name(params: optax.Params) -> dict[str, Any]:
    """The leaves of a tree by escaped path.

    Example:
      >>> by_name({"a": {"b.c": 1}})
      {'a/b%2Ec': 1}
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return {escaped(keys_of(path)): leaf for path, leaf in paths}


class Names:
    """Which parameters are read, and under which name they were saved."""

    def __init__(self, fresh: str | None, renamed: Mapping[str, str]) -> None:
        """Keep what :func:`restore` was told."""
        self.fresh, self.renamed = fresh, renamed

    @property
    def changed(self) -> bool:
        """Whether any parameter is begun anew or was renamed."""
        return self.fresh is not None or bool(self.renamed)

    def read(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """What is to be read, by its old name."""
        return {self.old(k): v for k, v in tree.items() if not self.is_fresh(k)}

    def back(self, found: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
        """What was read, by its new name."""
        return {k: found[self.old(k)] for k in wanted if not self.is_fresh(k)}

    def is_fresh(self, name: str) -> bool:
        """Whether a parameter is begun anew."""
        return self.fresh is not None and re.search(self.fresh, name) is not None

    def old(self, name: str) -> str:
        """The name it was saved under."""
        for new, old in self.renamed.items():
            if name == new or name.startswith(f"{new}/"):
                return old + name[len(new) :]
        return name

    def without_fresh(self, there: Mapping[str, Any]) -> dict[str, Any]:
        """What is there, but for what is begun anew all the same."""
        return {k: v for k, v in there.items() if not self.is_fresh(k)}
