"""PyTorch's optimizers in a process of their own, a period of steps at a time.

``benchmarks.peers`` starts it, with an interpreter that has PyTorch and need not have
JAX, and asks for steps when it is that optimizer's turn. A request is a line of JSON on
the standard input, its answer a line on the standard output:

    {"do": "names"}                            -> {"names": [], "versions": {}}
    {"do": "start", "name": "", "shapes": []}  -> {"first_s": 0.0}
    {"do": "period", "steps": 10}              -> {"seconds": [], "state_bytes": 0}

A request that fails is answered by {"error": ...}. Options are each peer's defaults but
for learning rate, weight decay, the steps between refreshes, and the size of blocks
where it cuts blocks.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterable
from typing import Any, TextIO

RATE, WEIGHT_DECAY, FREQUENCY, BLOCK = 1e-3, 1e-4, 10, 256
PACKAGES = ("torch", "heavyball", "pytorch-optimizer", "distributed-shampoo")
SHARED = {"lr": RATE, "weight_decay": WEIGHT_DECAY}

# By name: the module that it takes, and how it is made of the module and parameters.
Maker = Callable[[Any, list[Any]], Any]


def heavyball(name: str, **options: Any) -> Maker:
    """One of HeavyBall's, not compiled, by its own switch for that.

    Compiled as by default, with every kernel tuned, the first steps took one to three
    minutes for three arrays on two cores, and KLShampoo ended in an assertion of
    Inductor's (torch 2.13, HeavyBall 3.2.1).
    """

    def make(package: Any, params: list[Any]) -> Any:
        package.utils.compile_mode = None
        return getattr(package, name)(params, **SHARED, **options)

    return make


def meta_shampoo(package: Any, params: list[Any]) -> Any:
    """Meta's Distributed Shampoo on one device, grafted to Adam as ours is.

    Weight decay is decoupled by default; how that is said differs between versions, as
    does the name of the grafting.
    """
    grafting = getattr(package, "AdamPreconditionerConfig", None)
    if grafting is None:
        grafting = package.AdamGraftingConfig
    return package.DistributedShampoo(
        params,
        **SHARED,
        betas=(0.9, 0.999),
        epsilon=1e-12,
        max_preconditioner_dim=BLOCK,
        precondition_frequency=FREQUENCY,
        start_preconditioning_step=FREQUENCY,
        grafting_config=grafting(beta2=0.999, epsilon=1e-8),
    )


MAKERS: dict[str, tuple[str, Maker]] = {
    "torch adamw": ("torch", lambda m, p: m.optim.AdamW(p, **SHARED)),
    "torch adamw fused": ("torch", lambda m, p: m.optim.AdamW(p, **SHARED, fused=True)),
    "Meta shampoo": ("distributed_shampoo", meta_shampoo),
    "heavyball SOAP": (
        "heavyball",
        heavyball("SOAP", precondition_frequency=FREQUENCY),
    ),
    "heavyball KLShampoo": (
        "heavyball",
        heavyball("KLShampoo", precondition_frequency=FREQUENCY),
    ),
    "heavyball PSGDKron": (
        "heavyball",
        heavyball("PSGDKron", preconditioner_update_probability=1 / FREQUENCY),
    ),
    "pytorch_optimizer Shampoo": (
        "pytorch_optimizer",
        lambda m, p: m.Shampoo(
            p,
            **SHARED,
            weight_decouple=True,
            preconditioning_compute_steps=FREQUENCY,
        ),
    ),
    "pytorch_optimizer ScalableShampoo": (
        "pytorch_optimizer",
        lambda m, p: m.ScalableShampoo(
            p,
            **SHARED,
            decoupled_weight_decay=True,
            block_size=BLOCK,
            start_preconditioning_step=FREQUENCY,
            preconditioning_compute_steps=FREQUENCY,
        ),
    ),
    "pytorch_optimizer SOAP": (
        "pytorch_optimizer",
        lambda m, p: m.SOAP(p, **SHARED, precondition_frequency=FREQUENCY),
    ),
}


def names() -> dict[str, Any]:
    """Which of them can be imported here."""
    found = {}
    for module in {module for module, _ in MAKERS.values()}:
        try:
            found[module] = importlib.import_module(module) is not None
        except ImportError:
            found[module] = False
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    here = [name for name, (module, _) in MAKERS.items() if found[module]]
    return {"names": here, "versions": versions}


def tensors(value: Any, seen: set[int]) -> Iterable[Any]:
    """Every tensor in a state, each once, wherever it hides."""
    import torch

    if id(value) in seen or isinstance(value, (types.ModuleType, type)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside = value
    elif hasattr(value, "__dict__"):
        inside = vars(value).values()
    for each in inside:
        yield from tensors(each, seen)


class Optimizer:
    """One optimizer on normal parameters and gradients of some shapes."""

    def __init__(self, name: str, shapes: list[list[int]]) -> None:
        """Make it, and take the first step."""
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        cuda = torch.cuda.is_available()
        self.wait = torch.cuda.synchronize if cuda else lambda: None
        device = "cuda" if cuda else "cpu"
        self.params = [
            torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes
        ]
        self.gradients = [torch.randn_like(p) for p in self.params]
        module, make = MAKERS[name]
        found = importlib.import_module(module)
        begin = time.perf_counter()
        self.optimizer = make(found, self.params)
        made = time.perf_counter() - begin
        self.first = made + self.once()

    def once(self) -> float:
        """One step, in seconds."""
        for param, gradient in zip(self.params, self.gradients, strict=True):
            param.grad = gradient.clone()  # some change it
        self.wait()
        begin = time.perf_counter()
        self.optimizer.step()
        self.wait()
        return time.perf_counter() - begin

    def state_bytes(self) -> int:
        """What it keeps beside the parameters."""
        own = {id(x) for x in (*self.params, *self.gradients)}
        own |= {id(param.grad) for param in self.params}
        state = tensors(self.optimizer.state, own)
        return sum(x.numel() * x.element_size() for x in state)


def answer(request: dict[str, Any], current: list[Optimizer]) -> dict[str, Any]:
    """What a request asks for."""
    if request["do"] == "names":
        return names()
    if request["do"] == "start":
        current.clear()
        current.append(Optimizer(request["name"], request["shapes"]))
        return {"first_s": current[0].first}
    seconds = [current[0].once() for _ in range(request["steps"])]
    return {"seconds": seconds, "state_bytes": current[0].state_bytes()}


def main(requests: TextIO) -> None:
    """Answer until the input ends; what peers print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    current: list[Optimizer] = []
    for line in requests:
        try:
            found = answer(json.loads(line), current)
        except Exception as error:  # a peer's, of any kind: the next may work
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main(sys.stdin)
