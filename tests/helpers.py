"""What several test files share: trees of parameters, gradients, comparisons."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shampoo_optax as so

SHAPES = {"kernel": (6, 4), "conv": (3, 3, 2, 4), "bias": (5,), "scale": ()}


def gradients(tree: Any, step: int = 0, scale: float = 1.0) -> Any:
    """Normal numbers like ``tree``; other ones for every step and leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(step)
    drawn = [scale * rng.normal(size=jnp.shape(leaf)) for leaf in leaves]
    arrays = [
        jnp.asarray(x, jnp.result_type(leaf))
        for x, leaf in zip(drawn, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)


def known(options: dict[str, Any]) -> dict[str, Any]:
    """Those of XLA's options that this jaxlib has; others end a compilation."""

    def has(name: str) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options={name: options[name]}).lower().compile()
        except jax.errors.JaxRuntimeError as refused:
            if "No such compile option" not in str(refused):
                raise
            return False
        return True

    return {name: value for name, value in options.items() if has(name)}


@functools.cache
def _quick() -> dict[str, Any]:
    """Asked for at the first compilation: an import must not start a backend."""
    return known({"xla_cpu_use_fusion_emitters": False})


def jit(fun: Callable[..., Any], **options: Any) -> Any:
    """``jax.jit`` with kernels in half the time, most of what the tests took.

    XLA has two ways to write them, and this is the other one than users': the same
    programs, so the same types, places and exchanges, and numbers that differ in a last
    bit. Tests that hold bits, sizes or temporaries, and those of single functions, take
    ``jax.jit``.
    """
    return jax.jit(fun, compiler_options=_quick(), **options)


def exact_roots(size: int, p: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Float32 matrices of nine decades and of two clusters, and their p-th roots."""
    rng = np.random.default_rng(p)
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    spectra = 10 ** rng.uniform(-9, 0, size), np.repeat([1.0, 1e-7], size // 2)
    for values in spectra:
        matrix = ((q * values) @ q.T).astype(np.float32)
        matrix = 0.5 * (matrix + matrix.T)
        w, v = np.linalg.eigh(matrix.astype(np.float64))
        yield matrix, (v * (w + 1e-6 * w[-1]) ** (-1 / p)) @ v.T


def record(name: str, result: str) -> None:
    """Note what a test found, for a table in the docs; ``make soak`` asks for it."""
    if where := os.environ.get("SHAMPOO_OPTAX_RESULTS"):
        with Path(where).open("a") as file:
            file.write(json.dumps({"name": name, "result": result}) + "\n")


def parameters(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """A matrix, a convolution kernel, a vector and a scalar."""
    like = {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}
    return gradients(like, step=10_000)


def run(
    tx: optax.GradientTransformation,
    params: Any,
    steps: int,
    *,
    eager: bool = False,
    scale: float = 1.0,
) -> tuple[list[Any], Any]:
    """Updates of every step and the last state; parameters move along."""
    tx = optax.with_extra_args_support(tx)
    update = tx.update if eager else jit(tx.update)
    state, history = tx.init(params), []
    for step in range(steps):
        updates, state = update(gradients(params, step, scale), state, params)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return history, state


def assert_close(found: Any, wanted: Any, *, rtol: float, atol: float = 0.0) -> None:
    """Equal structure, and every leaf close; shapes and dtypes must agree."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    )
    for (path, x), y in pairs:
        name = jax.tree_util.keystr(path)
        assert jnp.shape(x) == jnp.shape(y), name
        assert jnp.result_type(x) == jnp.result_type(y), name
        a, b = (np.asarray(v).astype(np.float64) for v in (x, y))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


def assert_equal(found: Any, wanted: Any) -> None:
    """Bitwise equal, leaf by leaf."""
    assert_close(found, wanted, rtol=0.0)


def type_changes(before: Any, after: Any) -> list[str]:
    """Leaves whose shape, dtype, weak type or sharding differ; empty where none do."""
    assert jax.tree.structure(before) == jax.tree.structure(after)
    changes = []
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    )
    for (path, x), y in pairs:
        a, b = jax.typeof(x), jax.typeof(y)
        if a != b:
            name = jax.tree_util.keystr(path)
            weak = f"weak: {a.weak_type}, {b.weak_type}"
            changes.append(f"{name}: {a} {a.sharding} -> {b} {b.sharding} ({weak})")
    return changes


def temporaries(kept: so.StateDtypes) -> float:
    """Bytes a parameter that a compiled step of four blocks a side holds beside it."""
    like = {"w": jax.ShapeDtypeStruct((2048, 2048), jnp.float32)}
    tx = so.scale_by_shampoo(
        layout=so.BlockLayout(512), refresh=so.Refresh(1, math.inf), state_dtypes=kept
    )
    state = jax.eval_shape(tx.init, like)
    step = jax.jit(tx.update, donate_argnums=(0, 1)).lower(like, state).compile()
    return step.memory_analysis().temp_size_in_bytes / 2048**2
