"""A run on several devices: the mesh, and where parameters and batches lie on it."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import shampoo_optax as so
from examples.training.task import PyTree

MODES = {
    "zero1": "parameters everywhere, the optimizer's blocks spread",
    "fsdp": "parameters and blocks spread over all devices",
    "hsdp": "parameters spread in each half, blocks over both halves",
}


@dataclasses.dataclass(frozen=True)
class Spread:
    """Where everything lies.

    Attributes:
      mesh: of the devices.
      mode: one of MODES.
    """

    mesh: Mesh
    mode: str

    @property
    def axes(self) -> tuple[str, ...]:
        """Of the mesh: batches and the blocks of the optimizer go over all of them."""
        return self.mesh.axis_names

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Spreads a parameter along the longest dimension that comes out even.

        So kernels of 128x256 and 256x128 are cut alike, and their blocks share slots.
        """
        del path
        if self.mode == "zero1":
            return PartitionSpec()
        even = [i for i, n in enumerate(shape) if n % self.mesh.shape["fsdp"] == 0]
        if not even:
            return PartitionSpec()
        longest = max(even, key=lambda i: shape[i])
        return PartitionSpec(*[None] * longest, "fsdp")

    def layout(self, **options: Any) -> so.BlockLayout:
        """Makes the layout of Shampoo's blocks; AdamW's state lies by it as well."""
        return so.BlockLayout(
            mesh=self.mesh, block_axes=self.axes, param_specs=self.spec, **options
        )

    def place(self, params: PyTree) -> PyTree:
        """Copies parameters to where they lie."""

        def put(leaf: jax.Array) -> jax.Array:
            where = NamedSharding(self.mesh, self.spec("", leaf.shape))
            # On its own device an array would not be copied.
            return jax.device_put(jnp.copy(leaf), where)

        return jax.tree.map(put, params)

    def init(
        self, tx: optax.GradientTransformationExtraArgs, params: PyTree
    ) -> optax.OptState:
        """Makes an optimizer's state where it is to lie, never on one device."""
        where = so.state_shardings(tx, params, self.layout())
        return jax.jit(tx.init, out_shardings=where)(params)

    def everywhere(self, value: jax.Array) -> jax.Array:
        """Copies a counter to all devices."""
        return jax.device_put(value, NamedSharding(self.mesh, PartitionSpec()))

    def rows(self, batch: jax.Array) -> jax.Array:
        """Spreads a batch, inside a compiled function or outside."""
        where = NamedSharding(self.mesh, PartitionSpec(self.axes))
        if isinstance(batch, jax.core.Tracer):
            return jax.lax.with_sharding_constraint(batch, where)
        return jax.device_put(batch, where)


def new_spread(devices: int, mode: str, batch: int) -> Spread | None:
    """Starts JAX on some devices and lays a mesh over them; None for one device.

    Args:
      devices: how many. On a CPU that many are pretended, for which no array may have
        been made before.
      mode: one of MODES.
      batch: what must be split over them.

    Returns:
      The spread.

    Raises:
      SystemExit: with a sentence that says what does not come out even.
    """
    if devices == 1:
        return None
    if mode == "hsdp" and devices % 2:
        raise SystemExit(f"--mode hsdp has two halves: {devices} is not even.")
    if batch % devices:
        raise SystemExit(f"a batch of {batch} cannot be split over {devices} devices.")
    _start(devices)
    shape = {
        "zero1": {"data": devices},
        "fsdp": {"fsdp": devices},
        "hsdp": {"data": 2, "fsdp": devices // 2},
    }[mode]
    mesh = jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
        devices=jax.devices()[:devices],
    )
    return Spread(mesh, mode)


def _start(devices: int) -> None:
    with contextlib.suppress(RuntimeError):  # JAX has started: what there is must do
        jax.config.update("jax_num_cpu_devices", devices)  # says nothing of GPUs
    if len(jax.devices()) < devices:
        raise SystemExit(
            f"--devices {devices}: there are {len(jax.devices())} here "
            f"({jax.devices()[0].platform})."
        )
