"""Whole programs that train with Shampoo; run them from the root of the repository."""
