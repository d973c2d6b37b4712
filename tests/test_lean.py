"""Lean states: what is kept, in how many bytes, and that nothing else changes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_optax as so
from benchmarks import lean as bench
from shampoo_optax.checkpoint import abstract_view, from_param_view, to_param_view
from shampoo_optax.linalg import packing
from shampoo_optax.linalg.rounding import rounded
from shampoo_optax.transforms import _in_turn
from tests import helpers
from tests.test_sharded import (
    BLOCK,
    EXPLICIT,
    LATE,
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

BF16, F32 = jnp.bfloat16, jnp.float32
PACKED = so.StateDtypes(packed=True)
LEAN = so.StateDtypes(momentum=BF16, roots=BF16, packed=True)
LEANEST = so.StateDtypes(BF16, BF16, BF16, BF16, packed=True)
LAYOUT = so.BlockLayout(5)  # odd and even sides


def _symmetric(size: int, *, number: int = 3, dtype: Any = F32) -> jax.Array:
    root = np.random.default_rng(size).normal(size=(number, size, size))
    return jnp.asarray(root + np.swapaxes(root, 1, 2), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [*range(1, 8), 32])
def test_packing_there_and_back(size: int, dtype: Any) -> None:
    matrices = _symmetric(size, dtype=dtype)
    packed = packing.pack(matrices)
    assert packed.shape[1:] == packing.packed_shape(size)
    assert packing.is_packed(packed) and not packing.is_packed(matrices)
    assert packed.dtype == dtype
    np.testing.assert_array_equal(packing.unpack(packed), matrices)
    # As many places as a triangle has; of an odd size, half a row more.
    assert packed[0].size == (size + 1) * -(-size // 2)
    lower = np.tril_indices(size)
    held = np.sort(np.asarray(packed[0], np.float64).ravel())
    gaps = np.zeros(packed[0].size - len(lower[0]))
    entries = np.asarray(matrices[0], np.float64)[lower]
    np.testing.assert_array_equal(held, np.sort(np.concatenate([entries, gaps])))


def test_packing_is_slices_masks_and_transposes() -> None:
    for do, like in ((packing.pack, (3, 7, 7)), (packing.unpack, (3, 8, 4))):
        program = str(jax.make_jaxpr(do)(jnp.zeros(like)))
        assert "transpose" in program
        assert "gather" not in program and "scatter" not in program


def _spread(number: int) -> np.ndarray:
    """Numbers of either sign over 30 decades."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=number) * 10.0 ** rng.uniform(-15, 15, number)).astype("f4")


def _unit(x: np.ndarray) -> np.ndarray:
    """From one bfloat16 to the next."""
    return 2.0 ** (np.floor(np.log2(np.abs(x.astype(np.float64)))) - 7)


def test_rounding_is_right_on_average_over_steps() -> None:
    x = _spread(500)
    turn = jax.jit(lambda count: rounded(jnp.asarray(x), BF16, count, stacked=False))
    steps = 1024
    found = [np.asarray(turn(jnp.int32(t)), np.float64) for t in range(steps)]
    for one in found:
        assert np.all(np.abs(one - x) < _unit(x))
    error = (np.mean(found, 0) - x) / _unit(x)
    # Weyl's sequence: a coin's mean would err by 1.6e-2, the root of 1 / 4 / 1024.
    assert np.abs(error).max() < 4e-3
    # And no stretch of steps is far off: what adds up stays near one unit.
    walk = np.cumsum(np.asarray(found) - x, axis=0) / _unit(x)
    assert np.abs(walk).max() < 4


def test_rounding_is_right_on_average_over_places() -> None:
    for fraction in (0.1, 0.5, 0.93):
        x = jnp.full((2, 64, 64), -(1.0 + fraction / 128))
        for count in (1, 1000):
            found = rounded(x, BF16, jnp.int32(count), stacked=True)[0]
            up = float(jnp.mean(found != -1.0))
            assert up == pytest.approx(fraction, abs=0.03)  # a coin's: 8e-3


def test_rounding_keeps_what_bfloat16_holds() -> None:
    x = np.asarray(_spread(200).astype(BF16), np.float32)
    x = np.concatenate([x, [np.inf, -np.inf, 0.0, -0.0]]).astype(np.float32)
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32)
    for count in range(20):
        found = rounded(jnp.asarray(x), BF16, jnp.int32(count), stacked=False)
        np.testing.assert_array_equal(np.asarray(found, np.float32), x)
        nans = rounded(
            jnp.asarray(bits.view("f4")), BF16, jnp.int32(count), stacked=False
        )
        assert np.isnan(np.asarray(nans, np.float32)).all()


def test_rounding_sees_no_layout() -> None:
    """Not the order of blocks, not which way they lie, not whether they are packed."""
    x, count = _symmetric(6, number=4), jnp.int32(5)

    def turn(x: jax.Array, *, packed: bool = False) -> jax.Array:
        return rounded(x, BF16, count, stacked=True, packed=packed)

    order = jnp.array([2, 0, 3, 1])
    np.testing.assert_array_equal(turn(x[order]), turn(x)[order])
    wide = helpers.gradients(jnp.zeros((4, 3, 8)))
    tall = jnp.swapaxes(wide, 1, 2)
    np.testing.assert_array_equal(turn(tall), jnp.swapaxes(turn(wide), 1, 2))
    np.testing.assert_array_equal(
        turn(packing.pack(x), packed=True), packing.pack(turn(x))
    )
    # Zeros that fill a block move no draw.
    filled = jnp.pad(x, [(0, 0), (0, 2), (0, 3)])
    np.testing.assert_array_equal(turn(filled)[:, :6, :6], turn(x))


def test_to_the_nearest_an_average_stands_still() -> None:
    """What rounding is for: Adam's second moment at b2 = 0.999, in float64 by hand."""
    steps, b2 = 3000, 0.999
    gradients = np.random.default_rng(0).normal(size=(steps, 200)).astype(np.float32)
    wanted = np.zeros(200)
    for g in gradients.astype(np.float64):
        wanted = b2 * wanted + (1 - b2) * g * g
    rule = so.grafting.stored(so.grafting.adam(b2), BF16)

    def one(carry: Any, g: jax.Array) -> Any:
        state, nearest = carry
        moved = b2 * nearest.astype(F32) + (1 - b2) * g * g
        return (rule.update(g, state)[1], moved.astype(BF16)), None

    start = rule.init(jnp.zeros(200)), jnp.zeros(200, BF16)
    (state, nearest), _ = jax.lax.scan(one, start, jnp.asarray(gradients))
    assert state.nu.dtype == BF16
    ours = np.asarray(state.nu, np.float64) / wanted - 1
    theirs = np.asarray(nearest, np.float64) / wanted - 1
    assert abs(theirs.mean()) > 0.1
    assert abs(ours.mean()) < 0.01 and ours.std() < 0.05


STAGGERED = so.Refresh(3, 2, staggered=True)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "shampoo": lambda **o: so.shampoo(1e-2, refresh=so.Refresh(2), momentum=0.9, **o),
    "staggered": lambda **o: so.shampoo(1e-2, refresh=STAGGERED, **o),
    "array": lambda **o: so.shampoo(
        1e-2, refresh=so.Refresh(2, statistics_frequency=2), graft_scope="array", **o
    ),
    "kl": lambda **o: so.kl_shampoo(1e-2, refresh=so.Refresh(2), **o),
    "soap": lambda **o: so.soap(1e-2, refresh=so.Refresh(2), **o),
    "soap, staggered": lambda **o: so.soap(
        1e-2,
        refresh=STAGGERED,
        basis=so.bases.CholeskyQR2(),  # QR's columns change places at near-ties
        grafting=so.grafting.normalized(so.grafting.rmsprop()),
        **o,
    ),
}
KINDS = {"plain": so.StateDtypes(), "packed": PACKED, "lean": LEAN, "leanest": LEANEST}


def _kinds(state: Any) -> dict[str, set[str]]:
    """The dtypes of a state by field."""
    found: dict[str, set[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        fields = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
        if leaf.ndim:
            found.setdefault(fields[-1], set()).add(str(leaf.dtype))
    return found


# Even and odd sides, and what is not blocked.
SHAPES = {"b": (3,), "odd": (12, 5), "w": (8, 8), "whole": ()}


@functools.cache
def _steps(name: str, kind: str) -> tuple[list[Any], list[Any], Any]:
    """Updates and states of 16 steps, and what made them, for all who ask for them."""
    tx = OPTIMIZERS[name](layout=so.BlockLayout(8), state_dtypes=KINDS[kind])
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    history, states, update = [], [tx.init(params)], helpers.jit(tx.update)
    for step in range(16):
        updates, state = update(helpers.gradients(params, step), states[-1], params)
        history.append(updates)
        states.append(state)
    return history, states, update


@pytest.mark.parametrize("kind", ["packed", "leanest"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_types_are_as_said_and_stay(name: str, kind: str) -> None:
    history, states, update = _steps(name, kind)
    for before, after in itertools.pairwise(states):
        assert not helpers.type_changes(before, after)
    for leaf in jax.tree.leaves(history):
        assert leaf.dtype == F32 and bool(np.isfinite(leaf).all())
    assert update._cache_size() == 1
    state = states[-1]
    assert all(leaf.size for leaf in jax.tree.leaves(state))
    found = _kinds(state)
    averaged = {"bfloat16" if kind == "leanest" else "float32"}
    for field in {"mu", "nu", "factors", "roots", "bases", "trace"} & found.keys():
        assert found[field] == averaged, field
    assert ("roots" in found) != ("bases" in found)
    assert not any(int(x.max()) for x in _failures(state))
    for leaf in _leaves(state, "factors") + _leaves(state, "roots"):
        side = leaf.shape[1] - 1
        assert leaf.shape[1:] == packing.packed_shape(side)
    if name in ("shampoo", "soap"):
        assert not helpers.type_changes(states[0], state)


def _leaves(state: Any, field: str) -> list[jax.Array]:
    return [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if any(getattr(key, "name", None) == field for key in path)
    ]


def _failures(state: Any) -> list[jax.Array]:
    return _leaves(state, "failures")


def _one_more(alias: Any, kept: so.StateDtypes) -> Any:
    """A step without a refresh, from the same state."""
    like = {"w": jnp.zeros((16, 24)), "edge": jnp.zeros((20, 8))}
    refresh = so.Refresh(100, 3)
    tx = alias(layout=so.BlockLayout(8), refresh=refresh, state_dtypes=kept)
    _, state = helpers.run(tx, like, 4)
    return lambda: jax.jit(lambda g, s: tx.update(g, s))(
        helpers.gradients(like, 9), state
    )


def _loops(step: Callable[[], Any]) -> int:
    # A new function each time: JAX remembers what it made of an old one.
    return str(jax.make_jaxpr(lambda: step())()).count("= scan[")


@pytest.mark.parametrize(
    ("alias", "kept"),
    [
        (so.scale_by_shampoo, PACKED),
        (functools.partial(so.scale_by_shampoo, correction="kl"), PACKED),
        (so.scale_by_soap, so.StateDtypes(roots=BF16)),
    ],
    ids=["shampoo", "kl", "soap"],
)
def test_large_blocks_in_turn(
    alias: Any, kept: so.StateDtypes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block after block is the same step; a loop more than at once."""
    step = _one_more(alias, kept)
    wanted, state = step()
    monkeypatch.setattr(_in_turn, "LARGE", 8)
    found, new = step()
    assert _distance(*jax.tree.map(np.asarray, (found, wanted))) <= 5e-6
    helpers.assert_close(new, state, rtol=1e-5, atol=1e-6)
    looped = _loops(step)
    monkeypatch.undo()
    assert looped > _loops(step)


def test_a_lean_step_holds_one_large_block_whole() -> None:
    """The stacks of gradients and updates, and no copy of all factors or roots."""
    assert helpers.temporaries(PACKED) <= 8.25  # a copy of packed factors is 4 more
    # 8 with JAX 0.10's compiler, 12 with that of 0.12.
    assert helpers.temporaries(so.StateDtypes()) <= 12.25


def _cosine(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Of the array whose directions are farthest apart."""
    pairs = [(np.ravel(found[k]), np.ravel(wanted[k])) for k in wanted]
    return min(x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs)


@pytest.mark.parametrize("name", ["shampoo", "kl", "soap"])
def test_packing_changes_nothing_but_rounding(name: str) -> None:
    pairs = zip(_steps(name, "packed")[0], _steps(name, "plain")[0], strict=True)
    for step, (found, wanted) in enumerate(pairs):
        assert _distance(*jax.tree.map(np.asarray, (found, wanted))) <= 5e-6, step


# Rounded to 8 bits entry by entry: an angle of 2**-8, and what averages add to it.
NEAR = {"lean": 0.9999, "leanest": 0.999}


@pytest.mark.parametrize("kind", NEAR)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_directions_stay(name: str, kind: str) -> None:
    pairs = zip(_steps(name, kind)[0], _steps(name, "plain")[0], strict=True)
    for step, (found, wanted) in enumerate(pairs):
        assert _cosine(found, wanted) >= NEAR[kind], step


@pytest.mark.parametrize("method", [so.bases.QR(), so.bases.CholeskyQR2()])
def test_bases_stay_orthogonal(method: Any) -> None:
    """What a refresh rounds is not added to by the next."""
    tx = so.blockwise(
        so.eigenbasis(basis=method, refresh=so.Refresh(1), state_dtypes=LEANEST)
    )
    _, state = helpers.run(tx, {"w": jnp.zeros((16, 16))}, 300)
    for basis in _leaves(state, "bases"):
        basis = np.asarray(basis[0], np.float64)
        # Two roundings of a unit vector in 16 entries meet in every product.
        assert np.abs(basis.T @ basis - np.eye(16)).max() < 2.0**-7


# Several ways to lie, and stacks that differ from those of one device.
PLACES = {n: MODES[n] for n in ("fsdp2", "zero13", "hsdp", "tensor")} | {
    "merged": MERGED
}


@pytest.mark.parametrize("mode", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("alias", [so.scale_by_shampoo, so.scale_by_soap])
def test_packed_on_many_devices(alias: Any, mode: Mode) -> None:
    like, layout = mode.like(), mode.layout()
    options = {"refresh": LATE if mode is MERGED else REFRESH, "state_dtypes": PACKED}
    wanted = _run(alias(layout=so.BlockLayout(BLOCK), **options), like)[0]
    tx = alias(layout=layout, **options)
    where = so.state_shardings(tx, like, layout)
    found, state, update = _run(tx, like, mode.place, where)
    for step, (ours, one) in enumerate(zip(found, wanted, strict=True)):
        assert _distance(ours, one) <= 5e-6, step
    assert update._cache_size() == 1
    for leaf, its in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding == its


def _bitwise(alias: Any, make: Callable[[int], Mode], n: int) -> list[Any]:
    mode = _without(make(8), "whole", "kept")
    mode.sizes = dict.fromkeys(mode.sizes, n)
    layout = mode.layout(deterministic=True)
    tx = alias(layout=layout, refresh=so.Refresh(3), state_dtypes=LEANEST)
    like = mode.like()
    where = so.state_shardings(tx, like, layout)
    return _run(tx, like, mode.place, where, 7, jax.jit)[0]


@pytest.mark.parametrize("make", [_fsdp, _zero1])
@pytest.mark.parametrize("alias", [so.scale_by_shampoo, so.scale_by_soap])
def test_leanest_is_bitwise_on_many_devices(
    alias: Any, make: Callable[[int], Mode]
) -> None:
    """The same bits are rounded the same way, wherever a block lies."""
    wanted = _bitwise(alias, make, 1)
    for n in (2, 8):
        for ours, one in zip(_bitwise(alias, make, n), wanted, strict=True):
            helpers.assert_equal(ours, one)


def test_leanest_on_many_devices_without_determinism() -> None:
    """Sums in another order move a rounding now and then, by one unit of bfloat16."""
    mode = MODES["hsdp"]
    options = {"refresh": REFRESH, "state_dtypes": LEANEST}
    one = so.scale_by_shampoo(layout=so.BlockLayout(BLOCK), **options)
    wanted = _run(one, mode.like())[0]
    many = so.scale_by_shampoo(layout=mode.layout(), **options)
    found = _run(many, mode.like(), mode.place)[0]
    assert max(map(_distance, found, wanted)) <= 2.0**-7
    close = [_distance(*pair) <= 5e-6 for pair in zip(found, wanted, strict=True)]
    assert sum(close) >= len(close) // 2


def test_explicit_axes() -> None:
    mode = MODES["fsdp8"]
    layout = so.BlockLayout(BLOCK, mesh=mode.mesh(EXPLICIT), block_axes=mode.block_axes)
    tx = so.shampoo(1e-2, layout=layout, refresh=so.Refresh(2), state_dtypes=LEANEST)
    params = mode.place(mode.like(), EXPLICIT)
    where = so.state_shardings(tx, params, layout)
    state = helpers.jit(tx.init, out_shardings=where)(params)
    for step in range(3):
        gradients = mode.place(helpers.gradients(mode.like(), step), EXPLICIT)
        updates, new = helpers.jit(tx.update)(gradients, state, params)
        assert not helpers.type_changes(state, new)
        assert not helpers.type_changes(gradients, updates)
        state = new


BARS = {"float32": 24.5, "lean": 12.1, "leanest": 8.1}


@pytest.mark.parametrize("name", BARS)
def test_bytes_a_parameter(name: str) -> None:
    def tx(rate: Any, layout: so.BlockLayout) -> optax.GradientTransformation:
        return so.shampoo(rate, layout=layout, state_dtypes=bench.SETTINGS[name])

    held = bench.weights(tx, {"w": jax.ShapeDtypeStruct((1024, 2048), F32)})
    assert held["trained"] <= BARS[name]
    assert held["1.3B"] <= BARS[name] and held["GPT-2"] <= BARS[name]
    # Without one-sided embeddings, and edges of 1024 by 384: to the bars' own digits.
    assert round(held["1.3B square"], 1) <= BARS[name]


def test_describe_counts_them() -> None:
    params = {"w": jax.ShapeDtypeStruct((64, 64), F32)}
    layout = so.BlockLayout(32)
    tx = so.scale_by_shampoo(layout=layout, state_dtypes=LEANEST)
    said = so.describe(params, layout, tx)
    state = jax.tree.leaves(jax.eval_shape(tx.init, params))
    assert said.state_bytes == sum(x.size * x.dtype.itemsize for x in state)
    assert said.state_bytes / said.parameters < 8.5  # (32 + 1) / 32 of 8, and counters
    parts, half = said.state_parts, 2 * 64 * 64
    assert (parts["mu"], parts["nu"]) == (half, half)
    assert parts["factors"] == parts["roots"] == 2 * 2 * 4 * 33 * 16
    assert sum(parts.values()) == said.state_bytes and "of which factors" in str(said)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("alias", [so.scale_by_shampoo, so.scale_by_soap])
def test_float64_parameters(alias: Any, dtype: Any) -> None:
    with jax.enable_x64(True):
        kept = so.StateDtypes(*[dtype] * 4, packed=True)
        tx = alias(layout=LAYOUT, refresh=so.Refresh(1), state_dtypes=kept)
        params = helpers.parameters(jnp.float64)
        state = tx.init(params)
        updates, new = helpers.jit(tx.update)(helpers.gradients(params), state, params)
        assert not helpers.type_changes(state, new)
        assert not helpers.type_changes(params, updates)


@pytest.mark.parametrize("kept", [LEANEST, so.StateDtypes(roots=BF16)])
@pytest.mark.parametrize("alias", [so.shampoo, so.soap])
def test_a_running_adam_goes_on_lean(alias: Any, kept: so.StateDtypes) -> None:
    params, adam = helpers.parameters(), optax.adam(1e-3)
    _, before = helpers.run(adam, params, 3)
    tx = alias(1e-3, layout=LAYOUT, refresh=so.Refresh(2), state_dtypes=kept)
    fresh = tx.init(params)
    state = so.from_adam(before, tx, params, LAYOUT)
    gradients = [helpers.gradients(params, step) for step in range(2)]
    state = so.warm_up(tx, state, params, gradients)
    assert not helpers.type_changes(fresh, state)
    updates, _ = helpers.jit(tx.update)(gradients[0], state, params)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"StateDtypes\(roots=.*must be jnp.float32"):
        so.StateDtypes(roots=jnp.float16)
    with pytest.raises(ValueError, match=r"scale_by_soap\(mu_dtype=.*wanted one of"):
        so.scale_by_soap(mu_dtype=BF16, state_dtypes=LEAN)
    foreign = so.scale_by_shampoo(grafting=optax.scale_by_rms(), state_dtypes=LEANEST)
    with pytest.raises(ValueError, match=r"grafting.stored\(.*keeps ScaleByRmsState"):
        foreign.init(helpers.parameters())


CHECKPOINTS = [("shampoo", n) for n in ("fsdp8", "hsdp", "tensor", "conv", "merged")]
CHECKPOINTS += [("soap", "zero13"), ("soap", "merged")]


@pytest.mark.parametrize(("alias", "place"), CHECKPOINTS)
def test_the_view_opens_on_any_mesh(alias: str, place: str) -> None:
    """What test_view.py says of other states, of packed ones in bfloat16."""
    mode = (MODES | {"merged": MERGED})[place]
    make = {"shampoo": so.scale_by_shampoo, "soap": so.scale_by_soap}[alias]
    like, alone, layout = mode.like(), so.BlockLayout(BLOCK), mode.layout()
    options = {"refresh": so.Refresh(2, 2), "state_dtypes": LEANEST}
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


def test_the_view_opens_only_as_it_was_packed() -> None:
    params, plain = helpers.parameters(), so.scale_by_shampoo(layout=LAYOUT)
    tx = so.scale_by_shampoo(layout=LAYOUT, state_dtypes=PACKED)
    view = to_param_view(tx.init(params), params, LAYOUT)
    with pytest.raises(ValueError, match=r"has shape \(1, 2, 1\) there; wanted"):
        from_param_view(view, jax.eval_shape(plain.init, params), params, LAYOUT)
