"""The programs in docs/ run, on eight devices, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import checkpoints_table

DOCS = Path(__file__).resolve().parents[1] / "docs"


def _programs(name: str) -> dict[str, str]:
    """By heading."""
    text = (DOCS / name).read_text()
    parts = re.split(r"^#+ (.+)\n", text, flags=re.MULTILINE)[1:]
    found = {}
    for heading, part in zip(parts[::2], parts[1::2], strict=True):
        blocks = re.findall(r"^```python\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
        if blocks:
            found[heading] = "\n".join(blocks)
    return found


SHARDING = _programs("sharding.md")
BEFORE, *MODES = SHARDING


@pytest.mark.parametrize("heading", MODES)
def test_sharding(heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda: None)
    names: dict[str, Any] = {}
    exec(compile(SHARDING[BEFORE], "before", "exec"), names)
    exec(compile(SHARDING[heading], heading, "exec"), names)
    axes = names["layout"].block_axes
    spread = {
        jax.tree_util.keystr(path): leaf.sharding.spec[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(names["state"])
        if leaf.ndim == 3
    }
    assert spread
    assert set(spread.values()) == {axes if len(axes) > 1 else axes[0]}
    for leaf in jax.tree.leaves(names["params"]):
        assert np.isfinite(np.asarray(leaf)).all()


def test_there_is_a_program_for_every_mode() -> None:
    assert len(MODES) == 8


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    for heading, program in _programs("memory.md").items():
        exec(compile(program, heading, "exec"), {})
    assert "8.0 bytes a parameter" in capsys.readouterr().out


def test_checkpoints() -> None:
    names: dict[str, Any] = {}
    for heading, program in _programs("checkpoints.md").items():
        exec(compile(program, heading, "exec"), names)
    assert names["found"].step == names["step"] == 100
    assert names["found"].params["w"].sharding.spec[0] == "fsdp"


def test_the_table_of_checkpoints_is_what_was_measured() -> None:
    page = (DOCS / "checkpoints.md").read_text()
    assert checkpoints_table.filled(page, checkpoints_table.table()) == page
