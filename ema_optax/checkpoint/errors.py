"""Exceptions of reading and writing a checkpoint, by what a user can do about them."""

# pyright: strict


class CorruptCheckpointError(ValueError):
    """Data on disk is not what was saved: flipped bits, missing or truncated files."""
