"""Has a command compute in 64 bits, for runs that did."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def in_64_bits() -> Iterator[None]:
    """Enables JAX's 64-bit types inside the block."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
