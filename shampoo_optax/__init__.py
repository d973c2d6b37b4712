"""Distributed Shampoo for JAX: composable Optax gradient transformations."""

from importlib.metadata import PackageNotFoundError, version

from shampoo_optax.alias import kl_shampoo as kl_shampoo
from shampoo_optax.alias import shampoo as shampoo
from shampoo_optax.family import soap as soap
from shampoo_optax.family import spectral_descent as spectral_descent
from shampoo_optax.layout.block_layout import BlockLayout as BlockLayout
from shampoo_optax.linalg import bases as bases
from shampoo_optax.linalg import orthogonal as orthogonal
from shampoo_optax.linalg import roots as roots
from shampoo_optax.migrate import from_adam as from_adam
from shampoo_optax.migrate import warm_up as warm_up
from shampoo_optax.report import describe as describe
from shampoo_optax.scale_by import scale_by_shampoo as scale_by_shampoo
from shampoo_optax.scale_by import scale_by_soap as scale_by_soap
from shampoo_optax.scale_by import (
    scale_by_spectral_descent as scale_by_spectral_descent,
)
from shampoo_optax.shardings import state_shardings as state_shardings
from shampoo_optax.transforms import grafting as grafting
from shampoo_optax.transforms.averaging import AveragingState as AveragingState
from shampoo_optax.transforms.averaging import eval_params as eval_params
from shampoo_optax.transforms.averaging import primal_averaging as primal_averaging
from shampoo_optax.transforms.averaging import schedule_free as schedule_free
from shampoo_optax.transforms.blockwise import BlockwiseState as BlockwiseState
from shampoo_optax.transforms.blockwise import blockwise as blockwise
from shampoo_optax.transforms.eigenbasis import EigenbasisState as EigenbasisState
from shampoo_optax.transforms.eigenbasis import eigenbasis as eigenbasis
from shampoo_optax.transforms.filtering import FilterState as FilterState
from shampoo_optax.transforms.filtering import filter_gradient as filter_gradient
from shampoo_optax.transforms.graft import GraftState as GraftState
from shampoo_optax.transforms.graft import graft as graft
from shampoo_optax.transforms.kronecker import KroneckerState as KroneckerState
from shampoo_optax.transforms.kronecker import kronecker as kronecker
from shampoo_optax.transforms.refresh import Refresh as Refresh
from shampoo_optax.transforms.renewal import refresh_now as refresh_now
from shampoo_optax.transforms.spectral import sign as sign
from shampoo_optax.transforms.spectral import spectral as spectral
from shampoo_optax.transforms.state_dtypes import StateDtypes as StateDtypes
from shampoo_optax.transforms.weight_decay import add_weight_decay as add_weight_decay

try:
    __version__ = version("shampoo-optax")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"
