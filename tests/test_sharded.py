"""The same optimizer on one device and on many: updates, types, collectives."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_optax as so
from shampoo_optax.layout.placement import sharding
from tests import helpers

BLOCK, STEPS = 8, 20
ALIASES = {"shampoo": so.scale_by_shampoo, "soap": so.scale_by_soap}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# Roots of factors that have seen fewer gradients than they have rows magnify rounding
# by the condition that damping leaves them, 1e6; the first refresh comes after that.
REFRESH, LATE = so.Refresh(5, 5), so.Refresh(10, 10)
Tree = dict[str, jax.Array]


class Mode:
    """A model on a mesh: shapes, mesh, and where what lies."""

    def __init__(
        self, mesh: dict[str, int], block_axes: tuple[str, ...], **arrays: Any
    ) -> None:
        self.sizes, self.block_axes = mesh, block_axes
        self.shapes = {name: shape for name, (shape, _) in arrays.items()}
        self.specs = {name: spec for name, (_, spec) in arrays.items()}

    def mesh(self, kind: AxisType = AUTO) -> jax.sharding.Mesh:
        sizes, names = tuple(self.sizes.values()), tuple(self.sizes)
        return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))

    def layout(self, kind: AxisType = AUTO, **options: Any) -> so.BlockLayout:
        return so.BlockLayout(
            BLOCK,
            mesh=self.mesh(kind),
            block_axes=self.block_axes,
            param_specs=self.specs,
            **options,
        )

    def place(self, tree: Tree, kind: AxisType = AUTO) -> Tree:
        return {
            name: jax.device_put(
                leaf, sharding(self.mesh(kind), self.specs[name], leaf.ndim)
            )
            for name, leaf in tree.items()
        }

    def like(self) -> Tree:
        return {name: jnp.zeros(shape) for name, shape in self.shapes.items()}


def _fsdp(n: int) -> Mode:
    """Rows or columns on all devices; parts of blocks, whole blocks, a vector."""
    return Mode(
        {"fsdp": n},
        ("fsdp",),
        rows=((2 * n, 12), P("fsdp")),
        columns=((12, 2 * n), P(None, "fsdp")),
        whole=((8 * n, 8), P("fsdp")),
        bias=((2 * n,), P("fsdp")),
        kept=((12, 12), P()),
    )


def _zero1(n: int) -> Mode:
    arrays = {name: (shape, P()) for name, shape in _fsdp(n).shapes.items()}
    return Mode({"data": n}, ("data",), **arrays)


MODES = {f"{f.__name__[1:]}{n}": f(n) for f in (_fsdp, _zero1) for n in (2, 3, 5, 8)}
MODES |= {
    "hsdp": Mode(
        {"data": 2, "fsdp": 4},
        ("data", "fsdp"),
        rows=((16, 12), P("fsdp")),
        columns=((12, 16), P(None, "fsdp")),
        kept=((12, 12), P()),
        bias=((16,), P("fsdp")),
    ),
    # State on the sharded axis alone: replicas of it along the other.
    "hsdp_replicated": Mode(
        {"data": 2, "fsdp": 4},
        ("fsdp",),
        rows=((16, 12), P("fsdp")),
        kept=((12, 12), P()),
    ),
    "tensor": Mode(
        {"fsdp": 2, "tensor": 4},
        ("fsdp", "tensor"),
        both=((16, 32), P("fsdp", "tensor")),  # whole blocks along both
        one=((16, 16), P("fsdp", "tensor")),  # parts along one
        parts=((8, 8), P("fsdp", "tensor")),  # parts along both: one is gathered
        columns=((12, 16), P(None, ("fsdp", "tensor"))),
    ),
    "tensor_outside": Mode(
        {"fsdp": 2, "tensor": 4}, ("fsdp",), both=((16, 32), P("fsdp", "tensor"))
    ),
    # 24 rows on 8 devices, three each, do not nest with blocks of 8; 16 columns do.
    "resharded": Mode({"fsdp": 8}, ("fsdp",), odd=((24, 16), P("fsdp"))),
    "gathered": Mode({"fsdp": 8}, ("fsdp",), odd=((24, 12), P("fsdp"))),
    "conv": Mode(
        {"fsdp": 4},
        ("fsdp",),
        kernel=((3, 2, 4, 8), P(None, None, None, "fsdp")),
        other=((4, 4, 8), P("fsdp")),
    ),
}


# Seven blocks of 8x8, and four of 8x4, 8x2 and 4x2, which eight devices hold as 8x4.
MERGED = Mode(
    {"data": 8},
    ("data",),
    square=((16, 16), P()),
    half=((8, 20), P()),
    edge=((12, 10), P()),
)
KL = functools.partial(so.scale_by_shampoo, correction="kl")


@pytest.mark.parametrize("alias", [*ALIASES.values(), KL], ids=[*ALIASES, "kl"])
def test_blocks_filled_with_zeros(alias: Any) -> None:
    like, layout = MERGED.like(), MERGED.layout()
    plain = MERGED.layout(merge_stacks=False)
    stacks = [len(_stacks(alias(layout=x).init(like))) for x in (layout, plain)]
    assert stacks == [2, 4]
    wanted = _one_device(alias, MERGED, LATE)
    for ours in (layout, plain):
        found = _run(alias(layout=ours, refresh=LATE), like, MERGED.place)[0]
        for step, (x, one) in enumerate(zip(found, wanted, strict=True)):
            assert _distance(x, one) <= 5e-6, step


def test_layers_and_experts() -> None:
    """Leading axes hold arrays of their own; experts lie whole on their devices."""
    mode = Mode(
        {"expert": 2, "fsdp": 4},
        ("expert", "fsdp"),
        layers=((3, 16, 12), P(None, "fsdp")),
        experts=((4, 8, 12), P("expert", None, None)),
        both=((4, 16, 8), P("expert", "fsdp")),
    )

    def batch_axes(path: str, shape: tuple[int, ...]) -> int:
        return 1

    one = so.BlockLayout(BLOCK, batch_axes=batch_axes)
    layout = mode.layout(batch_axes=batch_axes)
    wanted = _run(so.scale_by_shampoo(layout=one, refresh=REFRESH), mode.like())[0]
    tx = so.scale_by_shampoo(layout=layout, refresh=REFRESH)
    found = _run(tx, mode.like(), mode.place)[0]
    for step, (ours, alone) in enumerate(zip(found, wanted, strict=True)):
        assert _distance(ours, alone) <= 5e-6, step


def _stacks(state: Any) -> dict[str, jax.Array]:
    return state.blocks.mu


def _run(
    tx: optax.GradientTransformation,
    like: Tree,
    place: Callable[[Tree], Tree] = lambda tree: tree,
    where: Any = None,
    steps: int = STEPS,
    jit: Callable[..., Any] = helpers.jit,
) -> tuple[list[dict[str, np.ndarray]], Any, Any]:
    params = place(like)
    state = jit(tx.init, out_shardings=where)(params)
    update, history = jit(tx.update), []
    for step in range(steps):
        updates, state = update(place(helpers.gradients(like, step)), state, params)
        history.append(jax.tree.map(np.asarray, updates))
    return history, state, update


@functools.cache
def _alone(alias: Any, shapes: tuple[Any, ...], refresh: so.Refresh) -> Any:
    """The updates of one device; meshes of other kinds share them."""
    like = {name: jnp.zeros(shape) for name, shape in shapes}
    return _run(alias(layout=so.BlockLayout(BLOCK), refresh=refresh), like)[0]


def _one_device(alias: Any, mode: Mode, refresh: so.Refresh = REFRESH) -> Any:
    return _alone(alias, tuple(mode.shapes.items()), refresh)


def _distance(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest difference over the largest entry, of the worst array."""
    return max(
        float(np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max())
        for name in wanted
    )


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_many_devices_are_one(alias: Any, mode: Mode) -> None:
    like = mode.like()
    wanted = _one_device(alias, mode)
    layout = mode.layout()
    tx = alias(layout=layout, refresh=REFRESH)
    where = so.state_shardings(tx, like, layout)
    found, state, update = _run(tx, like, mode.place, where)
    for step, (ours, one) in enumerate(zip(found, wanted, strict=True)):
        assert _distance(ours, one) <= 5e-6, step
    assert update._cache_size() == 1
    for leaf, its in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding == its


@pytest.mark.parametrize("mode", ["fsdp8", "zero1_3", "hsdp", "tensor"])
def test_explicit_axes(mode: str) -> None:
    """Specs come from the types of the arrays, and types stay what they were."""
    chosen = MODES[mode.replace("_", "")]
    like = chosen.like()
    wanted = _one_device(so.scale_by_shampoo, chosen)
    layout = so.BlockLayout(
        BLOCK, mesh=chosen.mesh(EXPLICIT), block_axes=chosen.block_axes
    )
    tx = so.scale_by_shampoo(layout=layout, refresh=REFRESH)
    params = chosen.place(like, EXPLICIT)
    where = so.state_shardings(tx, params, layout)
    update = helpers.jit(tx.update)
    state = helpers.jit(tx.init, out_shardings=where)(params)
    for step in range(6):
        gradients = chosen.place(helpers.gradients(like, step), EXPLICIT)
        updates, new = update(gradients, state, params)
        assert not helpers.type_changes(state, new)
        assert not helpers.type_changes(gradients, updates)
        state = new
        assert _distance(jax.tree.map(np.asarray, updates), wanted[step]) <= 5e-6
    assert update._cache_size() == 1


def _bitwise(alias: Any, make: Callable[[int], Mode], n: int) -> list[Any]:
    """Runs of a model whose shapes do not depend on the mesh; blocks of two shapes."""
    mode = _without(make(8), "whole", "kept", "bias")
    mode.sizes = dict.fromkeys(mode.sizes, n)
    layout = mode.layout(deterministic=True)
    tx = alias(layout=layout, refresh=so.Refresh(3))
    like = mode.like()
    where = so.state_shardings(tx, like, layout)
    return _run(tx, like, mode.place, where, 7, jax.jit)[0]


@pytest.mark.parametrize("make", [_fsdp, _zero1])
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_deterministic_is_bitwise(alias: Any, make: Callable[[int], Mode]) -> None:
    wanted = _bitwise(alias, make, 1)
    for n in (2, 4, 8):
        for ours, one in zip(_bitwise(alias, make, n), wanted, strict=True):
            for name in one:
                np.testing.assert_array_equal(
                    ours[name], one[name], err_msg=f"{n} {name}"
                )


def test_deterministic_is_the_same_optimizer() -> None:
    like = MODES["fsdp8"].like()
    plain, mapped = (
        _run(
            so.scale_by_soap(
                layout=so.BlockLayout(BLOCK, deterministic=deterministic),
                refresh=REFRESH,
            ),
            like,
            steps=6,
        )
        for deterministic in (False, True)
    )
    for ours, theirs in zip(mapped[0], plain[0], strict=True):
        assert _distance(ours, theirs) <= 5e-6
    helpers.assert_close(mapped[1], plain[1], rtol=1e-3, atol=1e-4)


COLLECTIVES = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"


def abstract(
    mode: Mode, layout: so.BlockLayout, tx: optax.GradientTransformation
) -> tuple[Any, Any]:
    """Parameters and state as shapes that know where they lie."""
    mesh = mode.mesh()
    params = {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, mode.specs[name])
        )
        for name, x in mode.like().items()
    }
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        so.state_shardings(tx, params, layout),
    )
    return params, state


def _collectives(mode: Mode, **options: Any) -> collections.Counter[str]:
    """What the compiled update sends, by kind."""
    layout = mode.layout(**options)
    tx = so.scale_by_shampoo(layout=layout, refresh=REFRESH)
    params, state = abstract(mode, layout, tx)
    step = jax.jit(tx.update).lower(params, state, params).compile()
    return collections.Counter(
        re.findall(rf" ({COLLECTIVES})(?:-start)?\(", step.as_text())
    )


def _pools(mode: Mode) -> int:
    tx = so.scale_by_shampoo(layout=mode.layout())
    return len(_stacks(jax.eval_shape(tx.init, mode.like())))


def _without(mode: Mode, *names: str) -> Mode:
    arrays = {
        name: (mode.shapes[name], mode.specs[name])
        for name in mode.shapes
        if name not in names
    }
    return Mode(mode.sizes, mode.block_axes, **arrays)


def test_two_all_to_alls_per_pool() -> None:
    """One in and one out for parts of blocks; nothing where blocks lie whole."""
    mode = _without(MODES["fsdp8"], "kept", "whole")
    assert _collectives(mode) == {"all-to-all": 2 * _pools(mode)}
    assert _collectives(_without(mode, "rows", "columns")) == {}
    whole = Mode({"fsdp": 8}, ("fsdp",), whole=((64, 8), P("fsdp")))
    assert _collectives(whole) == {}
    experts = Mode({"expert": 8}, ("expert",), experts=((8, 12, 12), P("expert")))
    by_path = {"batch_axes": lambda path, shape: 1}
    assert _collectives(experts, **by_path) == {}


def test_copies_are_gathered_once_per_pool() -> None:
    zero1 = MODES["zero18"]
    assert _collectives(zero1) == {"all-gather": _pools(zero1)}
    hsdp = _without(MODES["hsdp"], "kept")
    pools = _pools(hsdp)
    assert _collectives(hsdp) == {"all-to-all": 2 * pools, "all-gather": pools}


def _eqns(jaxpr: Any, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Primitives of a program, and whether a branch or a loop is around them."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, inside
        deeper = inside or eqn.primitive.name in ("cond", "while", "scan")
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _eqns(inner, deeper)


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
@pytest.mark.parametrize("staggered", [False, True])
def test_no_collective_in_a_branch_or_a_loop(alias: Any, staggered: bool) -> None:
    """There one device would wait for another that took the other branch."""
    mode = MODES["hsdp"]
    tx = alias(layout=mode.layout(), refresh=so.Refresh(3, staggered=staggered))
    like = mode.like()
    program = jax.make_jaxpr(tx.update)(like, tx.init(like))
    names = {"all_to_all", "all_gather", "all_gather_invariant", "psum", "ppermute"}
    found = [(name, inside) for name, inside in _eqns(program.jaxpr) if name in names]
    assert found and not any(inside for _, inside in found)
    assert any(inside for name, inside in _eqns(program.jaxpr) if "eigh" in name)


def test_updates_travel_back_in_the_exchange_dtype() -> None:
    mode = MODES["fsdp8"]
    like = mode.like()
    exact, _, _ = _run(
        so.scale_by_shampoo(layout=mode.layout(), refresh=REFRESH),
        like,
        mode.place,
        None,
        6,
    )
    tx = so.scale_by_shampoo(
        layout=mode.layout(exchange_dtype=jnp.bfloat16), refresh=REFRESH
    )
    found, state, _ = _run(tx, like, mode.place, None, 6)
    apart = [_distance(ours, one) for ours, one in zip(found, exact, strict=True)]
    assert 1e-4 < max(apart) < 2**-7
    assert all(leaf.dtype == np.float32 for leaf in found[-1].values())
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state))


WRAPPERS = {
    "chain": lambda tx: optax.chain(
        optax.clip_by_global_norm(1.0), tx, optax.trace(0.9)
    ),
    "masked": lambda tx: optax.masked(tx, {"rows": True, "kept": True, "bias": False}),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "adam": optax.adam(1e-3)},
        {"rows": "ours", "kept": "adam", "bias": "ours"},
    ),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_shardings_of_any_chain(wrap: Any, kind: AxisType) -> None:
    """The state keeps its shardings, and a training step compiles once."""
    mode = Mode(
        {"fsdp": 4},
        ("fsdp",),
        rows=((8, 12), P("fsdp", None)),
        kept=((12, 12), P(None, None)),
        bias=((8,), P("fsdp")),
    )
    layout = mode.layout(kind)
    tx = wrap(so.shampoo(1e-2, layout=layout, refresh=so.Refresh(2), momentum=0.9))
    params = mode.place(mode.like(), kind)
    where = so.state_shardings(tx, params, layout)
    state = helpers.jit(tx.init, out_shardings=where)(params)

    def step(params: Tree, state: Any, gradients: Tree) -> tuple[Tree, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step = helpers.jit(step, donate_argnums=(0, 1))
    for i in range(5):
        gradients = mode.place(helpers.gradients(mode.like(), i), kind)
        params, state = step(params, state, gradients)
    assert step._cache_size() == 1
    for leaf, its in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding == its
    spread = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 3]
    assert spread and all(leaf.sharding.spec[0] == "fsdp" for leaf in spread)


def test_the_mesh_in_use() -> None:
    mode = MODES["fsdp8"]
    layout = so.BlockLayout(BLOCK, block_axes=("fsdp",), param_specs=mode.specs)
    tx = so.scale_by_shampoo(layout=layout, refresh=REFRESH)
    with pytest.raises(ValueError, match="no mesh is in use"):
        tx.init(mode.like())
    wanted, _, _ = _run(
        so.scale_by_shampoo(layout=mode.layout(), refresh=REFRESH),
        mode.like(),
        mode.place,
    )
    with jax.set_mesh(mode.mesh()):
        where = so.state_shardings(tx, mode.like(), layout)
        found, _, update = _run(tx, mode.like(), mode.place, where)
        tx.init(mode.like())
    assert update._cache_size() == 1
    assert _distance(found[-1], wanted[-1]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_axes": ("model",)}, r"no axis 'model'.*\{'fsdp': 8\}"),
        ({"block_axes": ()}, "say over which"),
        ({"block_axes": ("fsdp", "fsdp")}, "twice"),
        ({"param_specs": {"other": P()}}, r"'w' of shape \(16, 12\) has none"),
        ({"param_specs": {"w": P("model")}}, r"'w'.*no axis 'model'.*\{'fsdp': 8\}"),
        ({"param_specs": {"w": P(None, "fsdp")}}, r"'w'.*a dimension of 12.*8 devices"),
        ({"param_specs": {"w": P(None, None, "fsdp")}}, "more entries than dimensions"),
    ],
)
def test_bad_meshes(options: dict[str, Any], message: str) -> None:
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AUTO,))
    with pytest.raises(ValueError, match=message):
        layout = so.BlockLayout(**{"mesh": mesh, "block_axes": ("fsdp",)} | options)
        so.scale_by_shampoo(layout=layout).init({"w": jnp.zeros((16, 12))})


def test_another_mesh_than_the_parameters() -> None:
    params = MODES["fsdp8"].place(MODES["fsdp8"].like(), EXPLICIT)
    other = jax.make_mesh((4,), ("fsdp",), axis_types=(EXPLICIT,))
    tx = so.scale_by_shampoo(layout=so.BlockLayout(mesh=other, block_axes=("fsdp",)))
    with pytest.raises(
        ValueError, match=r"parameter '.*' lies on a mesh \{'fsdp': 8\}"
    ):
        tx.init(params)
    with pytest.raises(ValueError, match="no block_axes"):
        so.state_shardings(tx, params, so.BlockLayout())
