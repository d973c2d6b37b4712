"""Which blocks, and where they lie."""
