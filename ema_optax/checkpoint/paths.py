"""The folders that checkpoints lie in: on a disk, or a URL of a bucket."""

from etils import epath

from ema_optax import arguments


def absolute(directory: epath.PathLike) -> epath.Path:
    """Returns a directory as Orbax wants it: whole, with `~` replaced.

    Raises:
        TypeError: If it is no path.
    """
    path = arguments.path(directory, "The directory of a checkpoint", "run/checkpoints")
    return epath.Path(path).expanduser().absolute()
