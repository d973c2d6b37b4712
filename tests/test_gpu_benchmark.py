"""What `make bench-gpu` measures runs, tiny, on whatever is here."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpt, gpu, shapes


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert not [row for row in found["roots"] if "refused" in row]
    assert all(row["root_error"] < 0.05 for row in found["roots"])
    assert "training step" in capsys.readouterr().out


def test_the_models_are_as_large_as_they_say() -> None:
    assert shapes.number(shapes.llama()) == pytest.approx(953e6, rel=1e-3)
    like = shapes.transformer(*gpu.Sizes().gpt)
    assert shapes.number(like) == pytest.approx(124e6, rel=2e-3)


def test_the_gpt_looks_at_no_later_token_and_learns() -> None:
    params = gpt.begin(shapes.transformer(2, 32, 16))
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 16)
    other = tokens.at[:, 7:].set((tokens[:, 7:] + 1) % 16)
    one, two = (gpt.logits(params, x, jnp.float32) for x in (tokens, other))
    np.testing.assert_array_equal(one[:, :7], two[:, :7])
    assert (one[:, 7:] != two[:, 7:]).any()
    loss = jax.jit(lambda p: gpt.loss(p, tokens, jnp.float32))
    before, step = loss(params), jax.jit(jax.grad(loss))
    for _ in range(20):
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, step(params))
    assert float(loss(params)) < 0.9 * float(before)
    assert float(before) == pytest.approx(np.log(16), rel=0.05)
