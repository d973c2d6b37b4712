"""Checkpoints on disk: other meshes, damage of every kind, models that changed."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import shampoo_optax as so
from shampoo_optax import checkpoint
from tests import helpers
from tests.test_sharded import BLOCK, MODES

ROOT = Path(__file__).resolve().parents[1]

# Orbax reads arrays side by side, and drops the others when one is broken.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
LAYOUT = so.BlockLayout(4)
FLIPS = int(os.environ.get("SHAMPOO_OPTAX_FLIPS", "60"))


@pytest.fixture(autouse=True, scope="module")
def _own_garbage() -> Iterator[None]:
    """What it drops is found here, where it is expected, not in another file."""
    yield
    gc.collect()


def _params() -> dict[str, Any]:
    like = {
        "w": jnp.zeros((10, 6)),
        "bias": jnp.zeros(5),
        "a.b": jnp.zeros((4, 4)),
        "a": {"b": jnp.zeros((4, 4)), "../up": jnp.zeros(3)},
        "none": jnp.zeros((0, 4)),
    }
    return helpers.gradients(like, step=99)


def _tx(layout: so.BlockLayout = LAYOUT, **options: Any) -> Any:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        so.shampoo(1e-2, layout=layout, refresh=so.Refresh(2), **options),
    )


@functools.cache
def _trained() -> tuple[Any, list[tuple[Any, Any]]]:
    """An optimizer, and parameters and states after each of 4 steps."""
    tx, params = _tx(), _params()
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for step in range(1, 5):
        updates, state = update(helpers.gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
        found.append((params, state))
    return tx, found


def _saved(folder: Path, steps: int = 2, extra: Any = None) -> tuple[Any, Any, Any]:
    """A run with checkpoints after its last ``steps`` steps, of 4."""
    tx, trained = _trained()
    with checkpoint.manager(folder) as manager:
        for step, (params, state) in enumerate(trained, 1):
            if step > 4 - steps:
                checkpoint.save(manager, step, params, state, LAYOUT, extra=extra)
    return tx, *trained[-1]


def _open(folder: Path, tx: Any = None, params: Any = None, **options: Any) -> Any:
    params = _params() if params is None else params
    like = jax.eval_shape((tx or _tx()).init, params)
    layout = options.pop("layout", LAYOUT)
    with checkpoint.manager(folder) as manager:
        return checkpoint.restore(manager, params, like, layout, **options)


def test_there_and_back(tmp_path: Path) -> None:
    tx, params, state = _saved(tmp_path, extra={"data": [1, 0.1, "x", None]})
    found = _open(tmp_path)
    assert (found.step, found.extra) == (4, {"data": [1, 0.1, "x", None]})
    helpers.assert_equal(found.params, params)
    helpers.assert_equal(found.state, state)
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    # The first step after it is compiled for all.
    update = jax.jit(lambda *args: tx.update(*args))
    gradients = helpers.gradients(params)
    _, after = update(gradients, found.state, found.params)
    update(gradients, after, found.params)
    assert update._cache_size() == 1


def test_steps_that_are_there_stay(tmp_path: Path) -> None:
    _, params, state = _saved(tmp_path)
    with checkpoint.manager(tmp_path) as manager:
        assert not checkpoint.save(manager, 4, params, state, LAYOUT)
        assert checkpoint.save(manager, 5, params, state, LAYOUT)


def test_no_step_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has steps \\[\\]; wanted any"):
        _open(tmp_path)
    _saved(tmp_path)
    with pytest.raises(FileNotFoundError, match="has steps \\[3, 4\\]; wanted 7"):
        _open(tmp_path, step=7)


@pytest.mark.parametrize("alias", [so.scale_by_shampoo, so.scale_by_soap])
def test_walk_over_meshes_is_bitwise(alias: Any, tmp_path: Path) -> None:
    """8 -> 4 -> 1 -> 8 -> 2, deterministic: the run that never changed its mesh."""
    like = {"rows": jnp.zeros((16, 12)), "bias": jnp.zeros(16)}
    start = helpers.gradients(like, 1000)

    def made(n: int) -> tuple[Any, Any, Any, Any]:
        mode = MODES["fsdp8"]
        mesh = jax.make_mesh((n,), ("fsdp",), (jax.sharding.AxisType.Auto,))
        specs = {name: mode.specs[name] for name in like}
        layout = so.BlockLayout(
            BLOCK,
            mesh=mesh,
            block_axes=("fsdp",),
            param_specs=specs,
            deterministic=True,
        )
        tx = alias(layout=layout, refresh=so.Refresh(3, 3))
        places = {
            name: jax.sharding.NamedSharding(mesh, spec) for name, spec in specs.items()
        }
        return tx, layout, places, jax.jit(tx.update)

    def advance(at: Any, params: Any, state: Any, steps: range) -> tuple[Any, Any]:
        _, _, places, update = at
        for step in steps:
            gradients = jax.device_put(helpers.gradients(like, step), places)
            updates, state = update(gradients, state, params)
            params = jax.tree.map(lambda p, u: p - 0.125 * u, params, updates)
        return params, state

    first = made(8)
    params = jax.device_put(start, first[2])
    state = first[0].init(params)
    straight = advance(first, params, state, range(10))
    walked = advance(first, params, state, range(2))
    for number, n in enumerate((4, 1, 8, 2)):
        with checkpoint.manager(tmp_path) as manager:
            before = made((8, 4, 1, 8)[number])[1]
            checkpoint.save(manager, number, *walked, before)
        at = made(n)
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at[2][name])
            for name, x in like.items()
        }
        with checkpoint.manager(tmp_path) as manager:
            abstract = jax.eval_shape(at[0].init, shapes)
            found = checkpoint.restore(manager, shapes, abstract, at[1])
        assert found.step == number
        walked = advance(
            at, found.params, found.state, range(2 + 2 * number, 4 + 2 * number)
        )
    helpers.assert_equal(*(jax.tree.map(np.asarray, w[0]) for w in (walked, straight)))
    helpers.record("walk", f"{alias.__name__.removeprefix('scale_by_')} bitwise")


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _outcome(folder: Path, wanted: dict[int, Any]) -> int:
    """Open what is left: the step that came, which must be one of the true ones."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = _open(folder)
    params, state = wanted[found.step]
    helpers.assert_equal(found.params, params)
    helpers.assert_equal(found.state, state)
    said = [str(w.message) for w in seen if "checkpoint: step 4" in str(w.message)]
    assert bool(said) == (found.step != 4), [str(w.message) for w in seen]
    return found.step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    _saved(folder)
    runs = {step: _open(folder, step=step) for step in (3, 4)}
    return folder, {step: (run.params, run.state) for step, run in runs.items()}


def test_a_flipped_bit_is_found(whole: Any, tmp_path: Path) -> None:
    """Anywhere in the files: the step before comes, or the flip touched nothing."""
    folder, wanted = whole
    rng = np.random.default_rng(0)
    sizes = np.array([file.stat().st_size for file in _files(folder / "4")], float)
    fell_back = 0
    for trial in range(FLIPS):
        copy = tmp_path / str(trial)
        shutil.copytree(folder, copy)
        file = _files(copy / "4")[rng.choice(len(sizes), p=sizes / sizes.sum())]
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        fell_back += _outcome(copy, wanted) == 3
        shutil.rmtree(copy)
    assert fell_back > FLIPS // 3
    quiet = FLIPS - fell_back
    helpers.record("flip", f"{FLIPS} of {FLIPS}: {fell_back} found, {quiet} harmless")


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": _truncated,
    "emptied": lambda file: file.write_bytes(b""),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_file_is_found(damage: str, whole: Any, tmp_path: Path) -> None:
    folder, wanted = whole
    number = len(_files(folder / "4"))
    for i in range(0, number, max(1, number // 12)):
        copy = tmp_path / str(i)
        shutil.copytree(folder, copy)
        DAMAGES[damage](_files(copy / "4")[i])
        _outcome(copy, wanted)
        shutil.rmtree(copy)
    helpers.record("damage", damage)


@pytest.mark.parametrize("item", ["params", "optimizer", "spec"])
def test_half_a_step_is_none(item: str, whole: Any, tmp_path: Path) -> None:
    folder, wanted = whole
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "4" / item)
    assert _outcome(tmp_path / "run", wanted) == 3
    like = jax.eval_shape(_tx().init, _params())
    with checkpoint.manager(tmp_path / "run") as manager:
        verified = checkpoint.latest_verified_step(manager, _params(), like, LAYOUT)
    assert verified == 3


def test_nothing_whole_is_said(whole: Any, tmp_path: Path) -> None:
    folder, _ = whole
    shutil.copytree(folder, tmp_path / "run")
    for step in ("3", "4"):
        shutil.rmtree(tmp_path / "run" / step / "optimizer")
    said = pytest.raises(checkpoint.DamagedCheckpoint, match="cannot be read")
    with pytest.warns(UserWarning, match="step 4"), said as caught:
        _open(tmp_path / "run")
    assert "step 3 of" in str(caught.value)


def test_another_optimizer_model_or_dtype_is_refused(tmp_path: Path) -> None:
    _, params, _ = _saved(tmp_path)
    cases = [
        (so.soap(1e-2, layout=LAYOUT), params, LAYOUT, "Shampoo's inverse roots"),
        (_tx(so.BlockLayout(8)), params, so.BlockLayout(8), "there in blocks of"),
        (_tx(momentum=0.9), params, LAYOUT, "'trace' is wanted and not there"),
        (
            _tx(),
            {**params, "w": params["w"].astype(jnp.bfloat16)},
            LAYOUT,
            "'w' is float32 there; wanted bfloat16. Nothing is cast silently",
        ),
        (_tx(), {**params, "w": params["w"].T}, LAYOUT, "'w' has shape (10, 6) there"),
        (
            _tx(),
            {**params, "new": jnp.ones((4, 4))},
            LAYOUT,
            "parameter 'new' is wanted and not there",
        ),
        (
            _tx(),
            {k: v for k, v in params.items() if k != "w"},
            LAYOUT,
            "parameter 'w' is there and nothing asks for it",
        ),
    ]
    for tx, model, layout, sentence in cases:
        with pytest.raises(ValueError) as caught:
            _open(tmp_path, tx, model, layout=layout)
        assert sentence in str(caught.value)
        assert not isinstance(caught.value, checkpoint.DamagedCheckpoint)


def test_new_and_renamed_parameters(tmp_path: Path) -> None:
    tx, params, state = _saved(tmp_path)
    old = checkpoint.to_param_view(state, params, LAYOUT)["parameters"]
    model = {
        "encoder": {"w": params["w"]},
        **{k: v for k, v in params.items() if k != "w"},
        "bias": jnp.ones(7),  # a head of another size
        "more": jnp.full((4, 4), 3.0),
    }
    begun = tx.init(model)
    with checkpoint.manager(tmp_path) as manager:
        found = checkpoint.restore(
            manager,
            jax.tree.map(jnp.zeros_like, model) | {"more": model["more"]},
            begun,
            LAYOUT,
            fresh="^bias$|^more$",
            renamed={"encoder/w": "w"},
        )
    helpers.assert_equal(found.params["encoder"]["w"], params["w"])
    helpers.assert_equal(found.params["more"], model["more"])
    view = checkpoint.to_param_view(found.state, model, LAYOUT)
    helpers.assert_equal(view["parameters"]["encoder/w"], old["w"])
    new = checkpoint.to_param_view(begun, model, LAYOUT)["parameters"]
    helpers.assert_equal(view["parameters"]["more"], new["more"])
    helpers.assert_equal(view["parameters"]["bias"], new["bias"])


def _respec(folder: Path, change: Callable[[Any], Any], *, honest: bool) -> None:
    """Rewrite the spec of the only step, with a checksum that fits or the old one."""
    from shampoo_optax.checkpoint import spec as specs

    (file,) = (f for f in _files(folder / "4" / "spec") if f.name == "metadata")
    said = json.loads(file.read_text())
    change(said)
    if honest:
        rest = {k: v for k, v in said.items() if k != "checksum"}
        said["checksum"] = specs._checksum(rest)
    file.write_text(json.dumps(said))


def _leaf(said: Any) -> Any:
    return said["arrays"]["params"]["w"]


def _told(said: Any) -> Any:
    """What is said of a factor."""
    return said["stacks"]["leaves"]["4x4"]["blocks/inner/direction/factors/0"]


def _rows(said: Any) -> Any:
    return said["stacks"]["rows"][_told(said)["rows"]][0]


def _stack(said: Any) -> Any:
    stacks = said["arrays"]["optimizer"]["stacks"]
    return stacks["4x4"]["blocks/inner/direction/factors/0"]


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "huge": lambda s: _leaf(s).update(shape=[2**40, 2**20]),
    "negative": lambda s: _leaf(s).update(shape=[-1, 6]),
    "text for a shape": lambda s: _leaf(s).update(shape="10x6"),
    "unknown dtype": lambda s: _leaf(s).update(dtype="object"),
    "no dtype": lambda s: _leaf(s).pop("dtype"),
    "another dtype": lambda s: _leaf(s).update(dtype="float64"),
    "upward": lambda s: s["arrays"]["params"].update({"../../up": _leaf(s)}),
    "dotted": lambda s: s["arrays"]["params"].update({"w.0": _leaf(s)}),
    "no arrays": lambda s: s.pop("arrays"),
    "arrays a list": lambda s: s.update(arrays=[1, 2]),
    "newer": lambda s: s.update(version=99),
    "version a text": lambda s: s.update(version="1"),
    "another format": lambda s: s.update(format="pickle"),
    "digest missing": lambda s: _leaf(s).pop("digest"),
    "digest wrong": lambda s: _leaf(s).update(digest=1),
    "no table": lambda s: s.pop("stacks"),
    "table a list": lambda s: s.update(stacks=[1]),
    "leaf not told": lambda s: s["stacks"]["leaves"].popitem(),
    "another kind": lambda s: _told(s).update(kind="vector"),
    "a dimension too many": lambda s: _told(s).update(dim=7),
    "rows nowhere": lambda s: _told(s).update(rows=99),
    "rows a text": lambda s: _told(s).update(rows="0"),
    "a row twice": lambda s: _rows(s).update(rows=[0, 0]),
    "a row outside": lambda s: _rows(s)["rows"].append(2**62),
    "a row below": lambda s: _rows(s).update(rows=[-1]),
    "rows of another": lambda s: _rows(s).update(name="../../up"),
    "a huge block": lambda s: _rows(s).update(block=[2**40, 4]),
    "turned a text": lambda s: _rows(s).update(turned="no"),
    "fewer rows": lambda s: _rows(s)["rows"].pop(),
    "a huge stack": lambda s: _stack(s).update(shape=[2**40, 4, 4]),
    "a larger stack": lambda s: _stack(s).update(shape=[9, 4, 4]),
}


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints_are_refused(
    case: str, honest: bool, tmp_path: Path
) -> None:
    run = tmp_path / "inside" / "run"
    _saved(run, steps=1)
    _respec(run, HOSTILE[case], honest=honest)
    before = {path for path in tmp_path.rglob("*") if run not in path.parents}
    with pytest.raises(ValueError, match="checkpoint: "):
        _open(run)
    after = {path for path in tmp_path.rglob("*") if run not in path.parents}
    assert before == after
    helpers.record("hostile", case)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_checkpoints_take_little_memory() -> None:
    """All of them in one process of its own, beside what a sound one takes."""
    code = """
import re, tempfile
from pathlib import Path
from tests import test_checkpoint as test

def peak():  # in MB; what getrusage says begins with the peak of the parent
    said = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s*(\\d+)", said)[1]) / 1e3

with tempfile.TemporaryDirectory() as folder:
    test._saved(Path(folder) / "sound")
    test._open(Path(folder) / "sound")
    before = peak()
    for case in test.HOSTILE:
        test.test_hostile_checkpoints_are_refused(case, True, Path(folder) / case)
    print("more", peak() - before)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    more = float(run.stdout.split("more")[-1])
    assert more <= 200
    helpers.record("memory", f"{more:.0f} MB")


# Without a target it asks where arrays lay.
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_v1_reads_it(tmp_path: Path) -> None:
    from orbax.checkpoint import v1

    _, params, _ = _saved(tmp_path)
    found = v1.load(tmp_path / "4", checkpointable_name="params")
    np.testing.assert_array_equal(found["w"], params["w"])
    np.testing.assert_array_equal(found["a%2Eb"], params["a.b"])


def test_in_a_manager_of_ones_own(tmp_path: Path) -> None:
    tx, params, state = _tx(), _params(), _tx().init(_params())
    with ocp.CheckpointManager(tmp_path) as manager:
        mine = {"mine": ocp.args.JsonSave({"epoch": 3})}
        ours = checkpoint.items(params, state, LAYOUT)
        manager.save(1, args=ocp.args.Composite(**mine, **ours))
        manager.wait_until_finished()
        like = jax.eval_shape(tx.init, params)
        found = checkpoint.restore(manager, params, like, LAYOUT)
    helpers.assert_equal(found.state, state)


def test_an_average_is_served_from_a_checkpoint(tmp_path: Path) -> None:
    tx = so.primal_averaging(so.shampoo(1e-2, layout=LAYOUT))
    params = _params()
    _, state = helpers.run(tx, params, 3)
    with checkpoint.manager(tmp_path) as manager:
        checkpoint.save(manager, 3, params, state, LAYOUT)
    found = _open(tmp_path, tx, params)
    helpers.assert_equal(
        so.eval_params(found.state, found.params), so.eval_params(state, params)
    )
