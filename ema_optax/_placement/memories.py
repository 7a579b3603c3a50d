"""Whether what is compiled leaves an array in another memory than the device's."""

import concurrent.futures
import functools
import warnings
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding


@functools.cache
def is_kept(kind: str | None, platform: str) -> bool:
    """Returns whether a result of a compiled program lies in the memory asked for.

    GPUs and TPUs have such memories. On CPUs some versions of JAX compile the transfer
    away, without an error: what compiles there is asked.

    Args:
        kind: "pinned_host", or what else `Sharding.memory_kind` may be.
        platform: Of the devices.
    """
    if platform != "cpu" or kind is None or kind == "device":
        return True
    # A thread of its own: a mesh that the caller has set is of other devices.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_compiled_kind, kind).result() == kind


def _compiled_kind(kind: str) -> str | None:
    device = jax.local_devices(backend="cpu")[0]
    here = SingleDeviceSharding(device)
    there = here.with_memory_kind(kind)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=here)
    compiled = jax.jit(lambda x: jax.device_put(x, there)).lower(number).compile()
    return compiled.output_shardings.memory_kind


def warn_of(kinds: Iterable[str | None]) -> None:
    """Warns whoever calls `init` that shadows stay in the memory of the device."""
    memories = " and ".join(sorted({str(kind) for kind in kinds}))
    warnings.warn(
        f"The shadow stays in device memory: on CPUs, what this JAX {jax.__version__} "
        f"compiles does not leave it in {memories}. Its numbers and checkpoints are "
        "the same. GPUs and TPUs have such a memory, and with newer versions of JAX a "
        "CPU has pinned_host.",
        stacklevel=4,
    )
