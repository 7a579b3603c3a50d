"""Faults by the hundred, counted: what was tried, what was told, what was lost.

    python -m tests.programs.fault_run [--kills N] [--host-kills N] [--flips N]
        [--seed S]

Ends with code 1 if a committed step was lost, or if anything came back wrong unsaid.
Steps are those of `saving_run`: every element tells its step.
"""

import argparse
import collections
import contextlib
import dataclasses
import logging
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ema_optax
from ema_optax import checkpoint
from tests import killed_hosts
from tests.programs import saving_run

NOBODY = 65534


@dataclasses.dataclass
class Count:
    """What became of one kind of fault.

    Attributes:
        tried: Faults.
        told: Those that ended in a clear error.
        harmless: Those after which everything was read as it was saved.
        lost: Committed steps that were not found, or could not be read, afterwards.
        silent: Wrong values without an error, or an error that is not clear.
    """

    tried: int = 0
    told: int = 0
    harmless: int = 0
    lost: int = 0
    silent: int = 0


class Counts(collections.defaultdict):
    """Counts by kind of fault."""

    def __init__(self):
        super().__init__(Count)

    def table(self):
        names = [field.name for field in dataclasses.fields(Count)]
        lines = [f"{'fault':38}" + "".join(f"{name:>10}" for name in names)]
        total = Count(*(sum(getattr(c, n) for c in self.values()) for n in names))
        for kind, count in [*self.items(), ("all", total)]:
            figures = (f"{getattr(count, name):10}" for name in names)
            lines.append(f"{kind:38}" + "".join(figures))
        return "\n".join(lines)

    def bad(self):
        return sum(count.lost + count.silent for count in self.values())


def same(found, expected):
    """Returns whether two trees are equal to the bit."""
    a, b = jax.tree.leaves(found), jax.tree.leaves(expected)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True)
    )


def save_until_killed(folder, log):
    """What a child does."""
    logging.disable(logging.ERROR)
    sys.stdout = open(log, "w", buffering=1)  # noqa: SIM115 until it is killed
    saving_run.main(folder)


def kills(counts, rounds, rng, scratch):
    """Kills a run that saves as fast as it can, with retention, again and again.

    Children come from a server that has imported everything and started no thread.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.programs.saving_run"])
    folder, log = scratch / "kills", scratch / "log"
    checkpoint.save(folder, *saving_run.run(1), step=1)
    newest, unfinished, count = 1, 0, counts["SIGKILL while saving"]
    target = saving_run.run(0)
    for _ in range(rounds):
        log.write_text("")
        child = context.Process(target=save_until_killed, args=(folder, log))
        child.start()
        waited = time.monotonic() + 60
        while "ready" not in log.read_text():
            assert time.monotonic() < waited, "the child does not start"
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.8))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        count.tried += 1
        committed = [int(x) for x in log.read_text().split() if x.isdigit()]
        unfinished += any("tmp" in path.name for path in folder.iterdir())
        try:
            found = checkpoint.describe(folder).step
            count.lost += found < max(committed, default=newest)
            newest = max(newest, found)
            # Its two newest steps, both of which retention keeps.
            steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
            for step in steps[-saving_run.KEPT :]:
                read = checkpoint.resume(folder, *target, step=step)
                right = same(read, saving_run.run(step))
                count.silent += not right
                count.harmless += right and step == found
        except Exception as error:
            print(f"after a kill: {error!r}")
            count.lost += 1
    print(f"{unfinished} of {rounds} kills met a save; the run came to step {newest}.")


def kills_of_one_of_two(counts, rounds, rng, scratch):
    """Kills one of two processes that save a sharded run, at any moment of a save."""
    folder, count = scratch / "hosts", counts["SIGKILL of one of two processes"]
    checkpoint.save(folder, *saving_run.run(1), step=1)
    newest, target = 1, saving_run.run(0)
    for turn in range(rounds):
        outputs = killed_hosts.kill(folder, "never", turn % 2, rng.uniform(0, 0.3))
        count.tried += 1
        found = checkpoint.describe(folder).step
        count.lost += found < max(killed_hosts.said(outputs, "saved"))
        # Both resumed from what the round before had left, and held it against it.
        count.lost += killed_hosts.said(outputs, "resumed") != [newest, newest]
        right = same(checkpoint.resume(folder, *target), saving_run.run(found))
        count.harmless += right
        count.silent += not right
        newest = found


def kind_of(path, item):
    """Returns what a file of a step is, by its name."""
    name = path.relative_to(item).as_posix()
    if "/d/" in f"/{name}":
        return "arrays"
    for part in ("checksums", "manifest.json", "manifest.ocdbt", "array_metadatas"):
        if part in name:
            return part
    return "Orbax's metadata"


def read_all(folder, step):
    """Returns all that can be read of a step."""
    target = saving_run.run(0)
    described = checkpoint.describe(folder, step=step)
    params, state = checkpoint.resume(folder, *target, step=step)
    shadow = checkpoint.restore(folder, "shadow", like=target[0], step=step)
    return described.step, params, state, shadow


def meet(count, folder, step, expected):
    """Reads a step that was tampered with, and counts what happens."""
    count.tried += 1
    try:
        found = read_all(folder, step)
    except (checkpoint.CorruptCheckpointError, FileNotFoundError) as error:
        clear = f"tep {step}" in str(error)  # Step or step
        count.told += clear
        count.silent += not clear
    except Exception as error:
        print(f"an unclear error: {error!r}"[:500])
        count.silent += 1
    else:
        right = same(found[1:], expected)
        count.harmless += right
        count.silent += not right


def damages(counts, flips, rng, scratch):
    """Flips bits, cuts, removes and swaps files of every kind, and edits manifests."""
    folder = scratch / "damage"
    for step in (1, 2):
        checkpoint.save(folder, *saving_run.run(step), step=step)
    item = folder / "2"
    params, state = saving_run.run(2)
    expected = (params, state, state.shadow)
    files = collections.defaultdict(list)
    for path in sorted(p for p in item.rglob("*") if p.is_file()):
        if path.stat().st_size:
            files[kind_of(path, item)].append(path)
    kinds = sorted(files)

    def with_file(what, path, tamper):
        whole = path.read_bytes()
        tamper(whole)
        meet(counts[what], folder, 2, expected)
        path.write_bytes(whole)

    for turn in range(flips):
        kind = kinds[turn % len(kinds)]
        path = rng.choice(files[kind])

        def flip(whole, path=path):
            data, bit = bytearray(whole), rng.randrange(8 * len(whole))
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)

        with_file(f"flipped bit: {kind}", path, flip)
    for kind in kinds:
        for path in files[kind]:
            with_file(
                "cut file", path, lambda w, p=path: p.write_bytes(w[: len(w) // 2])
            )
            with_file("emptied file", path, lambda w, p=path: p.write_bytes(b""))
            with_file("removed file", path, lambda w, p=path: p.unlink())
            other = folder / "1" / path.relative_to(item)
            if other.exists():
                with_file(
                    "file of another step",
                    path,
                    lambda w, p=path, o=other: p.write_bytes(o.read_bytes()),
                )
    others = [p for p in (folder / "1").rglob("d/*") if p.is_file()]
    for path in files["arrays"]:
        with_file(
            "arrays of another step",
            path,
            lambda w, p=path: p.write_bytes(rng.choice(others).read_bytes()),
        )
    (manifest,) = files["manifest.json"]
    for edit in (
        ("float32", "float16"),
        ("200", "100"),
        ('"count":2', '"count":3'),
        ('"count": 2', '"count": 3'),
        ("shadow", "shadov"),
        ('"every":1', '"every":9'),
        ("0.9", "0.8"),
        ('"format"', '"Format"'),
        ("}", ""),
        ("{", "[" * 5000 + "{"),
    ):
        text = manifest.read_text()
        if edit[0] in text:
            changed = text.replace(*edit, 1)
            with_file(
                "manifest edited by hand",
                manifest,
                lambda w, c=changed: manifest.write_text(c),
            )
    meet(Count(), folder, 2, expected)  # all is as it was
    assert same(read_all(folder, 2)[1:], expected)


def full_disk(counts, rng, scratch):
    """Saves onto a disk that is full before they end: of each size."""
    folder, count = scratch / "full", counts["disk full"]
    checkpoint.save(folder, *saving_run.run(1), step=1)
    small = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        place = scratch / "tmpfs"
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(place)]
        subprocess.run(mount, check=True, capture_output=True)
        small = place
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for turn in range(10):
            where = folder
            if small is not None and turn % 2:
                where = small / "run"
                shutil.rmtree(where, ignore_errors=True)
                shutil.copytree(folder, where)
            else:
                size = rng.randrange(100, 150_000)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            count.tried += 1
            try:
                checkpoint.save(where, *saving_run.run(2), step=2)
                count.silent += 1
            except (OSError, ValueError):
                count.told += 1
            except Exception as error:
                print(f"an unclear error: {error!r}"[:300])
                count.silent += 1
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            whole = same(
                checkpoint.resume(where, *saving_run.run(0)), saving_run.run(1)
            )
            count.lost += not whole or checkpoint.describe(where).step != 1
    finally:
        if small is not None:
            subprocess.run(["umount", str(small)], check=True)
    if small is None:
        print("No tmpfs can be mounted here: files were limited instead.")


def forbidden(counts, scratch):
    """Saves and reads as a user who may not; only root can become one."""
    if os.geteuid() != 0:
        print("Not root: what happens without permission was not tried.")
        return
    folder, count = scratch / "mine", counts["no permission"]
    checkpoint.save(folder, *saving_run.run(1), step=1)
    scratch.chmod(0o755)
    folder.chmod(0o555)
    secret = folder / "1"
    try:
        os.seteuid(NOBODY)
        count.tried += 1
        try:
            checkpoint.save(folder, *saving_run.run(2), step=2)
            count.silent += 1
        except OSError as error:
            clear = "Permission denied" in str(error)
            count.told += clear
            count.silent += not clear
        os.seteuid(0)
        secret.chmod(0o000)
        os.seteuid(NOBODY)
        for read in (
            lambda: checkpoint.describe(folder),
            lambda: checkpoint.restore(folder, like=saving_run.run(0)[0]),
            lambda: checkpoint.resume(folder, *saving_run.run(0)),
        ):
            count.tried += 1
            try:
                read()
                count.silent += 1
            except (PermissionError, checkpoint.CorruptCheckpointError):
                count.told += 1
            except Exception as error:
                print(f"an unclear error: {error!r}"[:300])
                count.silent += 1
    finally:
        os.seteuid(0)
        secret.chmod(0o755)
        folder.chmod(0o755)
    count.lost += not same(
        checkpoint.resume(folder, *saving_run.run(0)), saving_run.run(1)
    )


def bursts(counts, rng):
    """Gradients that are not finite, in bursts, for 1,000 steps.

    The params are kept as they are at such a step, as `optax.apply_if_finite` and
    every training loop with a loss scale does; and once they are not.
    """
    optimizer = optax.chain(optax.sgd(0.1), ema_optax.ema_params(0.99))
    draw = np.random.default_rng(0).standard_normal((1000, 64)).astype("float32")
    bad = np.zeros((1000, 64), bool)
    count = counts["NaN and Inf in gradients"]
    for start in range(0, 1000, 50):
        length = rng.randrange(1, 20)
        bad[start : start + length, rng.randrange(64) :] = True
        count.tried += length
    values = np.where(np.arange(64) % 2, np.nan, np.inf).astype("float32")
    grads = np.where(bad, values, draw)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update({"w": grads}, state, params)
        new = optax.apply_updates(params, updates)
        kept = jax.tree.map(lambda n, p: jnp.where(jnp.isfinite(n), n, p), new, params)
        return kept, state

    params = {"w": jnp.zeros(64)}
    state = optimizer.init(params)
    shadow = np.zeros(64)
    for t, row in enumerate(grads, start=1):
        before = np.asarray(params["w"])
        params, state = step(params, state, jnp.asarray(row))
        beta = min(0.99, (1 + t) / (10 + t))
        seen = np.asarray(params["w"], np.float64)
        fine = ~bad[t - 1]
        assert (np.asarray(params["w"])[~fine] == before[~fine]).all()
        shadow[fine] += (1 - beta) * (seen[fine] - shadow[fine])
    found = np.asarray(state[1].shadow["w"], np.float64)
    close = np.allclose(found, shadow, rtol=1e-5, atol=1e-6)
    count.harmless, count.silent = (count.tried, 0) if close else (0, count.tried)


def _unraised(what):
    """Passes over what TensorStore's reads call back when Orbax's loop is closed."""
    if "Event loop is closed" not in str(what.exc_value):
        sys.__unraisablehook__(what)


def main(argv=None):
    """Runs all of it, prints the table, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--host-kills", type=int, default=4)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.disable(logging.ERROR)  # Orbax logs what is then raised
    sys.unraisablehook = _unraised
    rng, counts = random.Random(args.seed), Counts()
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        for what, run in (
            ("kills", lambda: kills(counts, args.kills, rng, scratch)),
            (
                "kills of one of two",
                lambda: kills_of_one_of_two(counts, args.host_kills, rng, scratch),
            ),
            ("damage", lambda: damages(counts, args.flips, rng, scratch)),
            ("full disk", lambda: full_disk(counts, rng, scratch)),
            ("permissions", lambda: forbidden(counts, scratch)),
            ("bursts", lambda: bursts(counts, rng)),
        ):
            start = time.monotonic()
            run()
            print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)
    print(counts.table())
    return 1 if counts.bad() else 0


if __name__ == "__main__":
    sys.exit(main())
