"""Which parameters get which factors, and the ideas taken from Google's Shampoo."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_optax as so
from shampoo_optax.layout.split import split
from tests import helpers

ALWAYS = so.Refresh(1)
THIN = so.BlockLayout(4, one_sided_above=8)
EMBEDDING = {"table": jnp.zeros((10, 6))}


def _root(matrix: np.ndarray, power: float, eps_rel: float = 1e-6) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    damped = np.maximum(values, 0) + eps_rel * values[-1]
    return (vectors * damped**-power) @ vectors.T


@pytest.mark.parametrize("shape", [(10, 6), (6, 10)], ids=["rows", "columns"])
def test_the_longer_side_of_a_thin_matrix_has_no_factor(shape: tuple[int, int]) -> None:
    """Each strip of the short side gets one factor, of all rows, exponent 1/2."""
    with jax.enable_x64(True):
        tx = so.blockwise(
            so.kronecker(0.9, refresh=ALWAYS, largest_factor=THIN.largest_factor), THIN
        )
        like = jnp.zeros(shape)
        state, seen = tx.init(like), []
        for t in range(3):
            seen.append(np.asarray(helpers.gradients(like, t)))
            updates, state = tx.update(jnp.asarray(seen[-1]), state)
    tall = [g if shape[0] == 10 else g.T for g in seen]
    found = np.asarray(updates) if shape[0] == 10 else np.asarray(updates).T
    for strip in (slice(0, 4), slice(4, 6)):
        factor = sum(
            0.1 * 0.9 ** (2 - t) * g[:, strip].T @ g[:, strip]
            for t, g in enumerate(tall)
        ) / (1 - 0.9**3)
        wanted = tall[-1][:, strip] @ _root(factor, 0.5)
        np.testing.assert_allclose(found[:, strip], wanted, rtol=1e-9)


def test_thin_means_above_the_limit() -> None:
    assert THIN.plan(["w"], [(8, 8)]).stacks == {"4x4": (4, 4, 4)}
    assert THIN.plan(["w"], [(9, 8)]).stacks == {"9x4": (2, 9, 4)}
    assert THIN.plan(["w"], [(9, 9)]).stacks == {"9x4": (2, 9, 4), "9x1": (1, 9, 1)}
    whole = so.BlockLayout(math.inf, one_sided_above=8)
    assert whole.largest_factor == 8
    assert whole.plan(["w"], [(9, 3)]).stacks == {"9x3": (1, 9, 3)}
    merged = so.BlockLayout(4, target_parameter_dimensionality=2, one_sided_above=8)
    assert merged.plan(["w"], [(9, 4)]).stacks == {"4x4": (2, 4, 4), "1x4": (1, 1, 4)}


@pytest.mark.parametrize("alias", [so.scale_by_shampoo, so.scale_by_soap])
def test_aliases_give_an_embedding_one_factor(alias: Any) -> None:
    state = alias(layout=THIN).init(EMBEDDING)
    factors = next(
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "factors"))
        if hasattr(leaf, "factors")
    ).factors
    shapes = jax.tree.map(jnp.shape, factors)
    assert shapes == {"10x4": {"1": (1, 4, 4)}, "10x2": {"1": (1, 2, 2)}}


def test_soap_rotates_the_short_side_only() -> None:
    """Adam's first step, taken in the eigenbasis of the rows alone."""
    tx = so.blockwise(
        so.eigenbasis(0.9, refresh=ALWAYS, largest_factor=8), so.BlockLayout(8)
    )
    like = jnp.zeros((10, 6))  # cut to 8 and 2 rows: neither is above the limit
    assert "0" in tx.init(like).blocks.factors["8x6"]
    tx = so.blockwise(
        so.eigenbasis(0.9, 1e-12, refresh=ALWAYS, largest_factor=8),
        so.BlockLayout(8, one_sided_above=8),
    )
    gradient = helpers.gradients(like)
    updates, _ = tx.update(gradient, tx.init(like))
    basis = np.linalg.eigh(np.asarray(gradient.T @ gradient, np.float64))[1]
    # Adam's first step has entries of one, in the basis in which it is taken.
    np.testing.assert_allclose(np.abs(np.asarray(updates) @ basis), 1.0, rtol=1e-3)


@pytest.mark.parametrize(
    "skip", ["^conv", lambda path, shape: path == "conv"], ids=["pattern", "function"]
)
def test_skipped_parameters_get_the_magnitude_alone(skip: Any) -> None:
    params = helpers.parameters()
    layout, refresh = so.BlockLayout(4, skip=skip), so.Refresh(2)
    tx = so.scale_by_shampoo(layout=layout, refresh=refresh)
    found, _ = helpers.run(tx, params, 4)
    adam, _ = helpers.run(optax.scale_by_adam(), params, 4)
    plain, _ = helpers.run(
        so.scale_by_shampoo(layout=so.BlockLayout(4), refresh=refresh), params, 4
    )
    for ours, theirs, other in zip(found, adam, plain, strict=True):
        helpers.assert_close(ours["conv"], theirs["conv"], rtol=2e-5, atol=1e-6)
        helpers.assert_close(ours["kernel"], other["kernel"], rtol=2e-5, atol=1e-6)
    assert not np.allclose(found[-1]["conv"], plain[-1]["conv"], rtol=1e-2)


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"skip='\('.*not a regular expression"):
        so.BlockLayout(skip="(")


def test_repr_says_the_rule() -> None:
    assert "a side above 8, if it is the longer one: not cut, no factor" in repr(THIN)
    assert repr(THIN).startswith("BlockLayout(max_preconditioner_dim=4, one_sided")
    merged = repr(so.BlockLayout(4, target_parameter_dimensionality=1))
    assert "merged up to 4" in merged and "side above" not in merged


def test_factors_measured_every_third_step() -> None:
    """Equals the factors of gradients 1, 4 and 7, corrected by their number."""
    like = jnp.zeros((6, 4))
    rare = so.blockwise(
        so.kronecker(0.9, refresh=so.Refresh(8, 8, statistics_frequency=3))
    )
    often = so.blockwise(so.kronecker(0.9, refresh=so.Refresh(3, 3)))
    state, other, update = rare.init(like), often.init(like), helpers.jit(rare.update)
    for t in range(1, 9):
        found, state = update(helpers.gradients(like, t), state)
        if t in (1, 4, 7):
            _, other = often.update(helpers.gradients(like, t), other)
    helpers.assert_close(state.blocks.factors, other.blocks.factors, rtol=1e-6)
    helpers.assert_close(state.blocks.roots, other.blocks.roots, rtol=1e-4, atol=1e-4)
    assert not np.allclose(found, helpers.gradients(like, 8), rtol=1e-2)


def test_soap_with_rare_statistics_still_moves_its_moment() -> None:
    like = jnp.zeros((6, 4))
    tx = so.blockwise(so.eigenbasis(0.9, refresh=so.Refresh(2, statistics_frequency=4)))
    state = tx.init(like)
    for t in range(1, 4):
        _, new = tx.update(helpers.gradients(like, t), state)
        same = np.array_equal(
            new.blocks.factors["6x4"]["0"], state.blocks.factors["6x4"]["0"]
        )
        assert same == (t != 1)
        assert not np.array_equal(new.blocks.nu["6x4"], state.blocks.nu["6x4"])
        state = new


def _norms(tree: Any) -> list[float]:
    return [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(tree)]


def test_per_array_grafting() -> None:
    """An array's length is Adam's, its direction that of all its blocks together."""
    params, layout = helpers.parameters(), so.BlockLayout(3)
    options: dict[str, Any] = {"layout": layout, "refresh": ALWAYS}
    found, _ = helpers.run(
        so.scale_by_shampoo(graft_scope="array", **options), params, 3
    )
    adam, _ = helpers.run(optax.scale_by_adam(), params, 3)
    bare, _ = helpers.run(so.scale_by_shampoo(grafting=None, **options), params, 3)
    blocks, _ = helpers.run(so.scale_by_shampoo(**options), params, 3)
    for ours, theirs, own in zip(found, adam, bare, strict=True):
        np.testing.assert_allclose(_norms(ours), _norms(theirs), rtol=1e-5)
        for name in ("kernel", "conv"):
            cosine = jnp.vdot(ours[name], own[name]) / jnp.linalg.norm(ours[name])
            np.testing.assert_allclose(cosine, jnp.linalg.norm(own[name]), rtol=1e-5)
        for name in ("bias", "scale"):
            helpers.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert not np.allclose(found[-1]["kernel"], blocks[-1]["kernel"], rtol=1e-2)


def test_normalized_magnitudes_do_not_see_the_loss_scale() -> None:
    """Not even where it changes from step to step, as plain RMSProp does."""
    like = helpers.parameters()
    for rule, blind in ((so.grafting.rmsprop(0.9), False), (None, True)):
        tx = rule or so.grafting.normalized(so.grafting.rmsprop(0.9))
        one, other = tx.init(like), tx.init(like)
        for t in range(3):
            g = helpers.gradients(like, t)
            scaled = jax.tree.map(lambda x, c=10.0**t: c * x, g)
            a, one = tx.update(g, one)
            b, other = tx.update(scaled, other)
        close = all(
            np.allclose(x, y, rtol=1e-4)
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
        assert close == blind


def test_normalized_by_block_inside_and_by_array_outside() -> None:
    gradient = jnp.concatenate([jnp.ones((2, 2)), 100 * jnp.ones((2, 2))])
    rule = so.grafting.normalized(so.grafting.sgd())
    inside = so.blockwise(rule, so.BlockLayout(2))
    found, _ = inside.update(gradient, inside.init(gradient))
    np.testing.assert_allclose(found, 0.5, rtol=1e-6)
    outside, _ = rule.update(gradient, rule.init(gradient))
    np.testing.assert_allclose(outside, gradient / jnp.linalg.norm(gradient), rtol=1e-6)


def test_sqrt_n_gives_every_block_the_root_of_its_size() -> None:
    layout = so.BlockLayout(3)
    tx = so.scale_by_shampoo(
        layout=layout, refresh=ALWAYS, grafting=so.grafting.sqrt_n()
    )
    like = {"kernel": jnp.zeros((5, 4))}
    updates, _ = tx.update(helpers.gradients(like), tx.init(like))
    plan = layout.plan(["kernel"], [(5, 4)])
    for stack in split({0: updates["kernel"]}, plan).values():
        norms = jnp.linalg.norm(stack.reshape(len(stack), -1), axis=1)
        np.testing.assert_allclose(norms, math.sqrt(stack[0].size), rtol=1e-5)


def test_a_failed_root_is_refused_above_the_threshold() -> None:
    """Google's inverse-failure threshold: the old root stays and the count moves."""
    root = so.roots.CoupledNewton(max_iterations=1, max_residual=0.1)
    tx = so.blockwise(so.kronecker(root=root, refresh=ALWAYS))
    like = jnp.zeros((6, 4))
    _, state = tx.update(helpers.gradients(like), tx.init(like))
    assert jax.tree.leaves(state.blocks.failures) == [1, 1]
    np.testing.assert_array_equal(state.blocks.roots["6x4"]["0"][0], np.eye(6))
