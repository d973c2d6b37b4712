"""What `describe` says is what the compiled program and the state do."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

import shampoo_optax as so
from benchmarks import hlo
from tests.test_sharded import BLOCK, MODES, abstract


@pytest.mark.parametrize("mode", ["fsdp8", "zero18", "hsdp", "tensor", "resharded"])
def test_bytes_on_the_wire_and_of_the_state(mode: str) -> None:
    chosen = MODES[mode]
    layout = chosen.layout()
    tx = so.scale_by_shampoo(layout=layout)
    params, state = abstract(chosen, layout, tx)
    said = so.describe(params, layout, tx)
    program = jax.jit(tx.update).lower(params, state).compile()
    sent = sum(one.wire for one in hlo.collectives(program.as_text()))
    assert sent == pytest.approx(said.sent_bytes, rel=1e-6)
    held = program.memory_analysis().argument_size_in_bytes
    gradient = sum(
        4 * math.prod(x.sharding.shard_shape(x.shape)) for x in params.values()
    )
    assert held == pytest.approx(said.state_bytes + gradient, rel=0.1)


def test_blocks_are_counted_once() -> None:
    for mode in MODES.values():
        plain = so.BlockLayout(BLOCK).plan(
            list(mode.shapes), list(mode.shapes.values())
        )
        said = so.describe(mode.like(), mode.layout())
        assert sum(blocks for blocks, _ in said.stacks.values()) == sum(
            shape[0] for shape in plain.stacks.values()
        )
        assert all(slots % said.devices == 0 for _, slots in said.stacks.values())
        assert said.balance >= 1


def test_ways_and_advice_in_words() -> None:
    said = str(so.describe(MODES["resharded"].like(), MODES["resharded"].layout()))
    assert "24x16: cut anew, from side 0 to side 1, over ('fsdp',)" in said
    gathered = str(so.describe(MODES["gathered"].like(), MODES["gathered"].layout()))
    assert "dimension 0 fits no blocks and is gathered" in gathered
    mesh = jax.make_mesh((8,), ("d",))
    layout = so.BlockLayout(1024, mesh=mesh, block_axes=("d",))
    table = {"table": jax.ShapeDtypeStruct((32000, 1024), jnp.float32)}
    said = str(so.describe(table, layout))
    assert "1 blocks for 8 devices: max_preconditioner_dim=256" in said
    assert "one_sided_above=math.inf" in said
    assert "advice" not in str(so.describe(table, so.BlockLayout()))
