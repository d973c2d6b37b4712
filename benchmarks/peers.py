"""Our side of torch_peers.py: PyTorch's optimizers beside those of this process."""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks import shapes

WORKER = Path(__file__).with_name("torch_peers.py")
BASE = "torch adamw"  # what torch's are measured by
PERIOD = 10
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Seconds that one answer may take; then the peer is left out, with a word.
PATIENCE = 120.0
# No further period of one that was stepped for so many seconds on one set of shapes.
ENOUGH = 15.0


class Failed(Exception):
    """A peer that did not answer, or answered that it cannot."""


class Worker:
    """A process that steps one optimizer."""

    def __init__(self, python: str) -> None:
        """Start it; nothing is imported before it is asked."""
        self.process = subprocess.Popen(
            [python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Threads of OpenMP that wait by spinning take the cores from one another
            # where anything else runs: AdamW on four small arrays 90 ms, not 0.2.
            # How many there are is PyTorch's to say, where LAPACK under JAX has one.
            env={"OMP_WAIT_POLICY": "passive"}
            | {k: v for k, v in os.environ.items() if k not in THREADS},
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
          Failed: there is none in time, or it is an error.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed("its process ended") from None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        if not ready:
            self.stop()
            raise Failed(f"{request['do']}: no answer in {PATIENCE:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failed("its process ended")
        found = json.loads(line)
        if "error" in found:
            raise Failed(found["error"])
        return found

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def available(python: str | None) -> tuple[str, list[str], dict[str, Any]]:
    """An interpreter with PyTorch, the optimizers that it knows, and their versions.

    Args:
      python: its path; None for ``TORCH_PYTHON``, or else this interpreter.

    Returns:
      The path, names (none where PyTorch is missing) and versions.
    """
    python = python or os.environ.get("TORCH_PYTHON") or sys.executable
    worker = Worker(python)
    try:
        found = worker.ask(do="names")
    except Failed as failure:
        raise SystemExit(f"{python} cannot say which peers it has: {failure}") from None
    finally:
        worker.stop()
    return python, found["names"], found["versions"]


class TorchRunner:
    """One of PyTorch's optimizers on one set of shapes; as ``step.Runner``."""

    base = BASE

    def __init__(self, name: str, tree: shapes.Tree, python: str) -> None:
        """Start its process."""
        self.name, self.tree, self.worker = name, tree, Worker(python)
        self.first: list[float] = []
        self.periods: list[list[float]] = []
        self.state_bytes = 0
        self.failure: str | None = None

    def first_call(self) -> None:
        """Once: a process keeps what it has compiled."""
        if self.first or self.failure:
            return
        sides = [list(leaf.shape) for leaf in jax.tree.leaves(self.tree)]
        found = self._ask(do="start", name=self.name, shapes=sides)
        if found:
            self.first.append(found["first_s"])
            self._ask(do="period", steps=PERIOD - 1)  # so that refreshes come together

    def period(self, *, record: bool) -> None:
        """Ten steps, unless there were enough; which ones count, result() says."""
        del record
        if self.failure or sum(map(sum, self.periods)) > ENOUGH:
            return
        found = self._ask(do="period", steps=PERIOD)
        if found:
            self.periods.append(found["seconds"])
            self.state_bytes = found["state_bytes"]

    def result(self) -> dict[str, Any]:
        """Medians by phase: the refresh is the slowest, wherever it stands.

        The first period warms up, where it is not the only one.
        """
        if self.failure:
            return {"failure": self.failure}
        periods = self.periods[1:] or self.periods
        phases = [1e3 * statistics.median(p) for p in zip(*periods, strict=True)]
        return {
            "plain_ms": statistics.median(phases),
            "refresh_ms": max(phases),
            "average_ms": statistics.mean(phases),
            "first_s": self.first[0],
            "state_bytes_per_parameter": self.state_bytes / shapes.number(self.tree),
        }

    def close(self) -> None:
        """End its process."""
        self.worker.stop()

    def _ask(self, **request: Any) -> dict[str, Any]:
        try:
            return self.worker.ask(**request)
        except Failed as failure:
            self.failure = str(failure)
            self.worker.stop()
            return {}
