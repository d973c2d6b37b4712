"""Generators of data modules."""
