"""Two processes with four devices each: one optimizer, and a root that fails on one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_optax import checkpoint
from tests import helpers, processes

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60  # a pair that takes longer hangs


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _launch(scenario: str, folder: Path) -> list[tuple[dict[str, Any], Any]]:
    """What each process said, and the updates that it saw."""
    port = str(_free_port())
    command = [sys.executable, "-m", "tests.processes", scenario, port]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [*command, str(i), str(folder)],
            cwd=ROOT,
            env=os.environ | one_thread | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes.PROCESSES)
    ]
    try:
        said = [child.communicate(timeout=SECONDS)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)
    return [
        (
            json.loads((folder / f"{i}.json").read_text()),
            np.load(folder / f"{i}.npz"),
        )
        for i in range(processes.PROCESSES)
    ]


def _assert_like_one_device(found: Any, kind: str, wanted: list[Any]) -> None:
    for step, updates in enumerate(wanted):
        for name, one in updates.items():
            apart = np.abs(found[f"{kind}{step}_{name}"] - one).max()
            assert apart <= 5e-6 * np.abs(one).max(), (step, name)


def test_two_processes_are_one_device(tmp_path: Path) -> None:
    """FSDP over the devices of both; blocks and refreshes cross processes."""
    both = _launch("fsdp", tmp_path)
    one = processes.Run(processes.fsdp, None)
    wanted, _, _ = one.steps(processes.fsdp_gradients())
    for said, found in both:
        _assert_like_one_device(found, "", wanted)
        assert said["compilations"] == 1
        assert said["reopened"]
    assert both[0][0]["digest"] == both[1][0]["digest"]
    # What eight devices of two processes saved, one device of one opens.
    like = {name: jnp.zeros(shape) for name, shape in processes.FSDP.items()}
    shapes = jax.eval_shape(one.tx.init, like)
    with checkpoint.manager(tmp_path / "run") as manager:
        found = checkpoint.restore(manager, like, shapes, one.layout)
    gradients = processes.fsdp_gradients()[0]
    updates, _ = one.update(gradients, found.state, found.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    helpers.record("processes", "opened by both, and by one device of one process")


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _launch("failing", tmp_path_factory.mktemp("failing"))


def test_a_root_that_fails_on_one_process(failing: Any) -> None:
    """Nobody waits for it; that block keeps its old roots, and its owner counts."""
    (first, _), (second, _) = failing
    assert first["compilations"] == second["compilations"] == 1
    # Beside a run without the sick block: slots that hold no block count as well.
    of_first, of_second = (
        np.array(said["sick_failures"]) - np.array(said["failures"])
        for said in (first, second)
    )
    assert not of_first.any()
    # Both factors of one block, at the refreshes of steps 2 and 4; that of 6 heals.
    assert [row[row != 0].tolist() for row in of_second] == [
        [], [1, 1], [1, 1], [2, 2], [2, 2], [],
    ]  # fmt: skip
    assert first["sick_digest"] == second["sick_digest"] != first["digest"]


def test_the_other_blocks_do_not_notice(failing: Any) -> None:
    for _, found in failing:
        for step in range(6):
            ill, well = (found[f"{kind}{step}_whole"] for kind in ("sick_", ""))
            assert np.isfinite(ill).all()
            others = np.ones(len(ill), bool)
            others[processes.SICK] = False
            np.testing.assert_array_equal(ill[others], well[others])
            np.testing.assert_array_equal(
                found[f"sick_{step}_rows"], found[f"{step}_rows"]
            )
            assert (ill[~others] != well[~others]).any()


def test_one_device_would_have_done_the_same(failing: Any) -> None:
    one = processes.Run(processes.failing, None)
    for kind, sick in (("sick_", True), ("", False)):
        wanted, _, _ = one.steps(processes.failing_gradients(sick))
        for _, found in failing:
            _assert_like_one_device(found, kind, wanted)
