"""What both examples share: the loop, checkpoints, measurements and the report."""
