"""One accelerator, in under ten minutes: roots, the optimizer's step, a training step.

- roots: batched eigendecompositions against minimax quadratics, in each precision, and
  coupled Newton, of as many matrices as make 64 MB;
- bases: SOAP's, by each method from the basis of a matrix nearby, of as many;
- step: `update` on one eighth of the blocks of a Llama-like model of 953 million
  parameters, blocks of 1024: a device's share among eight, with frequency 1, and 10
  staggered, beside AdamW on as many parameters. *Fast*: roots with
  `precision="fp16x3"`, all other products with `precision="tf32"`; *own kernels*: the
  same with those of `benchmarks/fused.py`;
- training: a GPT of 124 million parameters on 64 x 1024 tokens in bfloat16, with AdamW
  and with Shampoo at frequency 10, staggered.

Programs run in batches with one wait at the end of each, so the host is not measured;
medians of the batches, after one of warm-up. `--quick` runs it all on a CPU, tiny.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shampoo_optax as so
from benchmarks import common, gpt, shapes
from benchmarks.bases import METHODS as BASES
from benchmarks.fused import TILE, Fused
from shampoo_optax.linalg import bases, roots

METHODS: dict[str, Any] = {
    "eigh float64": roots.Eigh(),
    "eigh float32": roots.Eigh(double_precision=False),
    "minimax": roots.Minimax(),
    "minimax, all float32": roots.Minimax(double_first_step=False),
    "minimax fp16x3": roots.Minimax(precision="fp16x3"),
    "minimax, own kernels": Fused(),
    "minimax fp16x3, no float64": roots.Minimax(
        precision="fp16x3", double_first_step=False
    ),
    "minimax bf16x3": roots.Minimax(precision="bf16x3"),
    "minimax tf32x3": roots.Minimax(precision="tf32x3"),
    "coupled Newton": roots.CoupledNewton(tolerance=1e-3),
}


FAST = {
    "root": roots.Auto(accelerator=roots.Minimax(precision="fp16x3")),
    "precision": "tf32",
}
OURS = FAST | {"root": roots.Auto(accelerator=Fused())}
PARTS = ("step", "training", "roots", "bases")
# No measurement takes longer than this, in seconds, but for one batch and its warm-up.
PATIENCE = 3.0


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    roots: tuple[int, ...] = (1024, 512, 2048, 256)
    root_bytes: int = 2**26
    llama: tuple[int, int, int, int] = (16, 2048, 5632, 32000)
    block: int = 1024
    share: int = 8
    gpt: tuple[int, int, int] = (12, 768, 50304)
    tokens: tuple[int, int] = (64, 1024)
    rounds: int = 5
    batch: int = 10  # steps in a round: a whole period


QUICK = Sizes(
    roots=(16,),
    root_bytes=2**11,
    llama=(1, 32, 48, 64),
    block=16,
    share=2,
    gpt=(1, 32, 64),
    tokens=(2, 16),
    rounds=1,
    batch=2,
)


def milliseconds(step: Callable[[], Any], rounds: int, batch: int) -> float:
    """Of one call, from batches that are waited for as a whole."""
    found: list[float] = []
    while len(found) < rounds + 1 and not (len(found) > 1 and sum(found) > PATIENCE):
        begin = time.perf_counter()
        for _ in range(batch):
            last = step()
        jax.block_until_ready(last)
        found.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(found[1:]) / batch


def say(what: str, ms: float) -> None:
    """Progress, for one who waits."""
    print(f"  {what}: {ms:.2f} ms", file=sys.stderr, flush=True)


def of_roots(sizes: Sizes) -> list[dict[str, Any]]:
    """Time for a batch, and the error of its first matrix, of every method and size."""
    rows = []
    for n in sizes.roots:
        number = max(1, sizes.root_bytes // (4 * n * n))
        rng = np.random.default_rng(n)
        basis, _ = np.linalg.qr(rng.normal(size=(n, n)))
        one = ((basis * 10 ** rng.uniform(-9, 0, n)) @ basis.T).astype(np.float32)
        one = 0.5 * (one + one.T)
        w, v = np.linalg.eigh(one.astype(np.float64))
        exact = (v * (np.maximum(w, 0) + 1e-6 * w[-1]) ** -0.25) @ v.T
        batch = jnp.asarray(np.broadcast_to(one, (number, n, n)))
        for name, method in METHODS.items():
            solve = jax.jit(partial(roots.inverse_root, method, p=4, eps_rel=1e-6))
            try:
                error = np.linalg.norm(solve(batch).root[0] - exact)
                ms = milliseconds(partial(solve, batch), sizes.rounds, 2)
            except Exception as refusal:  # a library or compiler that cannot
                rows.append({"n": n, "method": name, "refused": str(refusal)[:200]})
                continue
            error = float(error / np.linalg.norm(exact))
            row = {"n": n, "method": name, "matrices": number, "ms": ms}
            rows.append({**row, "root_error": error})
            say(f"{n} {name}", ms)
    return rows


def of_bases(sizes: Sizes) -> list[dict[str, Any]]:
    """Time for a batch of every method and size, from a basis in use."""
    rows = []
    for n in sizes.roots:
        number = max(1, sizes.root_bytes // (4 * n * n))
        rng = np.random.default_rng(n)
        basis, _ = np.linalg.qr(rng.normal(size=(n, n)))
        matrix = (basis * np.geomspace(1, 1e-6, n)) @ basis.T
        near, _ = np.linalg.qr(basis + 0.01 * rng.normal(size=(n, n)) / np.sqrt(n))
        near = near * np.sign(np.sum(near * basis, axis=0))
        one, old = (
            jnp.asarray(np.broadcast_to(x, (number, n, n)), jnp.float32)
            for x in (matrix, near)
        )
        for name, method in BASES.items():
            solve = jax.jit(partial(bases.new_basis, method))
            try:
                ms = milliseconds(partial(solve, one, old), sizes.rounds, 2)
            except Exception as refusal:  # a library or compiler that cannot
                rows.append({"n": n, "method": name, "refused": str(refusal)[:200]})
                continue
            rows.append({"n": n, "method": name, "matrices": number, "ms": ms})
            say(f"{n} {name}", ms)
    return rows


class Run:
    """An optimizer on parameters, whose steps take each other's results."""

    def __init__(self, tx: Any, params: Any, gradient: Callable[[Any], Any]) -> None:
        self.params = jax.tree.map(jnp.array, params)  # a copy, to be given away
        self.state = jax.jit(tx.init)(params)

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(gradient(params), state, params)
            return optax.apply_updates(params, updates), state

        self._step = step

    def __call__(self) -> Any:
        self.params, self.state = self._step(self.params, self.state)
        return self.params


def _shampoo(layout: so.BlockLayout, frequency: int, **options: Any) -> Any:
    refresh = so.Refresh(frequency, 1, staggered=frequency > 1)
    return so.shampoo(1e-4, layout=layout, refresh=refresh, **options)


def _different(contenders: dict[str, Any], sizes: Sizes) -> list[tuple[str, Any]]:
    """Without our own kernels where blocks are smaller than their tiles."""
    ours = sizes.block % TILE == 0
    return [(k, v) for k, v in contenders.items() if ours or "own kernels" not in k]


def share_of(stacks: dict[str, Any], share: int) -> dict[str, tuple[int, ...]]:
    """One of ``share`` equal parts of all blocks, those cut that are fewer."""
    shapes = {}
    for key, (number, *sides) in stacks.items():
        if number < share:
            longest = sides.index(max(sides))
            sides[longest] = -(-number * sides[longest] // share)
        shapes[key] = (-(-number // share), *sides)
    return shapes


def of_steps(sizes: Sizes) -> dict[str, float]:
    """A device's share of the blocks of a large model, in milliseconds a step."""
    layout = so.BlockLayout(sizes.block, batch_axes=lambda *_: 1)
    like = jax.tree.leaves(shapes.llama(*sizes.llama))
    names = [str(i) for i in range(len(like))]
    plan = so.BlockLayout(sizes.block).plan(names, [leaf.shape for leaf in like])
    key = jax.random.key(0)
    params = {
        name: jax.random.normal(key, shape)
        for name, shape in share_of(plan.stacks, sizes.share).items()
    }
    found: dict[str, float] = {}
    contenders = {
        "adamw": optax.adamw(1e-4),
        "shampoo, frequency 1": _shampoo(layout, 1),
        "shampoo, frequency 10": _shampoo(layout, 10),
        "shampoo, fast, frequency 1": _shampoo(layout, 1, **FAST),
        "shampoo, fast, frequency 10": _shampoo(layout, 10, **FAST),
        "shampoo, own kernels, frequency 1": _shampoo(layout, 1, **OURS),
        "shampoo, own kernels, frequency 10": _shampoo(layout, 10, **OURS),
    }
    for name, tx in _different(contenders, sizes):
        run = Run(tx, params, lambda params: params)
        found[name] = milliseconds(run, sizes.rounds, sizes.batch)
        say(name, found[name])
        del run
    found["parameters"] = sum(x.size for x in params.values())
    return found


def of_training(sizes: Sizes) -> dict[str, float]:
    """A GPT's training step, in milliseconds."""
    layers, width, vocabulary = sizes.gpt
    like = shapes.transformer(layers, width, vocabulary)
    like["position"] = jax.ShapeDtypeStruct((sizes.tokens[1], width), jnp.float32)
    params = gpt.begin(like)
    tokens = jax.random.randint(jax.random.key(1), sizes.tokens, 0, vocabulary)
    gradient = jax.grad(lambda params: gpt.loss(params, tokens))
    layout = so.BlockLayout(sizes.block)
    found = {}
    contenders = {
        "adamw": optax.adamw(1e-4),
        "shampoo": _shampoo(layout, 10),
        "shampoo, fast": _shampoo(layout, 10, **FAST),
        "shampoo, own kernels": _shampoo(layout, 10, **OURS),
    }
    for name, tx in _different(contenders, sizes):
        run = Run(tx, params, gradient)
        found[name] = milliseconds(run, sizes.rounds, sizes.batch)
        say(name, found[name])
        del run
    found["parameters"] = shapes.number(like)
    return found


def show(part: str, found: Any) -> str:
    """The table of a part."""
    if part in ("roots", "bases"):
        names = ["matrices", "ms", "root_error"][: 3 if part == "roots" else 2]
        rows = [
            [f"{r['n']} {r['method']}"]
            + [
                f"{r[n]:.1e}" if n == "root_error" and n in r else r.get(n)
                for n in names
            ]
            for r in found
        ]
        title = {"roots": "Inverse fourth roots, eps_rel 1e-6", "bases": "Eigenbases"}
        return f"{title[part]}\n{common.table(['n, method', *names], rows)}"
    lines = {k: v for k, v in found.items() if k != "parameters"}
    rows = [[name, ms, ms / lines["adamw"]] for name, ms in lines.items()]
    table = common.table(["optimizer", "ms", "x adamw"], rows)
    title = {"step": "update alone", "training": "training step"}[part]
    return f"The {title}, {found['parameters'] / 1e6:.1f} million parameters\n{table}"


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables, write the JSON after each."""
    parser = common.arguments(__doc__ or "", "gpu")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else Sizes()
    env = common.environment()
    print(common.heading(env))
    results: dict[str, Any] = {"environment": env}
    measures = {"step": of_steps, "training": of_training}
    for part in args.parts:
        if part in ("roots", "bases"):
            results[part] = []
            measure = of_roots if part == "roots" else of_bases
            for n in sizes.roots:
                results[part] += measure(replace(sizes, roots=(n,)))
                common.save(args, "gpu", results)
        else:
            results[part] = measures[part](sizes)
            common.save(args, "gpu", results)
        print(f"\n{show(part, results[part])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
