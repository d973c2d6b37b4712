"""The parts: one gradient transformation a file."""
