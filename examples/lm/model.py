"""A small decoder-only transformer in Flax NNX."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Shape(NamedTuple):
    """The sizes of a decoder; every kernel in it is a matrix."""

    vocabulary: int = 256
    context: int = 64
    width: int = 128
    heads: int = 4
    layers: int = 3
    hidden: int = 256


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        def linear() -> nnx.Linear:
            return nnx.Linear(shape.width, shape.width, use_bias=False, rngs=rngs)

        # Four kernels, not one fused: Shampoo's factors then know each of them alone.
        self.query, self.key, self.value, self.out = (linear() for _ in range(4))
        self.heads = shape.heads

    def __call__(self, x: jax.Array) -> jax.Array:
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.reshape(x.shape))


class Layer(nnx.Module):
    """Attention and a two-layer perceptron, each behind a norm and a skip."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(shape.width, rngs=rngs)
        self.attention = Attention(shape, rngs=rngs)
        self.norm2 = nnx.RMSNorm(shape.width, rngs=rngs)
        self.up = nnx.Linear(shape.width, shape.hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(shape.hidden, shape.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        self.token = nnx.Embed(shape.vocabulary, shape.width, rngs=rngs)
        self.position = nnx.Embed(shape.context, shape.width, rngs=rngs)
        self.layers = nnx.List([Layer(shape, rngs=rngs) for _ in range(shape.layers)])
        self.norm = nnx.RMSNorm(shape.width, rngs=rngs)
        self.head = nnx.Linear(shape.width, shape.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        places = jnp.arange(tokens.shape[-1])[None]
        x = self.token(tokens) + self.position(places)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
