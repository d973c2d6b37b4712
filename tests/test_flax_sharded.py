"""Flax on a mesh: boxed parameters of Linen, states and optimizers of NNX."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import shampoo_optax as so
from shampoo_optax.layout.placement import sharding
from tests import helpers

AXES = ("fsdp", "tensor")
STEPS = 3
WIDE, HIDDEN, OUT, BATCH = 16, 32, 8, 64
UP, DOWN = ("fsdp", "tensor"), ("tensor", "fsdp")
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
Updates = list[np.ndarray]


def _mesh(kind: AxisType) -> Mesh:
    return jax.make_mesh((2, 4), AXES, axis_types=(kind, kind))


def _batch(step: int) -> jax.Array:
    drawn = np.random.default_rng(step).normal(size=(BATCH, WIDE))
    return jnp.asarray(drawn, jnp.float32)


def _optimizer(
    mesh: Mesh | None, specs: Any
) -> tuple[optax.GradientTransformation, so.BlockLayout]:
    layout = so.BlockLayout(8)
    if mesh is not None:
        layout = so.BlockLayout(8, mesh=mesh, block_axes=AXES, param_specs=specs)
    # A factor of few gradients magnifies rounding by the condition that damping leaves.
    return so.shampoo(1e-2, eps_rel=1e-3, layout=layout, refresh=so.Refresh(2)), layout


def _loss(found: jax.Array, inputs: jax.Array) -> jax.Array:
    return jnp.mean((found - inputs[:, :OUT]) ** 2)


def _assert_close(found: list[Updates], wanted: list[Updates]) -> None:
    for ours, one in zip(found, wanted, strict=True):
        for x, y in zip(ours, one, strict=True):
            assert np.abs(x - y).max() <= 5e-6 * np.abs(y).max()


def _leaves(tree: Any) -> Updates:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _assert_lies(state: Any, where: Any) -> None:
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True)
    for leaf, wanted in pairs:
        assert leaf.sharding == wanted
    spread = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 3]
    assert spread and all(leaf.sharding.spec[0] == AXES for leaf in spread)


class Perceptron(nn.Module):
    """Two boxed kernels and a boxed bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = nn.initializers.lecun_normal()
        up = nn.with_partitioning(normal, UP)
        down = nn.with_partitioning(normal, DOWN)
        bias = nn.with_partitioning(nn.initializers.zeros, ("fsdp",))
        x = jnp.tanh(nn.Dense(HIDDEN, use_bias=False, kernel_init=up)(x))
        return nn.Dense(OUT, kernel_init=down, bias_init=bias)(x)


def _linen(mesh: Mesh | None, unbox: bool) -> list[Updates]:
    """Updates of every step; with a mesh, checks of the state and the step as well."""
    model, key, inputs = Perceptron(), jax.random.key(0), _batch(0)

    def start() -> Any:
        params = model.init(key, inputs)["params"]
        return nn.meta.unbox(params) if unbox else params

    boxed = jax.eval_shape(lambda: model.init(key, inputs)["params"])
    specs = nn.get_partition_spec(boxed)
    tx, layout = _optimizer(mesh, specs)
    placed = where = None
    if mesh is not None:
        placed = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
        where = so.state_shardings(tx, jax.eval_shape(start), layout)
    params = helpers.jit(start, out_shardings=placed)()
    state = helpers.jit(tx.init, out_shardings=where)(params)

    @helpers.jit
    def step(params: Any, state: Any, inputs: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return _loss(model.apply({"params": params}, inputs), inputs)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state, updates

    history = []
    for i in range(STEPS):
        inputs = _batch(i)
        if mesh is not None:
            inputs = jax.device_put(inputs, sharding(mesh, P("fsdp"), 2))
        params, state, updates = step(params, state, inputs)
        history.append(_leaves(updates))
    assert step._cache_size() == 1
    if mesh is not None:
        _assert_lies(state, where)
    return history


@pytest.mark.parametrize("unbox", [False, True])
def test_linen(unbox: bool) -> None:
    _assert_close(_linen(_mesh(AUTO), unbox), _linen(None, unbox))


def _whole(x: jax.Array) -> jax.Array:
    """FSDP gathers parameters where they are used; explicit axes want it said."""
    mesh = jax.typeof(x).sharding.mesh
    return jax.reshard(x, P()) if AxisType.Explicit in mesh.axis_types else x


class Model(nnx.Module):
    """The same in NNX, with the axes as metadata of its parameters."""

    def __init__(self, **metadata: Any) -> None:
        rng = np.random.default_rng(0)

        def kernel(rows: int, columns: int, axes: tuple[str, str]) -> nnx.Param:
            drawn = rng.normal(size=(rows, columns)) / np.sqrt(rows)
            return nnx.Param(jnp.asarray(drawn, jnp.float32), out_sharding=axes)

        self.up, self.down = kernel(WIDE, HIDDEN, UP), kernel(HIDDEN, OUT, DOWN)
        self.bias = nnx.Param(jnp.zeros(OUT), out_sharding=("fsdp",), **metadata)

    def __call__(self, x: jax.Array) -> jax.Array:
        up, down, bias = (_whole(x[...]) for x in (self.up, self.down, self.bias))
        return jnp.tanh(x @ up) @ down + bias[None]


def _loss_of(model: Model, inputs: jax.Array) -> jax.Array:
    return _loss(model(inputs), inputs)


@functools.cache
def _nnx_alone() -> list[Updates]:
    """One device, no mesh, no metadata that means anything."""
    with nnx.use_eager_sharding(False):
        model = Model()
    optimizer = nnx.Optimizer(model, _optimizer(None, None)[0], wrt=nnx.Param)
    history = []
    for i in range(STEPS):
        gradients = nnx.grad(_loss_of)(model, _batch(i))
        history.append(_leaves(optimizer.update(model, gradients)))
    return history


def _placed_inputs(mesh: Mesh, step: int) -> jax.Array:
    return jax.device_put(_batch(step), sharding(mesh, P("fsdp"), 2))


KINDS = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def _start(mesh: Mesh, **metadata: Any) -> tuple[Model, Any, Any, Any]:
    model = nnx.jit(lambda: Model(**metadata))()
    params = nnx.state(model, nnx.Param)
    tx, layout = _optimizer(mesh, nnx.get_partition_spec(params))
    return model, params, tx, so.state_shardings(tx, params, layout)


@KINDS
def test_nnx_split(kind: AxisType) -> None:
    """Parameters as ``nnx.split`` gives them, in a step of plain JAX."""
    mesh = _mesh(kind)
    history = []
    with jax.set_mesh(mesh):
        model, _, tx, where = _start(mesh)
        graphdef, params = nnx.split(model, nnx.Param)
        state = helpers.jit(tx.init, out_shardings=where)(params)

        @helpers.jit
        def step(params: nnx.State, state: Any, inputs: jax.Array) -> Any:
            def loss(params: nnx.State) -> jax.Array:
                return _loss_of(nnx.merge(graphdef, params), inputs)

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state, updates

        for i in range(STEPS):
            inputs = _placed_inputs(mesh, i)
            params, state, updates = step(params, state, inputs)
            history.append(_leaves(updates))
    assert step._cache_size() == 1
    _assert_lies(state, where)
    _assert_close(history, _nnx_alone())


def _step(model: Model, optimizer: nnx.Optimizer, inputs: jax.Array) -> Any:
    return optimizer.update(model, nnx.grad(_loss_of)(model, inputs))


def _train(model: Model, optimizer: nnx.Optimizer, mesh: Mesh) -> list[Updates]:
    """Under ``nnx.jit``, which compiles once."""
    step = nnx.jit(_step)  # with a cache of its own
    steps = [step(model, optimizer, _placed_inputs(mesh, i)) for i in range(STEPS)]
    assert step.jitted_fn._cache_size() == 1
    return [_leaves(updates) for updates in steps]


@KINDS
@pytest.mark.parametrize("inside", [False, True])
def test_nnx_optimizer(kind: AxisType, inside: bool) -> None:
    """Made in ``nnx.jit``, or with an init that is jitted with its shardings."""
    mesh = _mesh(kind)
    with jax.set_mesh(mesh):
        model, _, tx, where = _start(mesh)
        if inside:
            optimizer = nnx.jit(lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param))(
                model
            )
        else:
            init = jax.jit(tx.init, out_shardings=where)
            placed = optax.GradientTransformationExtraArgs(init, tx.update)
            optimizer = nnx.Optimizer(model, placed, wrt=nnx.Param)
        _assert_lies(nnx.as_pure(optimizer.opt_state), where)
        history = _train(model, optimizer, mesh)
    _assert_lies(nnx.as_pure(optimizer.opt_state), where)
    _assert_close(history, _nnx_alone())


def test_nnx_optimizer_sharding() -> None:
    """What NNX says of an optimizer's state holds for what has a parameter's shape.

    Blocks have not. On explicit axes Optax itself cannot add the two.
    """
    mesh = _mesh(AUTO)
    with jax.set_mesh(mesh):
        model, _, tx, _ = _start(mesh, optimizer_sharding=("tensor",))
        optimizer = nnx.jit(lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param))(
            model
        )
        history = _train(model, optimizer, mesh)
    state = nnx.as_pure(optimizer.opt_state)[0]
    assert state.rest.mu["bias"].sharding.spec == P("tensor")
    (stack,) = state.blocks.mu.values()
    assert stack.sharding.spec == P(AXES)
    _assert_close(history, _nnx_alone())
