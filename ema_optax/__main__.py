"""`python -m ema_optax`, the same as the command `ema-optax`."""

from ema_optax._cli import main

if __name__ == "__main__":
    raise SystemExit(main())
