"""Blocks: the reference system's merging, the default folding, split and join."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import shampoo_optax as so
from shampoo_optax import checkpoint
from shampoo_optax.layout import block_layout
from shampoo_optax.layout.fold import fold, merge
from shampoo_optax.layout.merging import at_most, cost, merged, rounded_up
from shampoo_optax.layout.plan import Leaf, Route, block_sides, cut, make_plan
from shampoo_optax.layout.split import join, split
from tests import helpers

INF = math.inf


@pytest.mark.parametrize(
    ("shape", "threshold", "target", "wanted"),
    [
        ((64, 3, 7, 7), 1024, 1, (64, 147)),
        ((512, 256, 3, 3), 1024, 1, (512, 256, 9)),
        ((512, 256, 3, 3), 8192, 1, (512, 2304)),
        ((512, 256, 3, 3), INF, 2, (512, 2304)),
        ((10, 20), 1024, 1, (200,)),
        ((10, 20), 1024, 2, (10, 20)),
        ((32, 3, 64, 64), 200, 1, (32, 192, 64)),
        ((32, 3, 64, 64), 8192, 1, (96, 4096)),
        ((32, 3, 64, 64), 8192, 3, (32, 3, 4096)),
        ((32, 3, 64, 64), 10**6, 1, (393216,)),
        ((12, 1, 64, 768), 1024, 1, (768, 768)),
        ((12, 1, 64, 768), INF, 2, (12, 49152)),
        ((12, 1, 64, 768), 1024, INF, (12, 1, 64, 768)),
        ((1, 1), 1024, 1, (1,)),
        ((), 1024, 1, (1,)),
        ((), 1024, INF, (1,)),
        ((7,), 4, 1, (7,)),
    ],
)
def test_merge(shape: tuple, threshold: float, target: float, wanted: tuple) -> None:
    assert merge(shape, threshold=threshold, target=target) == wanted


def _blocks(shape: tuple, size: float) -> dict[tuple, int]:
    return {
        box.block: math.prod(box.grid) for box in cut(shape, block_sides(shape, size))
    }


@pytest.mark.parametrize(
    ("shape", "size", "wanted"),
    [
        ((50257, 768), 1024, {(1024, 768): 49, (81, 768): 1}),
        ((50257, 768), 8192, {(8192, 768): 6, (1105, 768): 1}),
        ((768, 2304), 1024, {(768, 1024): 2, (768, 256): 1}),
        ((5, 5), 2, {(2, 2): 4, (2, 1): 2, (1, 2): 2, (1, 1): 1}),
        ((5, 5), INF, {(5, 5): 1}),
        ((5, 5), 5, {(5, 5): 1}),
        ((8, 4), 4, {(4, 4): 2}),
        ((3,), 2, {(2,): 1, (1,): 1}),
    ],
)
def test_cut(shape: tuple, size: float, wanted: dict) -> None:
    assert _blocks(shape, size) == wanted


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((), ()),
        ((1, 1), ()),
        ((5,), (5,)),
        ((1, 5, 1), (5,)),
        ((3, 5000), (3, 5000)),
        ((3, 3, 64, 128), (576, 128)),
        ((512, 8, 64), (512, 512)),
        ((8, 64, 512), (512, 512)),
        ((2, 2, 2), (4, 2)),
        ((768, 3, 16, 16), (768, 768)),
        ((7, 7, 3, 64), (147, 64)),
    ],
)
def test_fold(shape: tuple, wanted: tuple) -> None:
    assert fold(shape) == wanted


@hypothesis.given(st.lists(st.integers(1, 9), min_size=3, max_size=5))
@hypothesis.settings(deadline=None, derandomize=True)
def test_fold_is_the_nearest_to_a_square(dims: list[int]) -> None:
    folded = fold(tuple(dims))
    assert math.prod(folded) == math.prod(dims)
    if len(folded) == 2 and sum(d > 1 for d in dims) > 2:
        ratio = max(folded) / min(folded)
        for i in range(1, len(dims)):
            pair = math.prod(dims[:i]), math.prod(dims[i:])
            assert ratio <= max(pair) / min(pair) or 1 in pair


def test_default_layout_blocks_matrices_only() -> None:
    shapes = [(4, 3), (3, 3, 2, 4), (5,), (), (1, 6), (6, 1), (0, 4), (1, 1)]
    plan = so.BlockLayout().plan([str(i) for i in range(len(shapes))], shapes)
    assert plan.stacks == {"4x3": (1, 4, 3), "9x8": (1, 9, 8)}
    assert plan.rest == (2, 3, 4, 5, 6, 7)


def test_batch_axes_are_not_folded() -> None:
    layout = so.BlockLayout(4, batch_axes=lambda path, _: int(path == "scan"))
    plan = layout.plan(["scan", "dense", "tail"], [(3, 6, 4), (6, 4), (24, 3)])
    # Three layers and the matrix: a 4x4 and a 2x4 block of each.
    assert plan.stacks == {"4x4": (4, 4, 4), "2x4": (4, 2, 4), "4x3": (6, 4, 3)}


LAYOUTS = st.builds(
    so.BlockLayout,
    max_preconditioner_dim=st.one_of(st.integers(1, 7), st.just(INF)),
    target_parameter_dimensionality=st.sampled_from([None, 1, 2, 3, INF]),
    precondition_vectors=st.booleans(),
    batch_axes=st.sampled_from([None, lambda _, shape: min(1, len(shape))]),
)
SHAPES = st.lists(
    st.lists(st.integers(0, 7), max_size=4).map(tuple), min_size=1, max_size=4
)
DTYPES = st.lists(
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]), min_size=4, max_size=4
)


@hypothesis.given(LAYOUTS, SHAPES, DTYPES)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_join_undoes_split(layout: so.BlockLayout, shapes: list, dtypes: list) -> None:
    names = [f"p{i}" for i in range(len(shapes))]
    plan = layout.plan(names, shapes)
    rng = np.random.default_rng(0)
    leaves = {
        i: jnp.asarray(rng.normal(size=shape), dtypes[i])
        for i, shape in enumerate(shapes)
    }
    blocked = {i: x for i, x in leaves.items() if i not in plan.rest}
    stacks = split(blocked, plan)
    assert {key: stack.shape for key, stack in stacks.items()} == plan.stacks
    found = join(stacks, plan, [dtypes[i] for i in leaves])
    assert set(found) == set(blocked)
    for i, x in blocked.items():
        assert found[i].dtype == x.dtype and found[i].shape == x.shape
        np.testing.assert_array_equal(found[i], x)


@hypothesis.given(LAYOUTS, SHAPES)
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
def test_plan_loses_no_element(layout: so.BlockLayout, shapes: list) -> None:
    plan = layout.plan([f"p{i}" for i in range(len(shapes))], shapes)
    blocked = sum(math.prod(shape) for shape in plan.stacks.values())
    loose = sum(math.prod(shapes[i]) for i in plan.rest)
    assert blocked + loose == sum(math.prod(shape) for shape in shapes)
    for shape in plan.stacks.values():
        assert min(shape) > 0
        assert max(shape[1:]) <= layout.max_preconditioner_dim
    assert all(i in plan.rest for i, shape in enumerate(shapes) if 0 in shape)


@pytest.mark.parametrize("mesh", [False, True])
def test_blocks_are_the_slices_of_the_parameter(mesh: bool) -> None:
    """Against plain slicing: order and place of every block, ragged ends included."""
    layout, specs = so.BlockLayout(2), None
    if mesh:  # of one device: its stacks hold wide blocks transposed
        devices = jax.make_mesh((1,), ("d",))
        layout = so.BlockLayout(2, mesh=devices, block_axes=("d",))
        specs = [((), ()), ((), ())]
    w = {0: jnp.arange(25.0).reshape(5, 5), 1: -jnp.arange(25.0).reshape(5, 5)}
    plan = layout.plan(["a", "b"], [(5, 5), (5, 5)], specs)
    cut = jax.jit(lambda w: split(w, plan))
    if mesh:
        everywhere = jax.P()
        cut = jax.shard_map(
            cut,
            mesh=devices,
            in_specs=everywhere,
            out_specs=everywhere,
            check_vma=False,
        )
    stacks = cut(w)
    edges = [(0, 2), (2, 4), (4, 5)]
    wanted: dict[str, list] = {}
    # Box by box: first the whole blocks, then each ragged side, then the corner.
    for rows, columns in itertools.product((edges[:2], edges[2:]), repeat=2):
        for leaf, (r0, r1), (c0, c1) in itertools.product((0, 1), rows, columns):
            block = np.asarray(w[leaf])[r0:r1, c0:c1]
            block = block.T if mesh and r1 - r0 < c1 - c0 else block
            key = "x".join(map(str, block.shape))
            wanted.setdefault(key, []).append(block)
    assert stacks.keys() == wanted.keys()
    for key, blocks in wanted.items():
        np.testing.assert_array_equal(stacks[key], np.stack(blocks))


def test_a_plan_is_made_once() -> None:
    layout, shapes = so.BlockLayout(2), [(5, 5), (3,)]
    assert layout.plan(["a", "b"], shapes) is layout.plan(["c", "d"], shapes)
    jaxpr = jax.make_jaxpr(lambda x: split({0: x}, layout.plan(["a"], [(4, 4)])))
    assert jaxpr(jnp.ones((4, 4))).out_avals[0].shape == (4, 2, 2)


SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@hypothesis.given(
    st.lists(st.tuples(SIDES, st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from([1, 2, 3, 8, 64]),
)
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
def test_the_planner_against_every_way_to_join(
    arrays: list[tuple[tuple[int, int], int]], devices: int
) -> None:
    """Copies on some devices: every cut of the sorted shapes into runs is tried."""
    copies = Route(shards=((), ()), dealt=("d",))
    leaves = tuple(
        Leaf((n, *sides), (n, *sides), n, sides, copies) for sides, n in arrays
    )
    plan = make_plan(leaves, 9, axis_sizes=(("d", devices),), block_axes=("d",))
    counts: dict[tuple[int, int], int] = {}
    for sides, n in arrays:
        counts[sides] = counts.get(sides, 0) + n
    shapes = sorted(counts, reverse=True)

    def price(run: list[tuple[int, int]]) -> int:
        hull = max(s[0] for s in run), max(s[1] for s in run)
        return -(-sum(counts[s] for s in run) // devices) * cost(hull)

    best = math.inf
    for cuts in itertools.product([False, True], repeat=len(shapes) - 1):
        runs, run = [], [shapes[0]]
        for shape, new in zip(shapes[1:], cuts, strict=True):
            if new:
                runs.append(run)
                run = []
            run.append(shape)
        best = min(best, sum(price(r) for r in [*runs, run]))
    stacks = merged(plan).stacks.values()
    assert sum(n // devices * cost((a, b)) for n, a, b in stacks) == best


SIDES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@hypothesis.given(
    st.dictionaries(st.integers(1, 40), st.integers(1, 9), max_size=7),
    st.integers(1, 8),
)
@hypothesis.settings(deadline=None, derandomize=True)
def test_rounding_sides_against_every_way(weights: dict[int, int], most: int) -> None:
    up = rounded_up(weights, most)
    assert up.keys() == weights.keys() and all(n <= to for n, to in up.items())
    assert len(set(up.values())) <= most

    def price(tops: tuple[int, ...]) -> float:
        over = [min((t for t in tops if t >= n), default=math.inf) for n in weights]
        return sum(w * to**2 for w, to in zip(weights.values(), over, strict=True))

    ways = itertools.combinations_with_replacement(sorted(weights), most)
    best = min(map(price, ways), default=0)
    assert sum(weights[n] * to**2 for n, to in up.items()) == best


def test_sides_that_parts_are_exchanged_along_stay() -> None:
    """Two devices hold halves of the rows; what is filled is filled along columns."""
    route = Route(shards=(("d",), ()))
    shapes = (8, 7), (8, 6), (6, 6), (6, 5), (4, 4)
    leaves = tuple(Leaf(s, (s[0] // 2, s[1]), 1, s, route) for s in shapes)
    plan = make_plan(leaves, 8, axis_sizes=(("d", 2),), block_axes=("d",))
    few = at_most(plan, 3, 1, 8)
    assert few.stacks.keys() == {"8x7", "6x7", "4x7"}
    assert all(group.parts == 2 for of in few.groups.values() for group in of)


@hypothesis.given(
    st.lists(SIDES, min_size=1, max_size=24), st.integers(1, 6), st.integers(1, 6)
)
def test_not_more_stacks_than_asked_for(
    shapes: list[tuple[int, int]], number: int, sides: int
) -> None:
    leaves = tuple(Leaf(shape, shape, 1, shape) for shape in shapes)
    plan = make_plan(leaves, 12)
    few = at_most(plan, number, sides, 10)
    long = {key for key, (_, *sides) in plan.stacks.items() if max(sides) > 10}
    assert long <= few.stacks.keys()  # such a side has no factor: they stay
    assert len(few.stacks.keys() - long) <= number
    filled = [few.stacks[key][1:] for key in few.stacks.keys() - long]
    assert len({side for shape in filled for side in shape}) <= sides
    assert sum(n for n, *_ in few.stacks.values()) == len(shapes)
    for key, groups in few.groups.items():
        for _, box in groups[0].members:
            pairs = zip(box.stacked, map(int, key.split("x")), strict=True)
            assert all(own <= side for own, side in pairs)


def _shapes(number: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    sides = rng.integers(2, 9, (number, 2))
    return {f"a{i:02}": jnp.zeros(tuple(map(int, s))) for i, s in enumerate(sides)}


DAMPED = functools.partial(so.scale_by_shampoo, eps_rel=1e-4)


@pytest.mark.parametrize("alias", [DAMPED, so.scale_by_soap], ids=["shampoo", "soap"])
def test_stacks_of_many_shapes_make_the_same_updates(
    alias: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros that fill a block change nothing; in float64, far below float32."""
    layout = so.BlockLayout(8)
    with jax.enable_x64(True):
        like = jax.tree.map(lambda x: x.astype(jnp.float64), _shapes(12))
        tx = alias(layout=layout, refresh=so.Refresh(3, 9))
        wanted, before = helpers.run(tx, like, 12)
        monkeypatch.setattr(block_layout, "MANY", 3)
        found, after = helpers.run(tx, like, 12)
        for one, two in zip(wanted, found, strict=True):
            for name, update in one.items():
                scale = float(jnp.abs(update).max())
                assert float(jnp.abs(update - two[name]).max()) <= 1e-8 * scale, name
        counts = [len(state.blocks.mu) for state in (before, after)]
        assert counts[0] > 8 and counts[1] <= 3
        shapes = jax.eval_shape(tx.init, like)
        view = checkpoint.to_param_view(after, like, layout)
        again = checkpoint.from_param_view(view, shapes, like, layout)
        both = (checkpoint.to_param_view(x, like, layout) for x in (again, after))
        helpers.assert_equal(*both)
