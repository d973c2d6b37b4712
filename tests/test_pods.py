"""The update compiled for TPU topologies, in small: what it sends and how it grows.

A TPU's partitioner is not a CPU's: there, jit gathers every eigenproblem, and the
obvious way to spread blocks moves many times the bytes. Only its own compiler shows.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT, LIBTPU = Path(__file__).parents[1], Path(sys.prefix) / "libtpu"
pytestmark = pytest.mark.skipif(
    not LIBTPU.exists() and importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: make test brings it where it exists",
)
SMALL = {"topology": "v5e:4x4", "fsdp": 16, "model": "1.3B", "shrink": 16, "block": 64}


@functools.cache
def _compiled(**options: Any) -> dict[str, Any]:
    case = json.dumps(SMALL | {"layers": 2} | options)
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.pods", "--one", case],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(LIBTPU)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_fsdp_sends_little_and_only_by_all_to_all() -> None:
    found = _compiled()
    assert found["wire_over_ideal"] <= 1.10
    assert found["state_over_ideal"] <= 1.05
    assert found["collectives"] == {"all-to-all/8": 2 * found["pools"]}
    assert found["inside_loop_or_branch"] == 0


def test_the_obvious_form_sends_many_times_as_much() -> None:
    assert _compiled(naive=True)["wire_over_ideal"] > 5


def test_copies_gather_among_themselves_alone() -> None:
    found = _compiled(data=2, fsdp=8)
    pools = found["pools"]
    gathered = found["collectives"].pop("all-gather/2")
    assert gathered == pools
    assert found["collectives"] == {"all-to-all/4": 2 * pools}
    assert found["wire_over_ideal"] <= 1.2


def test_growth_with_layers() -> None:
    """A scanned model's program does not grow; an array adds few instructions."""
    few, many = (_compiled(layers=n, shrink=32, block=32) for n in (8, 32))
    assert many["pools"] == few["pools"]
    assert many["instructions"] <= 1.1 * few["instructions"]
    assert many["stablehlo_kB"] <= 1.1 * few["stablehlo_kB"]
    few, many = (_compiled(layers=n, stacked=False) for n in (2, 6))
    arrays = 7 * (6 - 2)
    assert (many["instructions"] - few["instructions"]) / arrays <= 30
