"""Sentences for bad input: which call, which parameter, what came, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp

Path = tuple[Any, ...]


def name_of(path: Path) -> str:
    """A parameter's path as people write it: ``layers/0/kernel``.

    Flax NNX hands boxed leaves to ``init`` and bare ones to ``update``; the box's
    trailing ``value`` is dropped so that both have one name.

    Example:
      >>> name_of((jax.tree_util.DictKey("dense"), jax.tree_util.GetAttrKey("value")))
      'dense'
    """
    last = path[-1] if path else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value":
        path = path[:-1]
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name or "(the only parameter)"


@dataclass(frozen=True)
class Range:
    """An interval of the real line."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


DECAY = Range(0.0, 1.0, open_high=True)
CLOSED_DECAY = Range(0.0, 1.0)
POSITIVE = Range(0.0, math.inf, open_low=True, open_high=True)
NON_NEGATIVE = Range(0.0, math.inf, open_high=True)

# What every call wants of a hyperparameter with this name.
RANGES = {
    "learning_rate": NON_NEGATIVE,
    "peak_learning_rate": POSITIVE,
    "b1": DECAY,
    "b2": CLOSED_DECAY,
    "b3": DECAY,
    "eps": POSITIVE,
    "eps_rel": DECAY,
    "weight_decay": NON_NEGATIVE,
    "momentum": DECAY,
    "dampening": DECAY,
    "initial_accumulator_value": NON_NEGATIVE,
}


def numbers(call: str, **values: Any) -> None:
    """Raise unless every hyperparameter is a number in its range.

    None, schedules, arrays and tracers pass: ``optax.inject_hyperparams`` hands over
    every number as a traced array, whose value is not known at construction.

    Example:
      >>> numbers("shampoo", b1=1.5)
      Traceback (most recent call last):
      ...
      ValueError: shampoo(b1=1.5): b1 must be a number in [0, 1).
    """
    for name, value in values.items():
        if value is not None and not callable(value):
            number(call, name, value, RANGES[name])


def number(call: str, name: str, value: Any, within: Range) -> None:
    """Raise unless one number lies in a range, as :func:`numbers` does."""
    if isinstance(value, jax.Array):
        return
    wanted = f"{call}({name}={value!r}): {name} must be a number in {within}."
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(wanted)
    if float(value) not in within:  # a NaN is in no range
        raise ValueError(wanted)


def whole(call: str, name: str, value: Any, *, low: int, infinite: bool) -> None:
    """Raise unless a static whole number of at least ``low`` (or infinity) came.

    Example:
      >>> whole("Refresh", "precondition_frequency", 0, low=1, infinite=False)
      Traceback (most recent call last):
      ...
      ValueError: Refresh(precondition_frequency=0): precondition_frequency must be \
a whole number of at least 1.
    """
    wanted = f"{name} must be a whole number of at least {low}"
    wanted += " or math.inf." if infinite else "."
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{call}({name}=...): {wanted} It decides shapes or the program, so it "
            "cannot be traced: under optax.inject_hyperparams leave it inside its "
            "frozen object."
        )
    if infinite and value == math.inf:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{call}({name}={value!r}): {wanted}")
    if value < low:
        raise ValueError(f"{call}({name}={value!r}): {wanted}")


def choice(call: str, name: str, value: Any, options: Sequence[str]) -> None:
    """Raise unless ``value`` is one of the named options.

    Example:
      >>> choice("graft", "scope", "tensor", ("block", "array"))
      Traceback (most recent call last):
      ...
      ValueError: graft(scope='tensor'): scope must be one of 'block', 'array'.
    """
    if value not in options:
        listed = ", ".join(map(repr, options))
        raise ValueError(f"{call}({name}={value!r}): {name} must be one of {listed}.")


def leaf(call: str, path: Path, value: Any) -> None:
    """Raise unless a leaf can be optimised: a real floating-point array or scalar."""
    try:
        dtype = jnp.result_type(value)
    except TypeError:
        raise TypeError(
            f"{call}: parameter '{name_of(path)}' is {value!r} of type "
            f"{type(value).__name__}; wanted a floating-point array. Take it out of "
            "the parameters, or mask it with optax.masked."
        ) from None
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{call}: parameter '{name_of(path)}' is {dtype.name}, and complex "
            "parameters are not supported; wrap the optimizer in "
            "optax.contrib.split_real_and_imaginary."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{call}: parameter '{name_of(path)}' is {dtype.name}; wanted a "
            "floating-point array. Leave it out with optax.masked or optax.partition."
        )
