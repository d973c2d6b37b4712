"""Factors in int8: what their codes say, what rounding leaves, and where they go."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_optax as so
from shampoo_optax import checkpoint
from shampoo_optax.checkpoint import abstract_view, from_param_view, to_param_view
from shampoo_optax.linalg import codes, packing
from shampoo_optax.linalg.rounding import GOLDEN, phases
from shampoo_optax.transforms import _in_turn, state_dtypes
from shampoo_optax.transforms.state_dtypes import stored
from tests import helpers
from tests.test_lean import LAYOUT, OPTIMIZERS, SHAPES, _failures, _leaves
from tests.test_sharded import (
    BLOCK,
    EXPLICIT,
    MERGED,
    MODES,
    REFRESH,
    Mode,
    _distance,
    _fsdp,
    _run,
    _without,
    _zero1,
)

INT8, BF16, F32 = jnp.int8, jnp.bfloat16, jnp.float32
ALONE = so.StateDtypes(factors=INT8)
LEAST = so.StateDtypes(BF16, BF16, INT8, BF16, packed=True)
SIZES = [*range(1, 9), 33]
ALIASES = {"shampoo": so.scale_by_shampoo, "soap": so.scale_by_soap}


def _grams(size: int, *, number: int = 3, rank: int | None = None) -> np.ndarray:
    """Positive semi-definite matrices whose rows are of many magnitudes."""
    rng = np.random.default_rng(size)
    root = rng.normal(size=(number, size, rank or 2 * size))
    root *= 10.0 ** rng.uniform(-4, 4, (number, size, 1))
    return (root @ np.swapaxes(root, 1, 2)).astype(np.float32)


# Whole programs: operation by operation they are dozens for every size.
_encode = jax.jit(lambda x, count: codes.encoded(packing.pack(x), count))
certain, restored = jax.jit(state_dtypes.certain), jax.jit(state_dtypes.restored)


def _encoded(matrices: Any, count: int | None = None) -> jax.Array:
    return _encode(matrices, None if count is None else jnp.int32(count))


def _literal(matrix: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    """The codes of one matrix, entry by entry in float64; 0 on the diagonal."""
    found = np.zeros(matrix.shape, int)
    for i, j in np.ndindex(*matrix.shape):
        scale = math.sqrt(float(matrix[i, i])) * math.sqrt(float(matrix[j, j]))
        if i == j or scale == 0:
            continue
        squares = min(abs(float(matrix[i, j])) / scale, 1.0) * 127**2
        low = min(math.floor(math.sqrt(squares)), 126)
        fraction = (squares - low**2) / ((low + 1) ** 2 - low**2)
        place = 0.5 if draws is None else int(draws[i, j]) / 2**32
        if abs(fraction - place) < 1e-3:  # float32 may decide either way
            found[i, j] = 999
        else:
            found[i, j] = (low + (fraction > place)) * (1 if matrix[i, j] > 0 else -1)
    return found


@pytest.mark.parametrize("count", [None, 1, 12345])
@pytest.mark.parametrize("size", SIZES)
def test_codes_are_literal(size: int, count: int | None) -> None:
    matrices = _grams(size)
    matrices[0, 0, :] = matrices[0, :, 0] = 0  # nothing was measured there
    kept = _encoded(matrices, count)
    assert kept.dtype == INT8 and kept.shape[1:] == codes.coded_shape(size)
    draws = None
    if count is not None:
        start = np.asarray(phases((1, size, size))[0], np.uint64)
        draws = (start + count * GOLDEN) % 2**32
    parts = codes.parted(kept)
    found = np.asarray(packing.unpack(parts.codes), int)
    for one, matrix in zip(found, matrices, strict=True):
        wanted = _literal(matrix, draws)
        known = wanted != 999
        np.testing.assert_array_equal(one[known], wanted[known])
        assert known.mean() > 0.9
    diagonals = np.einsum("nii->ni", matrices)
    np.testing.assert_array_equal(parts.diagonal, diagonals)  # to the bit
    # And back: the sign, the square, the two sides.
    sides = np.sqrt(diagonals.astype(np.float64))
    wanted = np.sign(found) * (found / 127.0) ** 2
    wanted = wanted * sides[:, :, None] * sides[:, None, :]
    wanted += np.einsum("ni,ij->nij", diagonals.astype(np.float64), np.eye(size))
    np.testing.assert_allclose(restored(kept), wanted, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_parts_there_and_back(size: int) -> None:
    rng = np.random.default_rng(size)
    shape = (2, *codes.coded_shape(size))
    kept = jnp.asarray(rng.integers(-127, 128, shape), INT8)
    again = np.asarray(codes.joined(codes.parted(kept)))
    spare = 8 * kept.shape[2] - 4 * size  # bytes in which nothing is
    first = size + 1
    np.testing.assert_array_equal(again[:, :first], kept[:, :first])
    for start in (first, first + 8):
        rows = (
            np.asarray(x)[:, start : start + 8].reshape(2, -1) for x in (again, kept)
        )
        found, wanted = (x[:, : x.shape[1] - spare] for x in rows)
        np.testing.assert_array_equal(found, wanted)


def _correlations(matrices: Any) -> np.ndarray:
    wide = np.asarray(matrices, np.float64)
    sides = np.sqrt(np.einsum("nii->ni", wide))
    return wide / sides[:, :, None] / sides[:, None, :]


def _units(correlations: np.ndarray) -> np.ndarray:
    """From the code below to the one above."""
    low = np.minimum(np.floor(127 * np.sqrt(np.abs(correlations))), 126)
    return (2 * low + 1) / 127**2


def test_within_half_a_unit_or_one() -> None:
    matrices = _grams(33)
    wanted = _correlations(matrices)
    for count, bound in ((None, 0.5), (3, 1.0)):
        found = _correlations(restored(_encoded(matrices, count)))
        error = np.abs(found - wanted) / _units(wanted)
        assert error.max() < bound * (1 + 1e-3)


def test_right_on_average_over_steps() -> None:
    matrices, steps = _grams(24, number=2), 1024
    turn = jax.jit(lambda count: restored(codes.encoded(packed, count)))
    packed = packing.pack(jnp.asarray(matrices))
    wanted = _correlations(matrices)
    found = [_correlations(turn(jnp.int32(t))) for t in range(steps)]
    error = (np.mean(found, 0) - wanted) / _units(wanted)
    # As test_lean.py has it for bfloat16; a coin's mean would err by 1.6e-2.
    assert np.abs(error).max() < 4e-3
    walk = np.cumsum(np.asarray(found) - wanted, axis=0) / _units(wanted)
    assert np.abs(walk).max() < 4


def test_no_magnitude_is_too_large_or_small() -> None:
    """Also where the product of two sides leaves float32."""
    gram = _correlations(_grams(6, number=1))
    for scale in (1e-36, 1e-30, 1.0, 1e30, 1e38):
        matrices = (gram * scale).astype(np.float32)
        found = np.asarray(restored(_encoded(matrices)), np.float64) / scale
        assert np.abs(found - gram).max() < 0.01
    nothing = np.asarray(restored(_encoded(np.zeros((1, 6, 6), np.float32))))
    np.testing.assert_array_equal(nothing, 0.0)


def test_rounding_sees_no_layout() -> None:
    """Neither the order of blocks, nor zeros that fill them."""
    matrices = _grams(5, number=4)
    order = np.array([2, 0, 3, 1])
    one, other = _encoded(matrices[order], 5), _encoded(matrices, 5)[order]
    np.testing.assert_array_equal(one, other)
    filled = _encoded(np.pad(matrices, [(0, 0), (0, 2), (0, 2)]), 5)
    cut, parts = codes.parted(filled), codes.parted(_encoded(matrices, 5))
    np.testing.assert_array_equal(packing.unpack(cut.codes)[:, 5:], 0)
    np.testing.assert_array_equal(
        packing.unpack(cut.codes)[:, :5, :5], packing.unpack(parts.codes)
    )
    np.testing.assert_array_equal(
        codes.resized(filled, 5)[:, :14], _encoded(matrices, 5)[:, :14]
    )
    again = codes.resized(codes.resized(filled, 5), 7)
    np.testing.assert_array_equal(again, filled)


DIM, COLUMNS = 64, 96


def _average(steps: int, b2: float = 0.999) -> tuple[np.ndarray, jax.Array]:
    """The moving average of Gram matrices in float64, and in codes.

    Of gradients whose columns and rows are correlated, with a spectrum of four decades.
    """
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    rows = turn * np.arange(1, DIM + 1) ** -1.0
    columns = np.arange(1, COLUMNS + 1) ** -0.5
    draws = (rng.normal(size=(DIM, COLUMNS)) for _ in range(steps))
    gradients = [(rows @ x * columns).astype(np.float32) for x in draws]
    wanted = np.zeros((DIM, DIM))
    for g in gradients:
        wanted = b2 * wanted + (1 - b2) * g.astype(np.float64) @ g.astype(np.float64).T
    tx = so.kronecker(b2=b2, refresh=so.Refresh(1, math.inf), state_dtypes=ALONE)
    key = f"{DIM}x{COLUMNS}"

    def one(carry: Any, g: jax.Array) -> Any:
        return tx.update({key: g[None]}, carry)[1], None

    start = tx.init({key: jnp.zeros((1, DIM, COLUMNS))})
    state, _ = jax.lax.scan(one, start, jnp.asarray(np.stack(gradients)))
    return wanted[None], state.factors[key]["0"]


@pytest.mark.parametrize("steps", [30, 3000])
def test_an_average_stays_near(steps: int) -> None:
    wanted, kept = _average(steps)
    found = np.asarray(restored(kept), np.float64)
    away = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert away < 0.06, away
    diagonals = (np.einsum("nii->ni", x) for x in (found, wanted))
    np.testing.assert_allclose(*diagonals, rtol=1e-4)
    # The noise is not more than what the state says of it, and not a tenth of that.
    noise = np.linalg.norm(_correlations(found)[0] - _correlations(wanted)[0], 2)
    said = 2 * math.sqrt(np.asarray(codes.parted(kept).variance).max())
    assert 0.1 * said < noise < said
    # So what roots are made of is positive, and the average itself is not.
    lowest = np.linalg.eigvalsh(_correlations(found)[0])[0]
    assert lowest < 0
    assert np.linalg.eigvalsh(np.asarray(certain(kept)[0], np.float64))[0] > 0
    # The method of GPUs and TPUs takes the one and refuses the other.
    for matrices, taken in ((certain(kept), True), (restored(kept), False)):
        solved = so.roots.inverse_root(so.roots.Minimax(), matrices, 4.0)
        assert bool(solved.accepted.all()) == taken


def test_noise_is_forgotten() -> None:
    """Of a gradient that comes again and again nothing is lost that adds up."""
    grams = packing.pack(jnp.asarray(_grams(16, number=1)))
    turn = jax.jit(lambda kept, t: codes.moved(kept, F32(0.9), 0.1 * grams, t))
    kept = jnp.zeros((1, *codes.coded_shape(16)), INT8)
    for step in range(300):
        kept = turn(kept, jnp.int32(step))
    largest = np.asarray(codes.parted(kept).variance).max()
    # A unit of 1 / 64 at most, of a quarter's variance, for 1 / (1 - 0.81) steps.
    assert largest < 16 * (1 / 64) ** 2 / 4 / 0.19


@pytest.mark.parametrize("kept", [ALONE, LEAST], ids=["alone", "least"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_types_are_as_said_and_stay(name: str, kept: so.StateDtypes) -> None:
    tx = OPTIMIZERS[name](layout=so.BlockLayout(8), state_dtypes=kept)
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    state, update = tx.init(params), helpers.jit(tx.update)
    for step in range(7):
        before = state
        updates, state = update(helpers.gradients(params, step), state, params)
        assert not helpers.type_changes(before, state)
        for leaf in jax.tree.leaves(updates):
            assert leaf.dtype == F32 and bool(jnp.isfinite(leaf).all())
    assert update._cache_size() == 1
    assert {str(x.dtype) for x in _leaves(state, "factors")} == {"int8"}
    others = _leaves(state, "roots") + _leaves(state, "bases") + _leaves(state, "mu")
    assert {x.dtype for x in others} == {jnp.dtype(kept.roots or F32)}
    assert not any(int(x.max()) for x in _failures(state))


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_directions_stay(alias: Any) -> None:
    """In a well-conditioned problem, within the angle that noise of units makes."""
    like = {"w": jnp.zeros((8, 8))}
    options = {"layout": so.BlockLayout(8), "refresh": so.Refresh(2)}
    found, wanted = (
        helpers.run(alias(state_dtypes=kept, **options), like, 24)[0]
        for kept in (ALONE, so.StateDtypes())
    )
    for step, (x, y) in enumerate(zip(found, wanted, strict=True)):
        a, b = np.ravel(x["w"]), np.ravel(y["w"])
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.97, step


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_gradient_that_is_not_finite_leaves_every_code(
    alias: Any, bad: float
) -> None:
    like = {"w": jnp.zeros((5, 4)), "other": jnp.zeros((3, 2))}
    tx = alias(layout=LAYOUT, refresh=so.Refresh(1), state_dtypes=ALONE)
    _, state = helpers.run(tx, like, 3)
    gradients = helpers.gradients(like, 9)
    gradients["w"] = gradients["w"].at[0, 0].set(bad)
    _, new = helpers.jit(tx.update)(gradients, state, like)
    paths = jax.tree_util.tree_leaves_with_path(state)
    for (path, before), after in zip(paths, jax.tree.leaves(new), strict=True):
        where = jax.tree_util.keystr(path)
        if ".factors" in where:
            same = bool((np.asarray(before) == np.asarray(after)).all())
            assert same == ("5x4" in where), where


def test_large_blocks_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block is the same step."""
    like = {"w": jnp.zeros((16, 24)), "edge": jnp.zeros((20, 8))}
    tx = so.scale_by_shampoo(
        layout=so.BlockLayout(8), refresh=so.Refresh(100, 3), state_dtypes=ALONE
    )
    _, state = helpers.run(tx, like, 4)
    gradients = helpers.gradients(like, 9)
    wanted, after = helpers.jit(lambda g, s: tx.update(g, s))(gradients, state)
    monkeypatch.setattr(_in_turn, "LARGE", 8)
    found, new = helpers.jit(lambda g, s: tx.update(g, s))(gradients, state)
    assert _distance(*jax.tree.map(np.asarray, (found, wanted))) <= 5e-6
    for x, y in zip(_leaves(new, "factors"), _leaves(after, "factors"), strict=True):
        # Sums in another order, and then a code by one.
        np.testing.assert_allclose(restored(x), restored(y), rtol=0.05, atol=1e-3)


def test_a_step_holds_one_large_block_whole() -> None:
    """The stacks of gradients and updates, and no copy of all factors or roots."""
    assert helpers.temporaries(ALONE) <= 8.25  # a copy of all codes is one more


def _bitwise(alias: Any, make: Callable[[int], Mode], n: int) -> list[Any]:
    mode = _without(make(8), "whole", "kept")
    mode.sizes = dict.fromkeys(mode.sizes, n)
    layout = mode.layout(deterministic=True)
    tx = alias(layout=layout, refresh=so.Refresh(3), state_dtypes=LEAST)
    like = mode.like()
    where = so.state_shardings(tx, like, layout)
    return _run(tx, like, mode.place, where, 7, jax.jit)[0]


@pytest.mark.parametrize("make", [_fsdp, _zero1])
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_bitwise_on_many_devices(alias: Any, make: Callable[[int], Mode]) -> None:
    wanted = _bitwise(alias, make, 1)
    for n in (2, 8):
        for ours, one in zip(_bitwise(alias, make, n), wanted, strict=True):
            helpers.assert_equal(ours, one)


@pytest.mark.parametrize("name", ["fsdp2", "hsdp", "tensor", "merged"])
def test_on_many_devices(name: str) -> None:
    """Sums in another order move a code now and then, by one."""
    mode = (MODES | {"merged": MERGED})[name]
    like, layout = mode.like(), mode.layout()
    options = {"refresh": REFRESH, "state_dtypes": ALONE}
    one = so.scale_by_shampoo(layout=so.BlockLayout(BLOCK), **options)
    wanted = _run(one, like)[0]
    many = so.scale_by_shampoo(layout=layout, **options)
    where = so.state_shardings(many, like, layout)
    found, state, update = _run(many, like, mode.place, where)
    assert max(map(_distance, found, wanted)) <= 2.0**-5
    assert update._cache_size() == 1
    for leaf, its in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding == its


def test_explicit_axes() -> None:
    mode = MODES["fsdp8"]
    layout = so.BlockLayout(BLOCK, mesh=mode.mesh(EXPLICIT), block_axes=mode.block_axes)
    tx = so.shampoo(1e-2, layout=layout, refresh=so.Refresh(2), state_dtypes=LEAST)
    params = mode.place(mode.like(), EXPLICIT)
    where = so.state_shardings(tx, params, layout)
    state = helpers.jit(tx.init, out_shardings=where)(params)
    for step in range(3):
        gradients = mode.place(helpers.gradients(mode.like(), step), EXPLICIT)
        updates, new = helpers.jit(tx.update)(gradients, state, params)
        assert not helpers.type_changes(state, new)
        assert not helpers.type_changes(gradients, updates)
        state = new


CHECKPOINTS = [("shampoo", n) for n in ("fsdp8", "hsdp", "tensor", "conv", "merged")]
CHECKPOINTS += [("soap", "zero13"), ("soap", "merged")]


@pytest.mark.parametrize(("alias", "place"), CHECKPOINTS)
def test_the_view_opens_on_any_mesh(alias: str, place: str) -> None:
    mode = (MODES | {"merged": MERGED})[place]
    make, like = ALIASES[alias], mode.like()
    alone, layout = so.BlockLayout(BLOCK), mode.layout()
    options = {"refresh": so.Refresh(2, 2), "state_dtypes": LEAST}
    _, state = helpers.run(make(layout=alone, **options), like, 3)
    view = to_param_view(state, like, alone)
    many, placed = make(layout=layout, **options), mode.place(like)
    abstract = jax.eval_shape(many.init, placed)
    opened = from_param_view(view, abstract, placed, layout)
    where = so.state_shardings(many, like, layout)
    for leaf, its in zip(jax.tree.leaves(opened), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(its, leaf.ndim)
    again = to_param_view(opened, placed, layout)
    helpers.assert_equal(*(jax.tree.map(np.asarray, v) for v in (again, view)))
    wanted = abstract_view(abstract, placed, layout)
    for leaf, its in zip(jax.tree.leaves(view), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype) == (its.shape, its.dtype)


@pytest.mark.parametrize("place", ["hsdp", "merged"])
def test_checkpoints_there_and_back(place: str, tmp_path: Path) -> None:
    """Saved on one device, opened on many, saved there, opened on one: bitwise."""
    mode = (MODES | {"merged": MERGED})[place]
    like, alone, layout = mode.like(), so.BlockLayout(BLOCK), mode.layout()
    options = {"refresh": so.Refresh(2), "state_dtypes": LEAST}
    one, many = (so.scale_by_shampoo(layout=x, **options) for x in (alone, layout))
    _, state = helpers.run(one, like, 3)
    placed = mode.place(like)
    with checkpoint.manager(tmp_path) as manager:
        checkpoint.save(manager, 1, like, state, alone)
        manager.wait_until_finished()
        abstract = jax.eval_shape(many.init, placed)
        there = checkpoint.restore(manager, placed, abstract, layout).state
        checkpoint.save(manager, 2, placed, there, layout)
        manager.wait_until_finished()
        back = checkpoint.restore(manager, like, jax.eval_shape(one.init, like), alone)
    helpers.assert_equal(back.state, state)
    gradients = mode.place(helpers.gradients(like, 3))
    helpers.jit(many.update)(gradients, there, placed)


@pytest.mark.parametrize("kept", [so.StateDtypes(), so.StateDtypes(factors=BF16)])
def test_opens_only_as_it_was_kept(kept: so.StateDtypes) -> None:
    params = helpers.parameters()
    tx, other = (
        so.scale_by_shampoo(layout=LAYOUT, state_dtypes=dtypes)
        for dtypes in (ALONE, kept)
    )
    view = to_param_view(tx.init(params), params, LAYOUT)
    with pytest.raises(ValueError, match=r"factors/0.* has shape \(.*wanted"):
        from_param_view(view, jax.eval_shape(other.init, params), params, LAYOUT)


@pytest.mark.parametrize(("old", "new"), [(8, 4), (4, 8)])
def test_another_block_size(old: int, new: int, tmp_path: Path) -> None:
    like = {"tall": jnp.zeros((16, 4)), "both": jnp.zeros((16, 10))}

    def made(size: int) -> Any:
        layout = so.BlockLayout(size)
        return layout, so.scale_by_shampoo(
            layout=layout, refresh=so.Refresh(2), state_dtypes=ALONE
        )

    (layout, tx), (others, wanted) = made(old), made(new)
    _, state = helpers.run(tx, like, 4)
    with checkpoint.manager(tmp_path) as manager:
        checkpoint.save(manager, 4, like, state, layout)
        manager.wait_until_finished()
        abstract = jax.eval_shape(wanted.init, like)
        found = checkpoint.restore(manager, like, abstract, others, reblock=wanted)
    assert not helpers.type_changes(wanted.init(like), found.state)
    view = to_param_view(found.state, like, others)["parameters"]["tall"]
    before = to_param_view(state, like, layout)["parameters"]["tall"]
    slot = "blocks/inner/direction/factors/0"
    total = [
        sum(
            np.trace(np.asarray(certain(jnp.asarray(x[slot]))).sum(0))
            for x in v.values()
        )
        for v in (view, before)
    ]
    assert total[0] == pytest.approx(total[1], rel=0.05)
    helpers.jit(wanted.update)(helpers.gradients(like, 5), found.state, like)


def test_describe_counts_them() -> None:
    params = {"w": jax.ShapeDtypeStruct((64, 64), F32)}
    layout = so.BlockLayout(32)
    tx = so.scale_by_shampoo(layout=layout, state_dtypes=LEAST)
    said = so.describe(params, layout, tx)
    state = tx.init({"w": jnp.zeros((64, 64))})
    assert said.state_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
    # A byte for each entry of a triangle, and 17 rows more.
    assert said.state_parts["factors"] == 2 * 4 * (32 + 17) * 16


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_float64_parameters(alias: Any) -> None:
    with jax.enable_x64(True):
        tx = alias(layout=LAYOUT, refresh=so.Refresh(1), state_dtypes=LEAST)
        params = helpers.parameters(jnp.float64)
        state = tx.init(params)
        updates, new = helpers.jit(tx.update)(helpers.gradients(params), state, params)
        assert not helpers.type_changes(state, new)
        assert not helpers.type_changes(params, updates)


def test_what_does_not_fit_is_said() -> None:
    for field in ("roots", "momentum", "second_moment"):
        with pytest.raises(ValueError, match=rf"StateDtypes\({field}=.*must be"):
            dataclasses.replace(ALONE, **{field: INT8})
    with pytest.raises(ValueError, match=r"jnp.bfloat16, jnp.int8 or None"):
        so.StateDtypes(factors=jnp.uint8)
    assert stored(jnp.eye(4)[None], INT8).shape == (1, *codes.coded_shape(4))
