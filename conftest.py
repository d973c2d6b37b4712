"""Settings that must stand before JAX starts: the CPU, eight devices, one thread.

LAPACK on several fake devices with several threads each is hundreds of times slower
than with one.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict) -> None:
    """Names that examples in docstrings use without an import."""
    import jax.numpy as jnp
    import optax

    import shampoo_optax as so

    names = {name: getattr(so, name) for name in dir(so) if not name.startswith("_")}
    doctest_namespace.update(names, so=so, jax=jax, jnp=jnp, optax=optax)
