"""Settings that must stand before JAX starts: the CPU, eight devices, one thread.

LAPACK on several fake devices with several threads each is hundreds of times slower
than with one.

XLA compiles each program once a run: where JAX forgets one (another flag, a new
function of the same meaning, another process) it is read back from a folder that ends
with the run.
"""

import gc
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# XLA ends the process where eight devices do not meet within 40 s, which eight threads
# on a busy machine of two cores once did not.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first process of a run makes the folder; its workers and programs find it here.
FIRST = "SHAMPOO_OPTAX_PROGRAMS" not in os.environ
if FIRST:
    folder = tempfile.mkdtemp(prefix="shampoo_optax_programs_")
    os.environ["SHAMPOO_OPTAX_PROGRAMS"] = folder
PROGRAMS = os.environ["SHAMPOO_OPTAX_PROGRAMS"]
for name, value in {
    "jax_compilation_cache_dir": PROGRAMS,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


# Files that take longest, in their order. `make test` hands whole files to its
# processes: one compiles what a file shares, and a long file must not be the last.
LONGEST = """
int8 lean view sharded optax_suites parity checkpoint kill minimax exponents flags
examples migrate stacks reblock pods gpu_benchmark laws layout processes family
switch_example flax_sharded parameters routing staggered roots
"""
RANKS = {f"test_{name}": rank for rank, name in enumerate(LONGEST.split())}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, and every file's tests in their order."""
    items.sort(key=lambda item: RANKS.get(item.path.stem, len(RANKS)))


def pytest_collection_finish() -> None:
    """What was imported stays to the end: Python need not search it for garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Remove the folder of programs."""
    if FIRST:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict) -> None:
    """Names that examples in docstrings use without an import."""
    import jax.numpy as jnp
    import optax

    import shampoo_optax as so
    from shampoo_optax import checkpoint

    names = {name: getattr(so, name) for name in dir(so) if not name.startswith("_")}
    names |= {"so": so, "jax": jax, "jnp": jnp, "optax": optax}
    doctest_namespace.update(names, checkpoint=checkpoint)
