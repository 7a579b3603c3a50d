"""Averages with the package as it is installed, whatever else is missing.

python -W error tests/installed.py   in an environment with the base dependencies alone
"""

import pathlib

import jax.numpy as jnp
import optax

import ema_optax


def main():
    optimizer = optax.chain(optax.sgd(0.1), ema_optax.ema_params(0.9))
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    _, state = optimizer.update({"w": jnp.ones(3)}, state, params)
    assert ema_optax.shadow_params(state, params)["w"][0] < 1
    package = pathlib.Path(ema_optax.__file__).parent
    assert package.parent.name == "site-packages", package
    assert (package / "py.typed").exists()


if __name__ == "__main__":
    main()
