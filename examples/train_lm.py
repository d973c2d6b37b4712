"""Trains a small transformer on the standard library, with Shampoo and with AdamW.

Both start from the same parameters and see the same batches. Ctrl-C stops a run and
saves it; the same command goes on from there. With --devices everything is spread over
that many (docs/sharding.md); on a CPU they are pretended. A run may go on on another
number of them than it was stopped on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

# XLA solves many small eigenproblems side by side; with a pool of threads inside each
# of them, LAPACK is tens of times slower. It reads this when NumPy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import optax

if not __package__:  # run as a file, not as python -m examples.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shampoo_optax as so
from examples.lm.data import load_corpus
from examples.lm.model import Shape
from examples.lm.task import language_model
from examples.training.command import Recipe, compare, new_parser, positive
from examples.training.spread import MODES, Spread, new_spread
from examples.training.task import Schedule, Settings

SCHEDULE = Schedule(steps=500, eval_every=20, save_every=100)
SHAPE = Shape()
BATCH = 32
FREQUENCY = 10
LARGEST = 1024  # of a factor; no kernel of the default model is cut
# By `python -m examples.sweep_lm` (sweep_lm.json): 200 steps of one seed, loss by rate
#             2e-3   2.83e-3    4e-3   5.66e-3    8e-3
#   adamw    2.282     2.246   2.230     2.275   2.280
#   shampoo  2.159     2.087   2.016     1.982   2.030
LEARNING_RATES = {"adamw": 4e-3, "shampoo": 5.66e-3}


def warmup_cosine(peak: float, steps: int) -> optax.Schedule:
    """Makes the schedule of both optimizers: a tenth of warm-up, then a cosine."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 10), steps)


def adamw(learning_rate: float, steps: int) -> optax.GradientTransformationExtraArgs:
    """Makes the baseline."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(warmup_cosine(learning_rate, steps), weight_decay=1e-4),
    )


def layout_of(spread: Spread | None) -> so.BlockLayout:
    """Makes the layout of Shampoo's blocks, and of checkpoints."""
    make = so.BlockLayout if spread is None else spread.layout
    return make(max_preconditioner_dim=LARGEST)


def shampoo(
    learning_rate: float, steps: int, spread: Spread | None = None
) -> optax.GradientTransformationExtraArgs:
    """Makes the same chain with Shampoo in AdamW's place."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        so.shampoo(
            warmup_cosine(learning_rate, steps),
            weight_decay=1e-4,
            layout=layout_of(spread),
            refresh=so.Refresh(precondition_frequency=FREQUENCY),
            grafting=so.grafting.adam(b2=0.999, eps=1e-8),
        ),
    )


RECIPES: dict[str, Recipe] = {"adamw": adamw, "shampoo": shampoo}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = new_parser(
        __doc__, run_dir="runs/lm", schedule=SCHEDULE, learning_rates=LEARNING_RATES
    )
    parser.add_argument("--batch", type=positive, default=BATCH, help="in windows")
    for name in ("context", "width", "heads", "layers", "hidden"):
        default = getattr(SHAPE, name)
        parser.add_argument(
            f"--{name}", type=positive, default=default, help="of the model"
        )
    parser.add_argument("--devices", type=positive, default=1, help="how many")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="fsdp",
        help="; ".join(f"{name}: {words}" for name, words in MODES.items()),
    )
    return parser.parse_args(argv)


def main(
    argv: Sequence[str] | None = None, on_step: Callable[[int], None] = lambda _: None
) -> int:
    """Trains, and returns the exit code."""
    arguments = parse(argv)
    shape = SHAPE._replace(
        **{name: getattr(arguments, name) for name in SHAPE._fields[1:]}
    )
    spread = new_spread(arguments.devices, arguments.mode, arguments.batch)
    corpus = load_corpus()
    task = language_model(
        corpus, shape, batch_size=arguments.batch, seed=arguments.seed, spread=spread
    )
    title = f"{len(corpus.train) / 1e6:.1f} MB of Python, {arguments.steps} steps"
    settings: Settings = shape._asdict()
    settings |= {"batch": arguments.batch, "corpus": len(corpus.train)}
    if spread is not None:
        title += f", {arguments.devices} devices ({arguments.mode})"
    return compare(
        task,
        RECIPES | {"shampoo": partial(shampoo, spread=spread)},
        arguments,
        title=title,
        learning_rates=LEARNING_RATES,
        settings=settings,
        layout=layout_of(spread),
        period=FREQUENCY,
        on_step=on_step,
    )


if __name__ == "__main__":
    sys.exit(main())
