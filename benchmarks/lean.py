"""What a lean state costs: bytes a parameter, and the loss of examples/train_lm.py.

Every setting of ``so.StateDtypes`` trains the examples' language model with their
recipe (rate, schedule, clip, batches), three seeds of it; SOAP, at its rate of
``make convergence``, with everything lean or nothing, and with factors in int8. Beside
the losses stand bytes of state a parameter: of that model, and of a Llama-like one of
1.3 billion and GPT-2, in blocks of 1024, by their shapes alone.

Every run is written to the JSON file as it ends; what is there is not run again. Runs
in float32 are those of ``make convergence`` to the last digit, and taken from there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shampoo_optax as so
from benchmarks import common
from benchmarks.convergence_runs import Key, Runs, train
from examples import train_lm
from examples.lm.data import load_corpus
from examples.lm.task import language_model
from examples.training.progress import new_console
from examples.training.task import Schedule, Task

BF16 = jnp.bfloat16
SETTINGS = {
    "float32": so.StateDtypes(),
    "momentum": so.StateDtypes(momentum=BF16),
    "second moment": so.StateDtypes(second_moment=BF16),
    "factors": so.StateDtypes(factors=BF16),
    "roots": so.StateDtypes(roots=BF16),
    "packed": so.StateDtypes(packed=True),
    "lean": so.StateDtypes(momentum=BF16, roots=BF16, packed=True),
    "leanest": so.StateDtypes(BF16, BF16, BF16, BF16, packed=True),
    "int8 factors": so.StateDtypes(factors=jnp.int8),
    "least": so.StateDtypes(BF16, BF16, jnp.int8, BF16, packed=True),
}
SHAMPOO_RATE = train_lm.LEARNING_RATES["shampoo"]
SOAP_RATE = 1.13e-2  # benchmarks/results/cpu/convergence.json
EVERY = 50
Optimizer = Callable[[Any, so.BlockLayout], optax.GradientTransformation]


def optimizers() -> dict[str, tuple[float, Optimizer]]:
    """By name: the peak rate, and how to make it from its schedule and layout."""
    refresh = so.Refresh(precondition_frequency=train_lm.FREQUENCY)
    shared: dict[str, Any] = {"weight_decay": 1e-4, "refresh": refresh}

    def shampoo(dtypes: so.StateDtypes) -> Optimizer:
        return lambda rate, layout: so.shampoo(
            rate, layout=layout, state_dtypes=dtypes, **shared
        )

    def soap(dtypes: so.StateDtypes) -> Optimizer:
        return lambda rate, layout: so.soap(
            rate, layout=layout, state_dtypes=dtypes, **shared
        )

    made = {f"shampoo {n}": (SHAMPOO_RATE, shampoo(d)) for n, d in SETTINGS.items()}
    for name in ("float32", "leanest", "int8 factors", "least"):
        made[f"soap {name}"] = (SOAP_RATE, soap(SETTINGS[name]))
    return made


def borrow(runs: Runs, schedule: Schedule) -> None:
    """Takes the last losses in float32 from the runs of benchmarks/convergence.py."""
    path = common.RESULTS / jax.default_backend() / "convergence.json"
    rates = {"shampoo": SHAMPOO_RATE, "soap": SOAP_RATE}
    for run in json.loads(path.read_text())["runs"] if path.exists() else []:
        name, losses = run["optimizer"], run["losses"]
        wanted = ("lm", rates.get(name), schedule.steps)
        if (run["task"], run["rate"], run["steps"]) == wanted and losses:
            plan = (schedule.steps, schedule.eval_every, run["seed"])
            runs[Key("lm", f"{name} float32", run["rate"], *plan)] = losses[-1:]


def recipe(
    make: Optimizer, peak: float, steps: int
) -> optax.GradientTransformationExtraArgs:
    """The optimizer behind the examples' clip, with their schedule and layout."""
    schedule = train_lm.warmup_cosine(peak, steps)
    optimizer = make(schedule, train_lm.layout_of(None))
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def llama() -> dict[str, tuple[int, ...]]:
    """Shapes of 1.3 billion parameters, as in benchmarks/pods.py."""
    width, hidden = 2048, 5504
    kernels = dict.fromkeys(("wq", "wk", "wv", "wo"), (width, width))
    kernels |= {"wg": (width, hidden), "wu": (width, hidden), "wd": (hidden, width)}
    model = {f"layer{i}/{n}": shape for i in range(24) for n, shape in kernels.items()}
    return model | {"embed": (32000, width), "head": (width, 32000)}


def gpt2() -> dict[str, tuple[int, ...]]:
    """Shapes of the smallest GPT-2."""
    width = 768
    layer: dict[str, tuple[int, ...]] = {
        "attention": (width, 3 * width),
        "projection": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
        "scale1": (width,),
        "scale2": (width,),
    }
    model = {f"layer{i}/{n}": shape for i in range(12) for n, shape in layer.items()}
    return model | {"token": (50257, width), "position": (1024, width)}


def bytes_each(tx: optax.GradientTransformation, params: Any) -> float:
    """Bytes of state a parameter; nothing is computed."""
    held = jax.tree.leaves(jax.eval_shape(tx.init, params))
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in held) / number


def weights(make: Optimizer, trained: Any) -> dict[str, float]:
    """Bytes a parameter of the model that is trained, and of larger ones' shapes.

    ``square``: the one of 1.3 billion with embeddings cut into blocks as all the rest;
    by default such thin matrices have one factor, and all states are smaller.
    """
    found = {"trained": bytes_each(make(1e-3, so.BlockLayout(1024)), trained)}
    square = so.BlockLayout(1024, one_sided_above=math.inf)
    plain = so.BlockLayout(1024)
    for name, shapes, layout in (
        ("1.3B", llama(), plain),
        ("1.3B square", llama(), square),
        ("GPT-2", gpt2(), plain),
    ):
        like = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
        found[name] = bytes_each(make(1e-3, layout), like)
    return found


def weights_of_all(task: Task) -> dict[str, dict[str, float]]:
    """The same of every setting."""
    like = jax.eval_shape(lambda: task.start(optax.identity()).params)
    return {name: weights(make, like) for name, (_, make) in optimizers().items()}


def weigh_only(args: argparse.Namespace, task: Task) -> None:
    """Prints and writes the bytes, as the memory of ``make bench``."""
    held = weights_of_all(task)
    env = common.environment()
    print(common.heading(env) + "\n")
    columns = list(next(iter(held.values())))
    rows = [[name, *each.values()] for name, each in held.items()]
    print(common.table(["state", *(f"B/param {c}" for c in columns)], rows))
    common.save(args, "memory", {"environment": env, "bytes_per_parameter": held})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = common.arguments(__doc__, "lean")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument("--weigh", action="store_true", help="bytes; no training")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Trains, prints, writes."""
    args = parse(arguments)
    console = new_console()
    shape, steps, seeds = train_lm.SHAPE, train_lm.SCHEDULE.steps, args.seeds
    if args.quick:
        shape = shape._replace(context=16, width=16, layers=1, hidden=16)
        steps, seeds = 10, 1
    if args.weigh:
        weigh_only(args, language_model(load_corpus(), shape, batch_size=1, seed=0))
        return
    corpus = load_corpus()
    schedule = Schedule(steps, min(EVERY, steps), steps)
    path = args.out
    if path is None and not args.quick:
        path = common.RESULTS / jax.default_backend() / "lean.json"
    runs = Runs(path, shape._asdict() | {"batch": train_lm.BATCH, "clip": 1.0})
    if not args.quick:
        borrow(runs, schedule)
    env = common.environment()
    console.print(common.heading(env), soft_wrap=True)
    makers = optimizers()
    last: dict[str, list[float]] = {name: [] for name in makers}
    for seed in range(seeds):  # seed by seed: what is there can be compared
        task = language_model(corpus, shape, batch_size=train_lm.BATCH, seed=seed)
        for name, (rate, make) in makers.items():
            key = Key("lm", name, rate, steps, schedule.eval_every, seed)
            if key not in runs:
                runs[key] = train(
                    task, lambda p, s, m=make: recipe(m, p, s), rate, schedule
                )
            last[name].append(runs[key][-1] if runs[key] else math.inf)
            console.print(f"{name}, seed {seed}: {last[name][-1]:.4f}")
    held = weights_of_all(task)
    means = {name: statistics.mean(losses) for name, losses in last.items()}
    runs.content |= {"environment": env, "bytes_per_parameter": held, "loss": means}
    runs.write()
    console.print(report(held, last, means), soft_wrap=True)


def report(
    held: dict[str, dict[str, float]],
    last: dict[str, list[float]],
    means: dict[str, float],
) -> str:
    """A row for each setting; losses against the same optimizer's in float32."""
    columns = list(next(iter(held.values())))
    rows = []
    for name in held:
        base = means[f"{name.split()[0]} float32"]
        rows.append(
            [
                name,
                *(f"{held[name][column]:.2f}" for column in columns),
                f"{means[name]:.4f}",
                f"{100 * (means[name] / base - 1):+.2f} %",
                f"{min(last[name]):.4f} to {max(last[name]):.4f}",
            ]
        )
    heads = ["state", *(f"B/param {c}" for c in columns), "loss", "change", "seeds"]
    return common.table(heads, rows)


if __name__ == "__main__":
    main()
