"""What a pod would send, hold and compile: ahead of time, for TPUs that are not here.

The optimizer's whole ``update``, roots and their refresh included, is compiled for a
TPU topology from shapes alone; nothing runs. Reported of one device and one step:

- state: bytes over the ideal, an equal share of the state of all blocks;
- wire: bytes received over the ideal (a device's shard of the gradient sent to its
  owners and the updates sent back, in float32) and over what FSDP with Adam receives
  (gradients reduced in float32, parameters gathered twice in bfloat16);
- temporaries over the two exchange buffers, collectives by kind, instructions, and the
  CPU seconds of the compiler.

Needs libtpu (``make pods`` brings it) and one process per program.
"""

from __future__ import annotations

import collections
import json
import math
import os
import subprocess
import sys
import time
from typing import Any

# A topology is described without a TPU; libtpu would ask the cloud for one.
os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_optax as so
from benchmarks import common, hlo
from shampoo_optax.layout.split import join, split

WIDTH = {"1.3B": (2048, 5504, 24), "7B": (4096, 11008, 32)}
VOCABULARY = 32000
POD, SLICE = {"topology": "v5e:16x16"}, {"topology": "v5e:4x4", "fsdp": 16}
GROWTH = SLICE | {"model": "1.3B", "shrink": 8, "block": 128, "merge": False}
CASES: dict[str, dict[str, Any]] = {
    "fsdp-256": POD | {"fsdp": 256, "model": "1.3B"},
    "fsdp-16": SLICE | {"model": "1.3B"},
    # The same, block by block: the least memory.
    "fsdp-16-one-by-one": SLICE | {"model": "1.3B", "deterministic": True},
    "hsdp-16x16": POD | {"data": 16, "fsdp": 16, "model": "1.3B"},
    "7B-256": POD | {"fsdp": 256, "model": "7B"},
    "naive-16": SLICE | {"model": "1.3B", "layers": 4, "naive": True},
    # Growth with layers; the planner would make other stacks of twelve than of 96. An
    # array for each layer at an eighth of the width, where the compiler is quicker.
    "stacked-12": SLICE | {"model": "1.3B", "merge": False, "layers": 12},
    "stacked-96": SLICE | {"model": "1.3B", "merge": False, "layers": 96},
    "per-layer-12": GROWTH | {"layers": 12, "stacked": False},
    "per-layer-96": GROWTH | {"layers": 96, "stacked": False},
    "root-1024": SLICE | {"root": 1024},
}


def model(
    name: str, layers: int | None, stacked: bool, shrink: int = 1
) -> tuple[dict[str, tuple[int, ...]], dict[str, P]]:
    """Shapes of a Llama-like decoder, sharded along the width as FSDP does it."""
    width, hidden, depth = WIDTH[name]
    width, hidden, vocabulary = width // shrink, hidden // shrink, VOCABULARY // shrink
    depth = layers or depth
    square = dict.fromkeys(("wq", "wk", "wv", "wo"), (width, width))
    kernels = square | {
        "wg": (width, hidden),
        "wu": (width, hidden),
        "wd": (hidden, width),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    if stacked:
        shapes = {f"layers/{n}": (depth, *shape) for n, shape in kernels.items()}
    else:
        for i in range(depth):
            shapes |= {f"layer{i}/{n}": shape for n, shape in kernels.items()}
    shapes |= {"embed": (vocabulary, width), "head": (width, vocabulary)}
    specs = {}
    for n, shape in shapes.items():
        dim = len(shape) - 1 if n.endswith("wd") or n == "embed" else len(shape) - 2
        specs[n] = P(*("fsdp" if i == dim else None for i in range(len(shape))))
    return shapes, specs


def batch_axes(path: str, shape: tuple[int, ...]) -> int:
    """The layers of a scanned model are arrays of their own."""
    return 1 if path.startswith("layers/") else 0


def pod(topology: str, **axes: int) -> Mesh:
    """A mesh of TPUs that are described, not there."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return Mesh(np.array(found.devices).reshape(*axes.values()), tuple(axes))


def measure(
    *,
    topology: str,
    fsdp: int,
    model_: str,
    data: int = 1,
    layers: int | None = None,
    stacked: bool = True,
    naive: bool = False,
    block: int = 1024,
    shrink: int = 1,
    merge: bool = True,
    deterministic: bool = False,
) -> dict[str, Any]:
    """Compile one case, and read the program."""
    mesh = pod(topology, data=data, fsdp=fsdp)
    shapes, specs = model(model_, layers, stacked, shrink)
    layout = so.BlockLayout(
        block,
        one_sided_above=math.inf,
        batch_axes=batch_axes,
        mesh=mesh,
        block_axes=("fsdp",) if data == 1 else ("data", "fsdp"),
        param_specs=specs,
        merge_stacks=merge,
        deterministic=deterministic,
    )
    tx = so.scale_by_shampoo(layout=layout, root=so.roots.CoupledNewton())
    params = {
        n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, specs[n]))
        for n, s in shapes.items()
    }
    where = so.state_shardings(tx, params, layout)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        where,
    )
    plain = so.BlockLayout(block, one_sided_above=math.inf, batch_axes=batch_axes)
    update, held = tx.update, state
    if naive:
        update, held = _naive(params, plain, mesh)
    before, clock = time.process_time(), time.perf_counter()
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, held)
    program = lowered.compile()
    cpu, wall = time.process_time() - before, time.perf_counter() - clock
    text = program.as_text()
    whole = jax.eval_shape(so.scale_by_shampoo(layout=plain).init, params)
    size = sum(math.prod(shape) for shape in shapes.values())
    return _figures(
        text,
        program.memory_analysis(),
        state=state,
        ideal=_bytes(whole) / (data * fsdp),
        size=size,
        devices=data * fsdp,
        shards=fsdp,
        parts=min(fsdp, block * fsdp * shrink // WIDTH[model_][0]),
    ) | {
        "parameters": size,
        "pools": len(jax.tree.leaves(state.blocks.mu)),
        "stablehlo_kB": len(lowered.as_text()) / 1e3,
        "cpu_s": cpu,
        "wall_s": wall,
    }


def measure_root(*, topology: str, fsdp: int, root: int) -> dict[str, Any]:
    """Compile the inverse fourth root of one matrix on each device."""
    mesh = pod(topology, fsdp=fsdp)
    spread = NamedSharding(mesh, P("fsdp"))
    matrices = jax.ShapeDtypeStruct((fsdp, root, root), jnp.float32, sharding=spread)

    def solve(matrices: jax.Array) -> Any:
        return so.roots.inverse_root(so.roots.CoupledNewton(), matrices, 4)

    local = jax.shard_map(solve, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
    lowered = jax.jit(local).lower(matrices)
    before = time.process_time()
    text = lowered.compile().as_text()
    return {
        "cpu_s": time.process_time() - before,
        "instructions": hlo.lines(text),
        "eigh_calls": text.count("Eigh"),
        "collectives": {one.kind: 1 for one in hlo.collectives(text)},
    }


def _naive(
    params: dict[str, Any], plain: so.BlockLayout, mesh: Mesh
) -> tuple[Any, dict[str, Any]]:
    """The negative control: blocks are cut, concatenated, and told where they lie.

    The obvious form compiles and is right; a moving average of the blocks stands for
    the optimizer. What it sends is what counts.
    """
    shapes = [x.shape for x in params.values()]
    plan = plain.plan(list(params), shapes)
    spread = NamedSharding(mesh, P("fsdp"))
    padded = {
        key: (-(-shape[0] // mesh.shape["fsdp"]) * mesh.shape["fsdp"], *shape[1:])
        for key, shape in plan.stacks.items()
    }

    def update(gradients: dict[str, Any], state: dict[str, Any]) -> Any:
        leaves = {i: gradients[name] for i, name in enumerate(params)}
        stacks = split(leaves, plan)
        for key, stack in stacks.items():
            dead = padded[key][0] - len(stack)
            stack = jnp.pad(stack, [(0, dead)] + [(0, 0)] * (stack.ndim - 1))
            stack = jax.lax.with_sharding_constraint(stack, spread)
            state[key] = 0.9 * state[key] + 0.1 * stack
        blocks = {key: state[key][: plan.stacks[key][0]] for key in state}
        joined = join(blocks, plan, [x.dtype for x in leaves.values()])
        updates = {
            name: jax.lax.with_sharding_constraint(joined[i], params[name].sharding)
            for i, name in enumerate(params)
        }
        return updates, state

    state = {
        key: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=spread)
        for key, shape in padded.items()
    }
    return update, state


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _figures(
    text: str,
    memory: Any,
    *,
    state: Any,
    ideal: float,
    size: int,
    devices: int,
    shards: int,
    parts: int,
) -> dict[str, Any]:
    sent = hlo.collectives(text)
    wire = sum(one.wire for one in sent)
    shard = 4 * size / shards
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    # What an owner lacks of its blocks comes in and goes out; among copies of a shard
    # the updates are gathered.
    share = shard * shards / devices
    buffers = share + (share if shards == devices else shard)
    least = 2 * share * (1 - 1 / parts) + (shard - share)
    adam = 4 * size + 2 * 2 * size
    kinds = collections.Counter(f"{one.kind}/{one.group}" for one in sent)
    return {
        "state_MB": held / 1e6,
        "state_over_ideal": held / ideal,
        "wire_MB": wire / 1e6,
        "wire_over_ideal": wire / least,
        "wire_over_fsdp_adam": wire / adam,
        "temporaries_MB": memory.temp_size_in_bytes / 1e6,
        "temporaries_over_exchange": memory.temp_size_in_bytes / buffers,
        "collectives": dict(kinds),
        "largest_all_reduce": max(
            (one.payload for one in sent if one.kind == "all-reduce"), default=0
        ),
        "inside_loop_or_branch": sum(one.inside for one in sent),
        "instructions": hlo.lines(text),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure every case in a process of its own, print the table, write the JSON."""
    parser = common.arguments(__doc__ or "", "pods")
    parser.add_argument("--case", choices=CASES, action="append", help="only these")
    parser.add_argument("--one", help="a case as JSON: measure it here, print JSON")
    args = parser.parse_args(argv)
    if args.one:
        case = json.loads(args.one)
        if "root" in case:
            print(json.dumps(measure_root(**case)))
        else:
            print(json.dumps(measure(model_=case.pop("model"), **case)))
        return 0
    path = args.out or common.RESULTS / "tpu-aot" / "pods.json"
    keep = bool(args.out) or not args.quick
    results: dict[str, Any] = {}
    failed = 0
    if args.case and keep and path.exists():  # the others stay as they were
        results = json.loads(path.read_text())
    for name in args.case or CASES:
        case = dict(CASES[name])
        if args.quick and "root" in case:
            case["root"] = 64
        elif args.quick:
            case |= {
                "shrink": 16,
                "block": 64,
                "layers": min(case.get("layers") or 2, 2),
            }
        command = [sys.executable, "-m", "benchmarks.pods", "--one", json.dumps(case)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            print(f"{name}: {run.stderr.strip().splitlines()[-1:]}")
            failed = 1
            continue
        results[name] = case | json.loads(run.stdout.splitlines()[-1])
        print(f"{name}: {results[name]}", flush=True)
        if keep:  # each as it comes: all of them take half an hour
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(_table(results))
    return failed


COLUMNS = {
    "state_over_ideal": "state / ideal",
    "wire_MB": "wire MB",
    "wire_over_ideal": "wire / ideal",
    "wire_over_fsdp_adam": "wire / FSDP Adam",
    "temporaries_over_exchange": "temp / exchange",
    "instructions": "instructions",
    "cpu_s": "compile CPU s",
}


def _table(results: dict[str, Any]) -> str:
    rows = [
        [name, *(found.get(column) for column in COLUMNS), str(found["collectives"])]
        for name, found in results.items()
    ]
    return common.table(["case", *COLUMNS.values(), "collectives"], rows)


if __name__ == "__main__":
    sys.exit(main())
