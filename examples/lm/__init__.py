"""A byte-level language model on the Python standard library's own sources."""
