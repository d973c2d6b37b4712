"""The basis method for the platform that a program is compiled for."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
from jax import lax

from shampoo_optax.linalg.basis_methods import (
    Basis,
    BasisMethod,
    CholeskyQR2,
    Eigh,
    Jacobi,
)

# Above it the TPU compiler takes minutes for an eigendecomposition, which is divided
# and conquered there, one matrix after another; up to it, Jacobi's rotations.
SMALL = 256


@dataclass(frozen=True)
class Auto:
    """Exact eigenbases on CPUs and GPUs, orthogonal iteration on TPUs; the default.

    Equals ``cpu``, ``gpu`` or ``tpu``, by the platform that the program is compiled
    for; on a TPU ``small`` where matrices have 256 rows or fewer.

    Args:
      cpu: the method on CPUs.
      gpu: the method on GPUs, and on what has no name here.
      tpu: the method on TPUs.
      small: the method on TPUs for small matrices.

    Example:
      >>> solve = jax.jit(lambda x: Auto().solve(x, x).vectors)
      >>> traced = solve.trace(jax.numpy.ones((2, 512, 512)))
      >>> program = traced.lower(lowering_platforms=("tpu",)).as_text().lower()
      >>> "eigh" in program, "cholesky" in program
      (False, True)
    """

    cpu: BasisMethod = field(default_factory=Eigh)
    gpu: BasisMethod = field(default_factory=Eigh)
    tpu: BasisMethod = field(default_factory=CholeskyQR2)
    small: BasisMethod = field(default_factory=Jacobi)

    def solve(self, matrices: jax.Array, basis: jax.Array) -> Basis:
        """See :class:`BasisMethod`."""
        tpu = self.small if matrices.shape[-1] <= SMALL else self.tpu
        return lax.platform_dependent(
            matrices, basis, cpu=self.cpu.solve, tpu=tpu.solve, default=self.gpu.solve
        )
