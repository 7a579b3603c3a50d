"""Two processes save and restore together; one process reads what they wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ema_optax import checkpoint, reconstruction
from tests import launch

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes of two devices each wrote, after all their own checks."""
    folder = tmp_path_factory.mktemp("two")
    assert launch.run("tests.programs.two_processes", folder).endswith("done\n")
    return folder


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_one_process_reads_what_two_wrote(folder, version):
    """Resharded onto this process's one device, verified, the same bits."""
    like = {"w": jax.ShapeDtypeStruct((8, 1200), jnp.float32)}
    step = 1 if version == "v0" else 2  # the other was damaged on purpose
    restored = checkpoint.restore(folder / version, like=like, step=step)
    np.testing.assert_array_equal(restored["w"], np.load(folder / "shadow.npy"))
    found = checkpoint.describe(folder / version, step=step)
    assert found.trees["shadow"].count == 3


def test_one_process_finds_the_damage_too(folder):
    """The pieces of both processes are compared."""
    with pytest.raises(checkpoint.CorruptCheckpointError, match="leaf 'w' of the shad"):
        checkpoint.verify(folder / "v0", step=2)


def test_one_process_reconstructs_the_same(folder):
    """What two processes summed, each for its devices, to the bit."""
    found = checkpoint.snapshots(folder / "small", verify=False)  # step 6 was damaged
    wide = [snapshot for snapshot in found if snapshot.exponent < 10]
    narrow = [s for s in found if s.exponent > 10]
    assert [s.step for s in wide] == [s.step for s in narrow] == list(range(1, 7))
    got = reconstruction.reconstruct(found, width=0.11)
    expected = np.load(folder / "reconstructed.npy")
    np.testing.assert_array_equal(got.tree["w"][:6], expected[:6])
    wrong = np.asarray(got.tree["w"] != expected)
    assert wrong.sum() == 1  # the flipped bit is in what the other process wrote
    with pytest.raises(checkpoint.CorruptCheckpointError, match="leaf 'w' of the shad"):
        reconstruction.reconstruct(checkpoint.snapshots(folder / "small"), width=0.11)
