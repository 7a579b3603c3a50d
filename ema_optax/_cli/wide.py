"""64-bit types of JAX in a command, for runs that were trained with them."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def in_64_bits() -> Iterator[None]:
    """Enables JAX's 64-bit types inside the block."""
    usual = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", usual)
