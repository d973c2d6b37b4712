"""What `make bench` runs, tiny: the driver, a refresh's floor, peers elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as driver
from benchmarks import common, floor, optimizers, peers, pictures, shapes, summary


def test_the_driver_runs_a_part_and_sums_it_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--quick", "--only", "memory", "--results", str(tmp_path)]
    assert driver.main(flags) == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert {line["part"] for line in found["figures"]} == {"memory"}
    assert found["failed"] == {}
    lean = next(
        x for x in found["figures"] if x["what"].startswith("1.3B in blocks, leanest")
    )
    assert 7 < lean["value"] < 9
    printed = capsys.readouterr().out
    assert "1 of 1: bytes of state a parameter" in printed and "All figures" in printed


def test_a_part_that_fails_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {name: driver.Part(name, f"not_there_{name}") for name in ("one", "two")}
    monkeypatch.setattr(driver, "PARTS", parts)
    assert driver.main(["--quick", "--results", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["failed"] == {"one": "exit status 1", "two": "exit status 1"}
    assert "two: exit status 1" in capsys.readouterr().out


def test_the_committed_results_have_figures_and_pictures(tmp_path: Path) -> None:
    found = driver.load(common.RESULTS / "cpu", list(driver.PARTS))
    figures = summary.figures(found)
    assert {"roots", "step", "compile", "run_once"} <= {f.part for f in figures}
    assert {f.met for f in figures if f.part == "run_once"} == {True}
    for name in pictures.save(tmp_path, found):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"step.png", "roots.png"}


def test_a_bar_is_an_upper_bound() -> None:
    values = [summary.Figure("part", "what", value, 1.2).met for value in (1.2, 1.3)]
    assert values == [True, False]
    assert summary.Figure("part", "what", 1.0).met is None


def test_every_figure_with_a_bar_is_held_against_it() -> None:
    found = driver.load(common.RESULTS / "cpu", list(driver.PARTS))
    bars = {f.what: f.bar for f in summary.figures(found) if f.bar is not None}
    assert bars["mlp: plain step / floor"] == bars["transformer: plain step / floor"]
    for what, bar in {
        "convnet: plain step / floor": 2,
        "small: plain step / floor": 4,
        "transformer: refresh / its eigh": 1.2,
        "transformer: average step / AdamW's": 6,
        "200 different arrays: shampoo / AdamW's": 2,
        "200 different arrays: shampoo, MB of StableHLO": 1,
        "minimax, 1024: products of matrices": 30,
        "staggered: worst step / median": 1.3,
        "1.3B in blocks, leanest: state bytes a parameter": 8.1,
        "leanest: loss above float32's, share": 0.01,
    }.items():
        assert bars[what] == bar


def test_the_products_of_a_step_are_timed_alone() -> None:
    tree = {"a": jax.ShapeDtypeStruct((24, 8), "float32")}
    alone = floor.Products(tree, 16)
    gram, moved = alone.call(alone.stacks, alone.roots)["16x8"]
    block, roots = alone.stacks["16x8"], alone.roots["16x8"]
    np.testing.assert_allclose(gram[1], jnp.swapaxes(block, 1, 2) @ block, rtol=1e-4)
    np.testing.assert_allclose(
        moved, roots[0] @ block @ jnp.swapaxes(roots[1], 1, 2), rtol=1e-3, atol=1e-4
    )
    alone.measure(times=2, record=True)
    assert alone.milliseconds() > 0


def test_the_floor_of_a_refresh_decomposes_its_factors() -> None:
    tree = {"a": shapes.small(1)["a000"], "b": jax.ShapeDtypeStruct((24, 8), "float32")}
    params, gradient = shapes.random(tree, 0), shapes.random(tree, 1)
    tx = optimizers.shampoo(block=16)
    state = tx.init(params)
    _, state = jax.jit(tx.update)(gradient, state, params)
    timed = floor.RefreshFloor()
    assert timed.result() == {}
    for record in (False, True):
        timed.measure(state, floor.Seconds(1.0, 1.0), record=record)
    found = timed.result()
    parts = found["refresh_parts_cpu_ms"]
    assert list(parts) == ["eigh", "product", "scaling", "rest"]
    assert sum(parts.values()) == pytest.approx(1e3)
    assert found["refresh_over_eigh_cpu"] == pytest.approx(1e3 / parts["eigh"])
    matrices = jnp.stack([jnp.diag(jnp.arange(1.0, 5)), 2 * jnp.eye(4)])
    values, *_ = floor.decompose(matrices, 4.0)
    assert values.dtype == "float64"
    np.testing.assert_allclose(values, [[1, 2, 3, 4], [2, 2, 2, 2]])


WORKER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "start":
        if request["name"] == "broken":
            print(json.dumps({"error": "it cannot"}), flush=True)
            continue
        assert request["shapes"] == [[3], [2, 3]]
        print(json.dumps({"first_s": 0.5}), flush=True)
        continue
    if request["do"] == "period" and %r:
        sys.exit()
    answer = {"seconds": [0.001] * 3 + [0.009] + [0.001] * 6, "state_bytes": 72}
    print(json.dumps(answer), flush=True)
"""


def runner(
    name: str, monkeypatch: pytest.MonkeyPatch, script: Path, ends: bool = False
):
    script.write_text(WORKER % ends)
    monkeypatch.setattr(peers, "WORKER", script)
    tree = {"a": jax.ShapeDtypeStruct((3,), "float32")}
    tree["b"] = jax.ShapeDtypeStruct((2, 3), "float32")
    found = peers.TorchRunner(name, tree, sys.executable)
    for step in (found.first_call, *[lambda: found.period(record=True)] * 3):
        step()
    found.close()
    return found.result()


def test_a_peer_elsewhere_is_timed_by_phase(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = runner("good", monkeypatch, tmp_path / "worker.py")
    assert (found["plain_ms"], found["refresh_ms"]) == (1.0, 9.0)
    assert found["average_ms"] == pytest.approx(1.8)
    assert found["first_s"] == 0.5 and found["state_bytes_per_parameter"] == 8.0


def test_a_peer_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "worker.py"
    assert runner("broken", monkeypatch, script) == {"failure": "it cannot"}
    ended = runner("good", monkeypatch, script, ends=True)
    assert ended == {"failure": "its process ended"}


def test_the_worker_says_what_it_has_and_steps_it() -> None:
    python, names, versions = peers.available(None)
    assert (versions["torch"] is None) <= (names == [])
    if peers.BASE not in names:
        pytest.skip(f"{python} has no PyTorch")
    tree = {"a": jax.ShapeDtypeStruct((2, 3), "float32")}
    adamw = peers.TorchRunner(peers.BASE, tree, python)
    adamw.first_call()
    adamw.period(record=True)
    adamw.close()
    found = adamw.result()
    assert found["plain_ms"] > 0
    assert 8.0 <= found["state_bytes_per_parameter"] < 10.0


def test_the_worker_needs_no_jax() -> None:
    code = "import sys, benchmarks.torch_peers; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
