"""What a GPU would run: programs compiled for an H200 that is not here.

Of the roots of 16 matrices of 1024 x 1024, by XLA's products and by the kernels of
`benchmarks/fused.py`: launches in all and in one step of the iteration, passes over
whole stacks that are no products, temporaries; and what the assembler says of each of
our kernels. Nothing runs, and XLA chooses products without trying them.

Needs jaxlib's CUDA plugin and an assembler, which ``make gpu-compile`` brings.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

# What XLA would ask a GPU: of NVIDIA's data sheet, and of CUDA's tables for 9.0.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H200"
"""
NUMBER, SIZE = 16, 1024
FOLDER = "SHAMPOO_OPTAX_DUMP"


def compile_(name: str) -> dict[str, Any]:
    """Compile one method, in a process whose XLA writes its programs to a folder."""
    import jax
    import jax.numpy as jnp
    from jax._src import xla_bridge
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.fused import Fused
    from shampoo_optax.linalg import roots

    methods = {"XLA": roots.Minimax(precision="fp16x3"), "own kernels": Fused()}
    # JAX resolves "gpu" among the platforms that are here; none is.
    here = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda name: (
        "cuda" if name == "gpu" else here(name)
    )
    described = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology="1x1x1"
    )
    mesh = topologies.make_mesh(described, (1,), ("x",))
    stack = jax.ShapeDtypeStruct(
        (NUMBER, SIZE, SIZE), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    solve = partial(roots.inverse_root, methods[name], p=4, eps_rel=1e-6)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(solve).trace(stack).lower(lowering_platforms=("cuda",))
    memory = lowered.compile().memory_analysis()
    folder = Path(os.environ[FOLDER])
    (thunks,) = folder.glob("*.thunk_sequence.txt")
    found = launches(thunks.read_text())
    found["temporaries, MB"] = round(memory.temp_size_in_bytes / 1e6)
    found["kernels"] = {
        kernel: assembled(path)
        for path in sorted(folder.glob("*.ptx"))
        for kernel in re.findall(r"\.entry (product|quadratic)\b", path.read_text())
    }
    return found


def launches(thunks: str) -> dict[str, Any]:
    """Counts from XLA's list of what it launches, a line each, indented in loops.

    Example:
      >>> launches('''001: kCustomKernel [a] fusion grid: [1, 1, 1] threads
      ... 002: kWhile [a]
      ...   body:
      ...     003: kCustomKernel [a] product grid: [36, 16, 1] threads
      ...     004: kCopy [a] kCopy''')
      {'launches': 3, 'in a step': 2, 'of them products': 1, 'passes over a stack': 1}
    """
    lines = re.findall(r"^ *\d+: k(?:CustomKernel|Copy|Gemm).*$", thunks, re.M)
    loops = re.split(r"^\d+: kWhile.*$", thunks, flags=re.M)[1:]
    # The steps are the longest loop.
    step = max((re.findall(r"^ +\d+: k(?!While).*$", x, re.M) for x in loops), key=len)
    products = [x for x in step if re.search(r"gemm| (product|quadratic) ", x)]
    large = [x for x in step if re.search(r"kCopy\s+\[|grid: \[\d{4,}", x)]
    return {
        "launches": len(lines),
        "in a step": len(step),
        "of them products": len(products),
        "passes over a stack": len(set(large) - set(products)),
    }


def assembled(path: Path) -> str:
    """Registers and spills, in the assembler's words."""
    import nvidia.cuda_nvcc

    ptxas = Path(next(iter(nvidia.cuda_nvcc.__path__))) / "bin" / "ptxas"
    command = [ptxas, "-v", "-arch=sm_90a", path, "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    told = re.findall(r"Used \d+ registers|\d+ bytes spill stores|serialized", said)
    return ", ".join(told)


def main() -> int:
    """One process a program: XLA reads where to write when it starts."""
    if len(sys.argv) > 1:
        print(json.dumps(compile_(sys.argv[1])))
        return 0
    for name in ("XLA", "own kernels"):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                FOLDER: folder,
                "XLA_FLAGS": f"--xla_dump_to={folder}",
                "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
                "TF_CPP_MIN_LOG_LEVEL": "3",
            }
            command = [sys.executable, "-m", "benchmarks.gpu_compile", name]
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
        print(name, json.dumps(json.loads(done.stdout), indent=1), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
