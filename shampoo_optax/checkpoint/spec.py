"""What a checkpoint says of itself: names, shapes, dtypes, digests, origin."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp

from shampoo_optax.checkpoint import exponents, stacks
from shampoo_optax.checkpoint.compare import methods
from shampoo_optax.checkpoint.digest import digests
from shampoo_optax.checkpoint.entries import Cut
from shampoo_optax.layout.block_layout import BlockLayout

FORMAT = "shampoo_optax"
VERSION = 2  # 1 held the view's arrays; golden checkpoints hold every one
Spec = dict[str, Any]
# Of the layout, what decides names and shapes; the mesh decides none.
RULES = (
    "max_preconditioner_dim",
    "target_parameter_dimensionality",
    "one_sided_above",
    "precondition_vectors",
)


class DamagedCheckpoint(ValueError):
    """A checkpoint cannot be read, or is not what was saved."""


def spec_of(
    arrays: dict[str, Any],
    layout: BlockLayout,
    extra: Any,
    powers: exponents.Said,
    table: stacks.Table,
) -> Spec:
    """The spec of ``{"params": ..., "optimizer": ...}``, with its checksum.

    Args:
      arrays: all that is saved; every process of a mesh has to call this.
      layout: which blocks.
      extra: anything that JSON can hold.
      powers: the exponents of the roots in it.
      table: whose blocks the rows of its stacks are.

    Returns:
      What JSON can hold.
    """
    leaves, treedef = jax.tree.flatten(arrays)
    said = [
        {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": number}
        for leaf, number in zip(leaves, digests(arrays), strict=True)
    ]
    rules = {rule: str(getattr(layout, rule)) for rule in RULES}
    spec = {
        "format": FORMAT,
        "version": VERSION,
        "packages": {
            name: _version(name) for name in ("jax", "optax", "shampoo-optax")
        },
        "layout": rules,
        "method": sorted(methods({"parameters": {"": table["leaves"]}})),
        "exponents": powers,
        "stacks": table,
        "arrays": jax.tree.unflatten(treedef, said),
        "extra": extra,
    }
    return {**spec, "checksum": _checksum(spec)}


def on_one_device(layout: BlockLayout) -> BlockLayout:
    """The same blocks without a mesh."""
    return dataclasses.replace(layout, mesh=None, block_axes=(), param_specs=None)


def saved_layout(spec: Spec, layout: BlockLayout, where: str) -> BlockLayout | None:
    """The layout that a step was saved with, on one device; None where it is this one.

    Args:
      spec: of the step.
      layout: what gives the rest: rules that are functions are in no file.
      where: the step is.

    Raises:
      DamagedCheckpoint: a rule is none of a layout's.
    """
    words = {"inf": math.inf, "None": None, "True": True, "False": False}
    rules = {rule: str(getattr(layout, rule)) for rule in RULES}
    if spec.get("layout") == rules:
        return None
    try:
        said = {rule: spec["layout"][rule] for rule in RULES}
        read: dict[str, Any] = {
            k: words[v] if v in words else int(v) for k, v in said.items()
        }
        return dataclasses.replace(on_one_device(layout), **read)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(
            f"checkpoint: {where} says that its layout was {spec.get('layout')!r}; "
            f"wanted values of {', '.join(RULES)}. Restore another step."
        ) from error


def check(spec: Any, where: str) -> None:
    """Raise unless this is a spec of ours, whole, and of a version that we read.

    Raises:
      DamagedCheckpoint: naming where it was read.
    """
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        raise DamagedCheckpoint(
            f"checkpoint: {where} says nothing of itself that shampoo_optax wrote; "
            "wanted one of checkpoint.save. Read it with plain Orbax."
        )
    rest = {key: value for key, value in spec.items() if key != "checksum"}
    if spec.get("checksum") != _checksum(rest):
        raise DamagedCheckpoint(
            f"checkpoint: {where} is damaged: its spec has another checksum than it "
            "was saved with. Restore another step."
        )
    if not _sound(spec):
        raise DamagedCheckpoint(
            f"checkpoint: {where} is damaged: its spec lacks what save writes. Restore "
            "another step."
        )
    if spec["version"] > VERSION:
        raise DamagedCheckpoint(
            f"checkpoint: {where} has layout version {spec['version']}, and this "
            f"shampoo_optax reads up to {VERSION}. Install a newer one."
        )


def shapes(spec: Spec) -> dict[str, Any]:
    """The arrays of a spec as shapes and dtypes."""
    return _map(
        lambda said: jax.ShapeDtypeStruct(
            tuple(said["shape"]), jnp.dtype(said["dtype"])
        ),
        spec["arrays"],
    )


def entries_said(
    spec: Spec, there: dict[str, Any], where: str
) -> dict[str, dict[str, Cut]]:
    """What the stacks of a spec hold, by stack and leaf.

    Raises:
      DamagedCheckpoint: it says what cannot be.
    """
    if not there and "stacks" not in spec:
        return {}
    try:
        return stacks.entries_said(spec["stacks"], there)
    except (AttributeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise DamagedCheckpoint(
            f"checkpoint: {where} is damaged: its spec tells of no such stacks as it "
            f"holds ({error}). Restore another step."
        ) from error


def check_digests(spec: Spec, arrays: dict[str, Any], where: str) -> None:
    """Raise unless every array is what the spec says, to the last bit.

    Raises:
      DamagedCheckpoint: naming the first that is not.
    """
    paths = jax.tree_util.tree_leaves_with_path(arrays)
    for (path, leaf), number in zip(paths, digests(arrays), strict=True):
        said = spec["arrays"]
        for key in path:
            said = said[key.key]
        kind = list(leaf.shape), str(leaf.dtype)
        if kind != (said["shape"], said["dtype"]) or number != said["digest"]:
            what = "digest" if number != said["digest"] else "shape or dtype"
            name = " ".join(str(key.key) for key in path)
            raise DamagedCheckpoint(
                f"checkpoint: {where} is damaged: '{name}' has another {what} than it "
                "was saved with. Restore another step."
            )


def _sound(spec: Spec) -> bool:
    """Whether everything is there and of its type; a spec may come from anywhere."""
    arrays = spec.get("arrays")
    known = isinstance(spec.get("version"), int) and "extra" in spec
    known = known and exponents.sound(spec.get("exponents", {}))
    if not known or not isinstance(arrays, dict):
        return False
    depths = {"params": 1, "shared": 1, "parameters": 3, "stacks": 2}
    optimizer = arrays.get("optimizer")
    if not isinstance(optimizer, dict) or "params" not in arrays:
        return False
    trees = {"params": arrays["params"], **optimizer}
    version = trees.pop("version", None)
    return (
        _is_leaf(version)
        and trees.keys() <= depths.keys()
        and all(_is_tree(tree, depths[name]) for name, tree in trees.items())
    )


def _is_tree(node: Any, depth: int) -> bool:
    if depth == 0:
        return _is_leaf(node)
    return isinstance(node, dict) and all(_is_tree(n, depth - 1) for n in node.values())


def _is_leaf(said: Any) -> bool:
    if not isinstance(said, dict) or said.keys() != {"shape", "dtype", "digest"}:
        return False
    try:
        jnp.dtype(said["dtype"])
    except TypeError:
        return False
    sizes = said["shape"]
    whole = isinstance(sizes, list) and all(isinstance(n, int) and n > 0 for n in sizes)
    return whole and isinstance(said["digest"], int)


def _map(function: Callable[[dict[str, Any]], Any], said: Any) -> Any:
    if isinstance(said, dict) and "digest" in said and "shape" in said:
        return function(said)
    return {key: _map(function, value) for key, value in said.items()}


def _checksum(spec: Spec) -> int:
    return zlib.crc32(json.dumps(spec, sort_keys=True).encode())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
