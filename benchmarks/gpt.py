"""A GPT's training step in plain JAX, of the arrays of :func:`shapes.transformer`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

HEAD = 64  # the width of an attention head, as GPT-2 has it


def loss(params: Any, tokens: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Mean cross entropy of the next token."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, tokens, dtype)[:, :-1], tokens[:, 1:]
    )
    return losses.mean()


def logits(params: Any, tokens: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
    """What comes after each token, in float32; all before it in ``dtype``."""
    layers = [params[f"layer{i}"] for i in range(len(params) - 3)]
    token, length = params["token"].astype(dtype), tokens.shape[1]
    x = token[tokens] + params["position"][None, :length].astype(dtype)
    for layer in layers:
        x = jax.checkpoint(_layer)(jax.tree.map(lambda p: p.astype(dtype), layer), x)
    x = _norm(x, params["norm"])
    return jnp.matmul(x, token.T, preferred_element_type=jnp.float32)


def _layer(layer: Any, x: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    y = _norm(x, layer["norm1"])
    heads = [
        (y @ layer[name]).reshape(batch, length, -1, min(HEAD, width))
        for name in ("query", "key", "value")
    ]
    mixed = jax.nn.dot_product_attention(*heads, is_causal=True)
    x = x + mixed.reshape(x.shape) @ layer["out"]
    y = jax.nn.gelu(
        _norm(x, layer["norm2"]) @ layer["up"] + layer["up_bias"][None, None]
    )
    return x + y @ layer["down"] + layer["down_bias"][None, None]


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return (wide * scale[None, None]).astype(x.dtype)


def begin(like: Any, seed: int = 0) -> Any:
    """Parameters: norms one, biases zero, kernels of GPT-2's deviation or less."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def draw(key: jax.Array, leaf: Any) -> jax.Array:
        scale = min(0.02, 1 / math.sqrt(leaf.shape[0]))
        return scale * jax.random.normal(key, leaf.shape, leaf.dtype)

    drawn = [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(treedef, drawn)
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.ones_like(p) if "norm" in path[-1].key else p, params
    )
