"""Checkpoints that open on any mesh, and say so where they do not fit.

Imported on its own, ``from shampoo_optax import checkpoint``: it needs Orbax
(``pip install shampoo-optax[checkpoint]``).
"""

from shampoo_optax.checkpoint.digest import digest as digest
from shampoo_optax.checkpoint.reference import from_reference as from_reference
from shampoo_optax.checkpoint.spec import DamagedCheckpoint as DamagedCheckpoint
from shampoo_optax.checkpoint.store import Restored as Restored
from shampoo_optax.checkpoint.store import items as items
from shampoo_optax.checkpoint.store import latest_verified_step as latest_verified_step
from shampoo_optax.checkpoint.store import manager as manager
from shampoo_optax.checkpoint.store import read_extra as read_extra
from shampoo_optax.checkpoint.store import restore as restore
from shampoo_optax.checkpoint.store import save as save
from shampoo_optax.checkpoint.view import abstract_view as abstract_view
from shampoo_optax.checkpoint.view import from_param_view as from_param_view
from shampoo_optax.checkpoint.view import to_param_view as to_param_view
