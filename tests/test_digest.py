"""One number for an array: on any mesh, on devices and host, and of its every bit."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from shampoo_optax import checkpoint
from shampoo_optax.checkpoint.digest import digests
from tests import helpers

SHAPES = [(), (1,), (5,), (64,), (3, 7), (8, 6), (8, 16, 4), (4, 5, 3), (2, 3, 4, 5)]
# Of one row and of one column, and of more words than are looked at in one go.
SHAPES += [(8, 1), (7, 1, 1), (1000, 257), (1 << 18 | 1,)]
DTYPES = ["float32", "bfloat16", "int8", "uint16", "int32", "bool", "complex64"]


def _literal(array: np.ndarray) -> int:
    """The definition, word by word."""
    size = 1 if array.dtype == bool else array.dtype.itemsize
    words = np.frombuffer(array.tobytes(), f"u{min(size, 4)}").tolist()
    return sum((i * 2654435761 | 1) * word for i, word in enumerate(words)) % 2**32


def _array(shape: tuple[int, ...], dtype: str) -> jax.Array:
    raw = np.random.default_rng(len(shape)).normal(size=shape) * 50
    return jnp.asarray(raw).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_host_and_devices_know_one_number(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES if math.prod(shape) < 1e4 else ["float32"]:
        array = _array(shape, dtype)
        wanted = _literal(np.asarray(array))
        assert int(checkpoint.digest(array)) == wanted
        assert digests([array, np.asarray(array)]) == [wanted, wanted]


@pytest.mark.parametrize("spec", [("a",), (None, "b"), ("b", "a"), (("a", "b"),)])
@pytest.mark.parametrize("shape", [(16, 24), (8, 8, 3), (24, 16, 5, 1)], ids=str)
def test_the_digest_is_the_same_on_every_mesh(
    shape: tuple[int, ...], spec: tuple[Any, ...]
) -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)
    array = helpers.gradients(jnp.zeros(shape))
    spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    wanted = _literal(np.asarray(array))
    assert int(checkpoint.digest(spread)) == wanted
    assert digests(spread) == [wanted]


def test_every_bit_of_every_dtype_is_in_the_digest() -> None:
    for dtype in ("float32", "bfloat16", "float16", "int8", "uint32", "int32"):
        array = jnp.asarray(np.random.default_rng(0).integers(0, 99, (3, 5)), dtype)
        clean, raw = int(checkpoint.digest(array)), np.asarray(array)
        for bit in range(raw.nbytes * 8):
            broken = bytearray(raw.tobytes())
            broken[bit // 8] ^= 1 << bit % 8
            other = np.frombuffer(bytes(broken), raw.dtype).reshape(raw.shape)
            assert int(checkpoint.digest(jnp.asarray(other))) != clean
            assert digests(other) != [clean]
