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
)

# Up to it a TPU's own default is Jacobi's rotations, too. How long they take for larger
# matrices is not known; products and Cholesky factors are what the device is for.
SMALL = 256


@dataclass(frozen=True)
class Auto:
    """Exact eigenbases on CPUs and GPUs, orthogonal iteration on TPUs; the default.

    Equals ``cpu``, ``gpu`` or ``tpu``, by the platform that the program is compiled
    for; on a TPU ``gpu``, which is Jacobi's rotations there, where matrices have 256
    rows or fewer.

    Args:
      cpu: the method on CPUs.
      gpu: the method on GPUs, and on what has no name here.
      tpu: the method on TPUs, for large matrices.

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

    def solve(self, matrices: jax.Array, basis: jax.Array) -> Basis:
        """See :class:`BasisMethod`."""
        if self.cpu == self.gpu and matrices.shape[-1] <= SMALL:
            return self.cpu.solve(matrices, basis)
        tpu = self.gpu if matrices.shape[-1] <= SMALL else self.tpu
        return lax.platform_dependent(
            matrices, basis, cpu=self.cpu.solve, tpu=tpu.solve, default=self.gpu.solve
        )
