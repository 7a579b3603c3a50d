"""Whether compiled programs keep arrays in other memories than the device's."""

import concurrent.futures
import functools
import warnings
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding


@functools.cache
def is_kept(kind: str | None, platform: str) -> bool:
    """Whether a result of a compiled program lies in the memory asked for.

    GPUs and TPUs have such memories. On CPUs some versions of JAX compile the transfer
    away, without an error: there a small program is compiled and asked.

    Args:
        kind: `Sharding.memory_kind`, such as "pinned_host".
        platform: Platform of the devices, such as "cpu".
    """
    if platform != "cpu" or kind is None or kind == "device":
        return True
    # A thread of its own: a mesh that the caller has set is of other devices.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_compiled_kind, kind).result() == kind


def _compiled_kind(kind: str) -> str | None:
    device = jax.local_devices(backend="cpu")[0]
    on_device = SingleDeviceSharding(device)
    in_memory = on_device.with_memory_kind(kind)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=on_device)
    compiled = jax.jit(lambda x: jax.device_put(x, in_memory)).lower(number).compile()
    return compiled.output_shardings.memory_kind


def warn_of(kinds: Iterable[str | None]) -> None:
    """Warns the caller of `init` that shadows stay in the memory of the device."""
    memories = " and ".join(sorted({str(kind) for kind in kinds}))
    warnings.warn(
        f"The shadow stays in device memory: on CPUs, what this JAX {jax.__version__} "
        f"compiles does not leave it in {memories}. Its numbers and checkpoints are "
        "the same. GPUs and TPUs have such a memory, and with newer versions of JAX a "
        "CPU has pinned_host.",
        stacklevel=4,
    )
