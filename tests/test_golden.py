"""Golden checkpoints of every layout version open for ever."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import shampoo_optax as so
from shampoo_optax import checkpoint
from shampoo_optax.checkpoint.spec import VERSION
from tests.golden import make

KEPT = sorted(path for path in make.HERE.glob("v*/*.json"))


def test_the_present_version_is_kept() -> None:
    assert {p.stem for p in KEPT if p.parent.name == f"v{VERSION}"} == set(make.SAVED)
    files = [path for path in make.HERE.glob("v*/**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 200_000 * VERSION


def _opened(
    kept: Path, folder: Path, tx: Any, layout: so.BlockLayout, **how: Any
) -> checkpoint.Restored:
    shutil.copytree(kept.with_suffix(""), folder)  # Orbax may tidy up
    shapes = jax.eval_shape(tx.init, make.LIKE)
    with checkpoint.manager(folder) as manager:
        found = checkpoint.restore(manager, make.LIKE, shapes, layout, **how)
    assert found.step == make.STEPS
    return found


def _options(kept: Path, layout: so.BlockLayout) -> Any:
    """What was saved, on another layout."""
    if kept.stem == "soap":
        return so.soap(1e-2, layout=layout, refresh=so.Refresh(2))
    schedule = optax.constant_schedule(1e-2)
    return so.shampoo(schedule, layout=layout, refresh=so.Refresh(2), momentum=0.9)


@pytest.mark.parametrize("where", ["there", "on a mesh"])
@pytest.mark.parametrize("kept", KEPT, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_golden(kept: Path, where: str, tmp_path: Path) -> None:
    tx, layout = make.SAVED[kept.stem], make.LAYOUT
    if where == "on a mesh":
        mesh = jax.make_mesh((3,), ("x",), (jax.sharding.AxisType.Auto,))
        layout = dataclasses.replace(layout, mesh=mesh, block_axes=("x",))
        tx = _options(kept, layout)
    found = _opened(kept, tmp_path / "run", tx, layout)
    wanted = json.loads(kept.read_text())
    there = make.facts(found.params, found.state, layout)
    assert there.keys() == wanted.keys()
    for name, sums in wanted.items():
        np.testing.assert_allclose(there[name], sums, rtol=1e-6, atol=1e-6)


def test_every_version_opens_in_other_blocks(tmp_path: Path) -> None:
    """All were made of one run, each by the package of its time."""
    layout = so.BlockLayout(2)
    all_facts = []
    for kept in (path for path in KEPT if path.stem == "shampoo"):
        tx, folder = _options(kept, layout), tmp_path / kept.parent.name
        found = _opened(kept, folder, tx, layout, reblock=tx)
        all_facts.append(make.facts(found.params, found.state, layout))
    first, *others = all_facts
    assert others
    for other in others:
        assert other.keys() == first.keys()
        for name, sums in first.items():
            np.testing.assert_allclose(other[name], sums, rtol=1e-4, atol=1e-5)
