"""Runs of other programs, for the tests of adopting, as Orbax writes them."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import v1

DECAY = 0.9


def params(seed=0, dtype=np.float32):
    """Returns params with a list, an integer and an empty dict in them."""
    draw = np.random.default_rng(seed)

    def floats(*shape):
        return jnp.asarray(draw.normal(size=shape), dtype)

    return {
        "dense": {"kernel": floats(3, 4), "bias": floats(4)},
        "blocks": [{"w": floats(2, 2)}, {"w": floats(2, 2)}],
        "table": jnp.arange(3),
        "none": {},
    }


def average(seed=1):
    """Returns an average of the params."""
    return params(seed)


def state(**more):
    """Returns a train state as a dict, with Adam's moments beside."""
    moments = params(7)
    adam = {"count": jnp.int32(300), "mu": moments, "nu": moments}
    return {"step": 300, "params": params(), "opt_state": [adam, {}], **more}


def save(folder, tree, step=300):
    """Saves a tree as one step of a CheckpointManager."""
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave(tree))
    return folder


def composite(folder, step=300, **items):
    """Saves trees as the items of one step."""
    args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=ocp.args.Composite(**args))
    return folder


def written(folder, layout, tree):
    """Writes a tree in one of Orbax's layouts, and returns what to pass."""
    root = folder / "theirs"
    if layout == "manager":
        return save(root, tree)
    if layout == "step":
        return save(root, tree) / "300"
    if layout == "item":
        return save(root, tree) / "300" / "default"
    if layout == "prefix":
        options = ocp.CheckpointManagerOptions(step_prefix="ckpt")
        with ocp.CheckpointManager(root, options=options) as manager:
            manager.save(300, args=ocp.args.StandardSave(tree))
        return root
    if layout == "composite":
        return composite(root, state=tree)
    place = root / "step_300"
    if layout == "v1":
        getattr(v1, "save", v1.save_pytree)(place, tree)  # as it was called before
    elif layout == "v1 items":
        v1.save_checkpointables(place, {"mine": tree})
    else:
        kinds = {
            "zarr": {"use_ocdbt": False},
            "ocdbt": {"use_ocdbt": True},
            "zarr3": {"use_ocdbt": True, "use_zarr3": True},
            "zarr3 files": {"use_ocdbt": False, "use_zarr3": True},
        }
        handler = ocp.PyTreeCheckpointHandler(**kinds[layout])
        with ocp.Checkpointer(handler) as writer:
            writer.save(place, args=ocp.args.PyTreeSave(tree))
    return place


LAYOUTS = (
    *("manager", "step", "item", "prefix", "composite", "v1", "v1 items"),
    *("zarr", "ocdbt", "zarr3", "zarr3 files"),
)


def same(ours, theirs):
    """Compares two trees, bit for bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
