"""The root method for the platform that a program is compiled for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
from jax import lax

from shampoo_optax.linalg.eigh import Eigh
from shampoo_optax.linalg.method import RootMethod, Solution
from shampoo_optax.linalg.minimax import Minimax
from shampoo_optax.linalg.scaling import Damping


@dataclass(frozen=True)
class Auto:
    """Roots by eigendecomposition on a CPU, minimax quadratics elsewhere; the default.

    Equals ``cpu`` or ``accelerator``, by the platform that the program is compiled for,
    which need not be that of the process; a lowered program holds that one only. Where
    ``accelerator`` does not take a root, ``cpu`` takes its place. The size of a matrix
    does not matter: of small ones no method was measured on a GPU.

    Minimax roots want damping of ``smallest_eps_rel`` and more, by default 1e-6 of the
    largest eigenvalue. With less (``eps_rel=0``), choose :class:`Eigh`.

    Args:
      cpu: the method on CPUs.
      accelerator: the method on GPUs and TPUs.

    Example:
      >>> method, matrix = Auto(), jax.numpy.eye(2)
      >>> roots = jax.jit(lambda x: method.solve(
      ...     x, Damping(jax.numpy.float32(0), jax.numpy.float32(1e-6)), 4,
      ...     unit=jax.numpy.float32(1)))
      >>> program = roots.trace(matrix).lower(lowering_platforms=("tpu",)).as_text()
      >>> "eigh" in program.lower()
      False
    """

    cpu: RootMethod = field(default_factory=Eigh)
    accelerator: RootMethod = field(default_factory=Minimax)

    def clipping(self) -> Auto:
        """The same for matrices that rounding has given negative eigenvalues.

        An iteration refuses them; ``cpu`` takes the place of ``accelerator``.
        """
        return replace(self, accelerator=self.cpu)

    @property
    def max_residual(self) -> float:
        """1: ``solve`` gives residuals in units of what their method allows."""
        return 1.0

    def check(self, p: float) -> None:
        """Whatever ``cpu`` takes."""
        self.cpu.check(p)

    def solve(
        self, matrices: jax.Array, damping: Damping, p: float, *, unit: jax.Array
    ) -> Solution:
        """See :class:`RootMethod`."""

        def by(method: RootMethod) -> Callable[..., Solution]:
            def solve(
                matrices: jax.Array, damping: Damping, unit: jax.Array
            ) -> Solution:
                found = method.solve(matrices, damping, p, unit=unit)
                return Solution(found.root, found.residual / method.max_residual)

            return solve

        arguments = matrices, damping, unit
        try:
            self.accelerator.check(p)
        except ValueError:
            return by(self.cpu)(*arguments)
        return lax.platform_dependent(
            *arguments, cpu=by(self.cpu), default=by(self.accelerator)
        )
