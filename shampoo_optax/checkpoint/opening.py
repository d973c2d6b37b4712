"""One step of a checkpoint to parameters and a state: compared, read, put together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from shampoo_optax._paths import escaped, keys_of
from shampoo_optax.checkpoint import spec as specs
from shampoo_optax.checkpoint import stacks
from shampoo_optax.checkpoint.compare import (
    WHOLE,
    compare,
    compare_names,
    compare_params,
)
from shampoo_optax.checkpoint.entries import Cut, Entry, entries_of
from shampoo_optax.checkpoint.exponents import exponents_of, other_exponent
from shampoo_optax.checkpoint.moves import constant, nothing
from shampoo_optax.checkpoint.names import Names, by_name
from shampoo_optax.checkpoint.read import read_arrays, read_spec
from shampoo_optax.checkpoint.reblock import recut
from shampoo_optax.checkpoint.view import abstract_by, home_of, state_by, view_by
from shampoo_optax.checkpoint.ways import ON_HOST, Way, way_of
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.transforms.renewal import refresh_now

Places = dict[tuple[str, str], int]  # of leaves in a state, by stack and name


class Restored(NamedTuple):
    """What :func:`restore` gives."""

    step: int
    params: Any
    state: Any
    extra: Any


@dataclass(frozen=True)
class Wanted:
    """What a step is opened into."""

    params: Any  # or shapes
    state: Any  # or shapes
    layout: BlockLayout
    names: Names
    reblock: optax.GradientTransformationExtraArgs | None = None


def open_step(manager: ocp.CheckpointManager, step: int, wanted: Wanted) -> Restored:
    """A step, compared before it is read and verified before it is given.

    Raises:
      DamagedCheckpoint: it is not what was saved.
      ValueError: it is of another optimizer, layout or model.
    """
    where = f"step {step} of {manager.directory}"
    spec = read_spec(manager, step, where)
    saved = _Saved(spec, where)
    params = {k: v for k, v in by_name(wanted.params).items() if math.prod(_shape(v))}
    old = None
    if wanted.reblock is not None:
        old = specs.saved_layout(spec, wanted.layout, where)
    entries = entries_of(wanted.state, wanted.params, wanted.layout)
    like = abstract_by(jax.ShapeDtypeStruct, wanted.state, wanted.params, wanted.layout)
    others = _compare(saved, params, wanted, like, entries, reblocked=old is not None)
    way = way_of(wanted.layout) if old is None else ON_HOST
    same = saved.as_wanted(wanted, entries)
    asked = saved.asked(wanted, like, same, way)
    asked["params"] = wanted.names.read(params)
    home = home_of(wanted.layout)
    found = read_arrays(manager, step, saved.shapes, asked, home, where)
    specs.check_digests(spec, found, where)
    restored = _params(found.pop("params"), params, wanted)
    optimizer = _parts(found.pop("optimizer"))
    ready = {
        place: optimizer["stacks"][key].pop(leaf) for (key, leaf), place in same.items()
    }
    view = saved.view(optimizer, way)
    state = _state(view, restored, wanted, old, ready)
    if wanted.reblock is not None and (old is not None or others is not None):
        state = refresh_now(wanted.reblock, state, restored)
    return Restored(int(step), restored, state, spec["extra"])


class _Saved:
    """What a step says that it holds."""

    def __init__(self, spec: specs.Spec, where: str) -> None:
        self.spec = spec
        self.shapes = specs.shapes(spec)
        self.optimizer = _parts(self.shapes["optimizer"])
        self.entries = specs.entries_said(spec, self.optimizer["stacks"], where)

    def as_view(self) -> dict[str, Any]:
        """The view that it holds, as shapes."""
        stacked, whole = self.optimizer["stacks"], self.optimizer["parameters"]
        parameters = stacks.view_said(
            self.entries, stacked, whole, jax.ShapeDtypeStruct
        )
        return {"parameters": parameters, "shared": self.optimizer["shared"]}

    def asked(
        self, wanted: Wanted, view: dict[str, Any], same: Places, way: Way
    ) -> dict[str, Any]:
        """What Orbax is asked for: stacks as they lie, or to be taken apart."""
        home = home_of(wanted.layout)
        whole = wanted.names.read(view["parameters"])

        def slots(name: str, block: str, there: Mapping[str, Any]) -> dict[str, Any]:
            if block == WHOLE:
                return dict(whole.get(name, {}).get(WHOLE, {}))
            return {slot: way.ask(x.shape, x.dtype) for slot, x in there.items()}

        def stack(key: str, leaf: str, like: Any) -> Any:
            if (key, leaf) in same:
                where = home.typed(len(like.shape)) or jnp.zeros(()).sharding
                return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=where)
            return way.ask(like.shape, like.dtype)

        parameters = {
            name: {block: slots(name, block, there) for block, there in blocks.items()}
            for name, blocks in self.optimizer["parameters"].items()
        }
        stacked = {
            key: {leaf: stack(key, leaf, like) for leaf, like in leaves.items()}
            for key, leaves in self.optimizer["stacks"].items()
        }
        asked = {**view, "parameters": parameters, "stacks": stacked}
        return {"optimizer": asked}

    def view(self, optimizer: dict[str, Any], way: Way) -> dict[str, Any]:
        """The rest as a view; what was read is used up."""
        parameters = optimizer["parameters"]
        for key, leaves in optimizer["stacks"].items():
            for leaf in list(leaves):
                entry = self.entries[key][leaf]
                stacks.put_parts(parameters, entry, way.read(entry, leaves.pop(leaf)))
        return {"parameters": parameters, "shared": optimizer["shared"]}

    def as_wanted(self, wanted: Wanted, entries: list[Entry]) -> Places:
        """Stacks that lie as they are wanted, and their places among the leaves."""
        found: Places = {}
        if wanted.names.changed or wanted.reblock is not None:
            return found
        leaves = jax.tree.leaves(wanted.state)
        for place, (entry, like) in enumerate(zip(entries, leaves, strict=True)):
            if isinstance(entry, Cut):
                key, leaf = entry.key, stacks.leaf_name(entry)
                there = self.entries.get(key, {}).get(leaf)
                shape = _shape(self.optimizer["stacks"].get(key, {}).get(leaf, like))
                if there and _shape(like) == shape and stacks.same_rows(entry, there):
                    found[key, leaf] = place
        return found


def _compare(
    saved: _Saved,
    params: Any,
    wanted: Wanted,
    view: dict[str, Any],
    entries: list[Entry],
    *,
    reblocked: bool,
) -> str | None:
    """Raise where a step does not fit; what to say of other exponents, if any."""
    names = wanted.names
    compare_params(names.without_fresh(saved.shapes["params"]), names.read(params))
    asked = {**view, "parameters": names.read(view["parameters"])}
    there = saved.as_view()
    there = {**there, "parameters": names.without_fresh(there["parameters"])}
    (compare_names if reblocked else compare)(there, asked)
    found = saved.spec.get("exponents", {})
    others = other_exponent(found, names.read(exponents_of(entries)))
    if others is not None and wanted.reblock is None:
        raise ValueError(others)
    return others


def _params(found: Mapping[str, Any], params: Mapping[str, Any], wanted: Wanted) -> Any:
    """The tree of parameters, of those that were read."""
    read = wanted.names.back(found, params)
    empty = {k: _empty_array(v) for k, v in by_name(wanted.params).items()}
    merged = empty | read
    paths, treedef = jax.tree_util.tree_flatten_with_path(wanted.params)
    leaves = [merged[escaped(keys_of(path))] for path, _ in paths]
    return jax.tree.unflatten(treedef, leaves)


def _state(
    view: dict[str, Any],
    params: Any,
    wanted: Wanted,
    old: BlockLayout | None,
    ready: dict[int, Any],
) -> Any:
    """The state of a view that was read, which is used up, and of what is ready."""
    way, names, layout = way_of(wanted.layout), wanted.names, wanted.layout
    if names.changed or old is not None:
        anew = {}
        if names.fresh is not None:
            begun = view_by(way.take, wanted.state, wanted.params, layout)
            anew = begun["parameters"]
        like = abstract_by(jax.ShapeDtypeStruct, wanted.state, wanted.params, layout)
        kept = names.back(view.pop("parameters"), like["parameters"])
        if old is not None:
            way = ON_HOST
            cut = partial(recut, old=old, new=specs.on_one_device(layout))
            kept = cut(kept, params=wanted.params)
        fresh = {name: slots for name, slots in anew.items() if names.is_fresh(name)}
        view = {**view, "parameters": {**kept, **fresh}}
        compare(view, like)  # what was cut may lack what the other layout blocks
    return state_by(way.give, view, wanted.state, params, layout, ready)


def _parts(optimizer: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer has of each, of which no file holds what is empty."""
    return {"parameters": {}, "shared": {}, "stacks": {}} | optimizer


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(jnp.shape(leaf))


def _empty_array(leaf: Any) -> Any:
    """A parameter without entries, which no file holds; another as it is."""
    if math.prod(_shape(leaf)):
        return leaf
    return constant(nothing(leaf), getattr(leaf, "sharding", None))
