"""Checkpoints that open on any mesh, and say so where they do not fit."""

from shampoo_optax.checkpoint.view import abstract_view as abstract_view
from shampoo_optax.checkpoint.view import from_param_view as from_param_view
from shampoo_optax.checkpoint.view import to_param_view as to_param_view
