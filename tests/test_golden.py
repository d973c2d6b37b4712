"""Golden checkpoints of every layout version open for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from shampoo_optax import checkpoint
from shampoo_optax.checkpoint.spec import VERSION
from tests.golden import make

KEPT = sorted(path for path in make.HERE.glob("v*/*.json"))


def test_the_present_version_is_kept() -> None:
    assert {p.stem for p in KEPT if p.parent.name == f"v{VERSION}"} == set(make.SAVED)
    files = [path for path in make.HERE.glob("v*/**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 200_000 * VERSION


@pytest.mark.parametrize("kept", KEPT, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_golden(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept.with_suffix(""), tmp_path / "run")  # Orbax may tidy up
    tx = make.SAVED[kept.stem]
    shapes = jax.eval_shape(tx.init, make.LIKE)
    with checkpoint.manager(tmp_path / "run") as manager:
        found = checkpoint.restore(manager, make.LIKE, shapes, make.LAYOUT)
    assert found.step == make.STEPS
    wanted = json.loads(kept.read_text())
    there = make.facts(found.params, found.state)
    assert there.keys() == wanted.keys()
    for name, sums in wanted.items():
        np.testing.assert_allclose(there[name], sums, rtol=1e-6, atol=1e-6)
