"""The models whose shapes are measured, as trees of ``jax.ShapeDtypeStruct``."""

from __future__ import annotations

import itertools
import random as random_sides
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]
Tree = dict[str, Any]


def mlp(width: int = 1024) -> Tree:
    """784 - width - width - 10, with biases."""
    sizes = [784, width, width, 10]
    layers = itertools.pairwise(sizes)
    return _arrays(
        {f"{i}": {"kernel": (m, n), "bias": (n,)} for i, (m, n) in enumerate(layers)}
    )


def convnet(widths: tuple[int, ...] = (64, 128, 256), convolutions: int = 4) -> Tree:
    """A small ResNet: 3x3 kernels, 1x1 projections, scales and biases, a head."""
    model: dict[str, Any] = {"stem": {"kernel": (3, 3, 3, widths[0])}}
    before = widths[0]
    for stage, width in enumerate(widths):
        for i in range(convolutions):
            model[f"stage{stage}_{i}"] = {
                "kernel": (3, 3, before, width),
                "scale": (width,),
                "bias": (width,),
            }
            if before != width:
                model[f"projection{stage}"] = {"kernel": (1, 1, before, width)}
            before = width
    model["head"] = {"kernel": (before, 10), "bias": (10,)}
    return _arrays(model)


def transformer(layers: int = 6, width: int = 384, vocabulary: int = 256) -> Tree:
    """A GPT: attention and MLP kernels, norms, two embeddings; 11 million by default.

    Every layer has its own arrays, as Flax makes them without ``scan``.
    """
    model: dict[str, Any] = {
        "token": (vocabulary, width),
        "position": (256, width),
        "norm": (width,),
    }
    for i in range(layers):
        model[f"layer{i}"] = {
            **{name: (width, width) for name in ("query", "key", "value", "out")},
            "up": (width, 4 * width),
            "down": (4 * width, width),
            "up_bias": (4 * width,),
            "down_bias": (width,),
            "norm1": (width,),
            "norm2": (width,),
        }
    return _arrays(model)


def llama(
    layers: int = 16, width: int = 2048, hidden: int = 5632, vocabulary: int = 32000
) -> Tree:
    """A Llama-like model: attention, gated MLPs, embedding and head; 953 million."""
    layer: dict[str, Shape] = {
        **{name: (width, width) for name in ("query", "key", "value", "out")},
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
        "norm1": (width,),
        "norm2": (width,),
    }
    model: dict[str, Any] = {f"layer{i}": layer for i in range(layers)}
    ends = {"token": (vocabulary, width), "head": (width, vocabulary)}
    return _arrays({**model, **ends, "norm": (width,)})


def small(each: int = 100) -> Tree:
    """Many small matrices: ``each`` of 32x32 and of 64x16."""
    square = {f"a{i:03}": (32, 32) for i in range(each)}
    return _arrays({**square, **{f"b{i:03}": (64, 16) for i in range(each)}})


def varied(arrays: int = 200, sides: int = 132, smallest: int = 8) -> Tree:
    """Small matrices of nearly as many shapes, with ``sides`` different sides."""
    order = [smallest + i % sides for i in range(2 * arrays)]
    random_sides.Random(0).shuffle(order)
    pairs = zip(order[::2], order[1::2], strict=True)
    return _arrays({f"a{i:03}": pair for i, pair in enumerate(pairs)})


def stack(layers: int, *, stacked: bool, width: int = 128) -> Tree:
    """The model of the compile benchmark: three kernels and a bias a layer.

    ``stacked`` puts the layers on a leading axis, as a scanned model does;
    otherwise each layer has arrays of its own.
    """
    layer: dict[str, Shape] = {
        "attention": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
        "bias": (4 * width,),
    }
    if stacked:
        return _arrays({name: (layers, *shape) for name, shape in layer.items()})
    return _arrays({f"layer{i:03}": layer for i in range(layers)})


def _arrays(model: dict[str, Any]) -> Tree:
    def array(shape: Shape) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return jax.tree.map(array, model, is_leaf=lambda x: isinstance(x, tuple))


def number(tree: Tree) -> int:
    """How many parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def random(tree: Tree, seed: int) -> Tree:
    """Normal numbers of those shapes."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [
        jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)
