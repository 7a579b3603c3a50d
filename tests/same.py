"""Whether two trees hold the same."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_same(actual, expected, ulps=0):
    """Structures, shapes, dtypes and bits are equal, wherever the arrays lie.

    Args:
        actual: Tree of arrays.
        expected: What it has to be.
        ulps: How far floats may be apart, in units in the last place of the largest of
            their array. Two programs round `s + w·d` once where XLA takes a fused
            multiply-add and twice elsewhere: with JAX 0.12 small leaves differ so.
    """
    if hasattr(actual, "changes"):  # what resume returns is a pair of its own
        actual = tuple(actual)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        if ulps and b.size and jnp.issubdtype(b.dtype, jnp.inexact):
            apart = ulps * float(jnp.finfo(b.dtype).eps) * float(np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=apart)
        else:
            np.testing.assert_array_equal(a, b)
