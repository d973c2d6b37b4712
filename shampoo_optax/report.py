"""What a layout makes of a model, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import optax

from shampoo_optax._paths import Path
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.layout.merging import cost
from shampoo_optax.layout.plan import Box, Leaf, Plan
from shampoo_optax.shardings import state_shardings
from shampoo_optax.transforms._tree import Tree

EXCHANGED = 4  # bytes of an element on the wire: float32
# What a state's fields are called where it is large; counters and flags are others.
PARTS = ("factors", "roots", "bases", "mu", "nu", "trace")


@dataclass(frozen=True)
class Description:
    """Blocks, balance and traffic of a model; ``print`` it.

    Attributes:
      parameters: how many numbers the model has.
      ways: by path, how the blocks of a parameter reach their owners.
      stacks: by key, blocks and slots on all devices.
      sent_bytes: a device receives in a step, gradients in and updates out.
      balance: what slots cost over what blocks cost: dead slots, and zeros that fill.
      state_bytes: of one device's state; None without an optimizer.
      state_parts: the same by field: ``factors``, ``roots``, ``mu``.
      advice: what would serve better, if anything.
    """

    parameters: int
    devices: int
    ways: dict[str, str]
    stacks: dict[str, tuple[int, int]]
    sent_bytes: float
    balance: float
    state_bytes: int | None
    advice: tuple[str, ...]
    state_parts: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """A page for a terminal."""
        lines = [f"{self.parameters:,} parameters, {self.devices} owners of blocks"]
        width = max(map(len, self.ways), default=0)
        lines += [f"  {path:<{width}}  {way}" for path, way in self.ways.items()]
        for key, (blocks, slots) in self.stacks.items():
            lines.append(f"stack {key}: {blocks} blocks in {slots} slots")
        lines.append(f"balance: {self.balance:.2f} times an equal share of the blocks")
        lines.append(f"exchange: {self.sent_bytes / 1e6:.3g} MB a step and device")
        if self.state_bytes is not None:
            share = self.devices / max(1, self.parameters)
            lines.append(
                f"state: {self.state_bytes / 1e6:.3g} MB a device, "
                f"{self.state_bytes * share:.1f} bytes a parameter in all"
            )
            parts = [f"{n} {held * share:.1f}" for n, held in self.state_parts.items()]
            lines.append(f"  of which {', '.join(parts)}")
        return "\n".join(lines + [f"advice: {text}" for text in self.advice])


def describe(
    params: optax.Params,
    layout: BlockLayout = BlockLayout(),
    tx: optax.GradientTransformation | None = None,
) -> Description:
    """Say what a layout makes of parameters: blocks, their ways, balance and bytes.

    Args:
      params: or ``jax.ShapeDtypeStruct`` of their shapes. Nothing is computed.
      layout: which blocks, on which devices.
      tx: an optimizer with this layout in it, whose state is counted.

    Returns:
      The description; ``str`` of it is a page.

    Raises:
      ValueError: the layout does not fit the parameters, as in ``init``.

    Example:
      >>> params = {"w": jax.ShapeDtypeStruct((10, 4), jnp.float32)}
      >>> layout = BlockLayout(4)
      >>> print(describe(params, layout, scale_by_shampoo(layout=layout)))
      40 parameters, 1 owners of blocks
        w  10x4: blocks lie whole
      stack 4x4: 2 blocks in 2 slots
      stack 2x4: 1 blocks in 1 slots
      balance: 1.00 times an equal share of the blocks
      exchange: 0 MB a step and device
      state: 0.00104 MB a device, 26.0 bytes a parameter in all
        of which factors 8.4, roots 8.4, mu 4.0, nu 4.0, others 1.2
    """
    tree = Tree(params, layout)
    plan = tree.plan
    ways = {
        name: _way(leaf, plan)
        for name, leaf in zip(tree.names, plan.leaves, strict=True)
    }
    stacks = {
        key: (sum(number for _, number in _boxes(plan, key)), shape[0])
        for key, shape in plan.stacks.items()
    }
    parts = {} if tx is None else _state(tx, params, layout)
    return Description(
        parameters=sum(math.prod(leaf.shape) for leaf in plan.leaves),
        devices=plan.devices,
        ways=ways,
        stacks=stacks,
        sent_bytes=_sent(plan),
        balance=_balance(plan),
        state_bytes=None if tx is None else sum(parts.values()),
        advice=tuple(_advice(plan, stacks, layout)),
        state_parts=parts,
    )


def _way(leaf: Leaf, plan: Plan) -> str:
    shape = "x".join(map(str, leaf.shape)) or "scalar"
    if leaf.dims is None:
        return f"{shape}: the magnitude rule alone"
    route, steps = leaf.route, []
    for dim, axes in route.gathered:
        steps.append(f"dimension {dim} fits no blocks and is gathered over {axes}")
    if route.resharded is not None:
        axes, here, there = route.resharded
        steps.append(f"cut anew, from side {here} to side {there}, over {axes}")
    parts = {
        (group.axes, group.parts)
        for groups in plan.groups.values()
        for group in groups
        if group.parts > 1
        and any(
            plan.leaves[i] is leaf for pool, _ in group.members for i in pool.leaves
        )
    }
    steps += [f"parts of blocks are exchanged among {n} on {axes}" for axes, n in parts]
    if route.dealt:
        steps.append(f"copies on {route.dealt} share the blocks out")
    return f"{shape}: " + ("; ".join(steps) or "blocks lie whole")


def _boxes(plan: Plan, key: str) -> Iterator[tuple[Box, int]]:
    """What fills a stack: boxes, and the blocks of each on all devices."""
    for group in plan.groups[key]:
        # Sets of neighbours and copies hold cells of their own.
        sets = plan.devices // (group.shares * group.parts)
        for pool, box in group.members:
            yield box, pool.cells(box) * sets


def _balance(plan: Plan) -> float:
    held, needed = 0, 0
    for key, (slots, *shape) in plan.stacks.items():
        held += slots * cost(tuple(shape))
        needed += sum(number * cost(box.stacked) for box, number in _boxes(plan, key))
    return held / needed if needed else 1.0


def _sent(plan: Plan) -> float:
    """Bytes received for the exchange in and out, of one device."""
    total = 0.0
    for groups in plan.groups.values():
        for group in groups:
            own = math.prod(group.members[0][1].slot) * group.slots * EXCHANGED
            total += 2 * own * (1 - 1 / group.parts) + own * (group.shares - 1)
    for leaf in plan.leaves:
        size = math.prod(leaf.local) * EXCHANGED
        for _, axes in leaf.route.gathered:
            total += size * (1 - 1 / plan.along(axes))
        if leaf.route.resharded is not None:
            total += 2 * size * (1 - 1 / plan.along(leaf.route.resharded[0]))
    return total


def _state(
    tx: optax.GradientTransformation, params: optax.Params, layout: BlockLayout
) -> dict[str, int]:
    """Bytes of one device's state by the field that holds them, the most first."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params))
    shapes = [tuple(leaf.shape) for _, leaf in leaves]
    if layout.block_axes:
        where = jax.tree.leaves(state_shardings(tx, params, layout))
        pairs = zip(where, shapes, strict=True)
        shapes = [sharding.shard_shape(shape) for sharding, shape in pairs]
    found: dict[str, int] = {}
    for (path, leaf), shape in zip(leaves, shapes, strict=True):
        part = _part(path) if leaf.ndim else "others"
        held = math.prod(shape) * leaf.dtype.itemsize
        found[part] = found.get(part, 0) + held
    return dict(sorted(found.items(), key=lambda item: (item[0] == "others", -item[1])))


def _part(path: Path) -> str:
    """The field of a state that an array is in."""
    fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    known = [name for name in fields if name in PARTS]
    return known[-1] if known else "others"


def _advice(
    plan: Plan, stacks: dict[str, tuple[int, int]], layout: BlockLayout
) -> list[str]:
    advice = []
    blocks = sum(count for count, _ in stacks.values())
    size = layout.max_preconditioner_dim
    if blocks < plan.devices and size != math.inf:
        factor = 2 ** math.ceil(math.log2(plan.devices / max(blocks, 1)) / 2)
        smaller = max(128, int(size) // max(2, factor))
        if smaller < size:
            advice.append(
                f"{blocks} blocks for {plan.devices} devices: "
                f"max_preconditioner_dim={smaller} gives more of them work"
            )
    for key, (count, slots) in stacks.items():
        long = max(map(int, key.split("x")))
        if long > layout.largest_factor and 2 * count <= slots:
            advice.append(
                f"stack {key}: {count} blocks for {slots} slots; "
                "one_sided_above=math.inf cuts the long side and balances it"
            )
    return advice
