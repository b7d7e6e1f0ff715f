"""Checkpoints of training runs: what is in them, which are kept, what is done about damaged ones and full disks."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import lora_jax as lora
from experiments.errors import UserError
from experiments.training import checksum
from experiments.training import mesh as meshes
from experiments.training.checkpoints import Checkpoints
from experiments.training.mesh import MeshSizes

# Where one array of several cannot be read, Orbax closes its event loop before the others have answered.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

WIDTH = 512
TX = optax.adam(1e-2)


def base_on(sizes, seed=0):
    mesh = meshes.make_mesh(sizes)
    weight = jax.random.normal(jax.random.key(seed), (WIDTH, WIDTH))
    return {"w": jax.device_put(weight, NamedSharding(mesh, jax.P("fsdp", "tensor")))}


def state_on(sizes, seed=0, base_seed=0):
    """A training state whose adapter and optimizer state lie where the base does."""
    base = base_on(sizes, base_seed)
    delta = lora.init(jax.random.key(seed), base, {"w": lora.LoRA(8, axes=("in", "out"), dtype=jnp.bfloat16)})
    delta = jax.device_put(delta, lora.delta_shardings(base, delta))
    return lora.TrainState.create(base, delta, TX, jax.random.key(seed + 1))


def saved_leaves(state):
    return [
        jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves((state.delta, state.opt_state, state.step, state.key))
    ]


def same(one, other):
    for a, b in zip(saved_leaves(one), saved_leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


SAVED, OTHER = MeshSizes(data=2, fsdp=2, tensor=2), MeshSizes(fsdp=8)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with the checkpoints of steps 1 to 3, of which step 1 has the best score."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(directory, best="min", settings={"lr": 0.1}) as checkpoints:
        for step, score in ((1, 0.5), (2, None), (3, 0.7)):
            checkpoints.save(step, state_on(SAVED, seed=step), {"at": step}, score=score)
    return directory


@pytest.fixture
def copied(written, tmp_path):
    subprocess.run(["cp", "-r", written, tmp_path / "copy"], check=True)
    return tmp_path / "copy"


def opened(directory, settings=None, say=print):
    return Checkpoints(directory, best="min", settings={"lr": 0.1} if settings is None else settings, say=say)


def test_the_last_is_restored_onto_another_mesh(written):
    fresh = state_on(OTHER, seed=9)
    with opened(written) as checkpoints:
        restored, content = checkpoints.restore(fresh)
    assert content == {"at": 3}
    same(restored, state_on(SAVED, seed=3))
    assert restored.base is fresh.base
    for leaf, like in zip(saved_leaves(restored), saved_leaves(fresh)):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def test_the_base_is_not_written(written):
    stored = json.loads((written / "3" / "content" / "metadata").read_text())
    shapes = [tuple(shape) for shape, _ in stored["arrays"]]
    assert (WIDTH, WIDTH) not in shapes and len(shapes) == len(saved_leaves(state_on(SAVED)))
    assert stored["base"] == checksum.fingerprint(base_on(OTHER))  # the same on any mesh


def test_the_last_two_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, best="max") as checkpoints:
        for step, score in enumerate((0.1, 0.9, None, 0.3, None), start=1):
            checkpoints.save(step, state_on(OTHER, seed=step), {}, score=score)
    with Checkpoints(tmp_path, best="max") as checkpoints:
        checkpoints.save(6, state_on(OTHER, seed=6), {}, wait=True)
        best, step = checkpoints.best(state_on(OTHER))
    assert step == 2
    same(best, state_on(OTHER, seed=2))
    assert {path.name for path in tmp_path.iterdir() if path.name.isdecimal()} == {"2", "5", "6"}


def test_nothing_to_restore(tmp_path):
    state = state_on(OTHER)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state) == (state, None)
        with pytest.raises(UserError, match="no checkpoint has a score"):
            checkpoints.best(state)


def data(step):
    """The files that arrays are in, and those that say where."""
    return [path for path in (step / "state").rglob("d/*") if path.is_file()]


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def each(change):
    return lambda step: [change(path) for path in data(step)]


DAMAGE = {
    "a bit": each(flip),
    "cut": each(lambda path: os.truncate(path, path.stat().st_size // 2)),
    "emptied": each(lambda path: os.truncate(path, 0)),
    "gone": each(os.unlink),
    "the content": lambda step: (step / "content" / "metadata").write_text('{"content": {'),
    "the content gone": lambda step: (step / "content" / "metadata").unlink(),
    "another number": lambda step: (step / "content" / "metadata").write_text(
        (step / "content" / "metadata").read_text().replace('"checksums": [[', '"checksums": [[1')
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(copied, kind):
    DAMAGE[kind](copied / "3")
    said = []
    with opened(copied, say=said.append) as checkpoints:
        restored, content = checkpoints.restore(state_on(OTHER, seed=9))
        assert content == {"at": 2}
        same(restored, state_on(SAVED, seed=2))
        assert len(said) == 1 and "step 3 is damaged" in said[0] and said[0].endswith("going on from that of step 2")
        checkpoints.save(3, state_on(OTHER, seed=3), {"at": "3 again"}, wait=True)
    with opened(copied) as checkpoints:
        assert checkpoints.restore(state_on(OTHER, seed=9))[1] == {"at": "3 again"}


@pytest.mark.parametrize("at", [0.01, 0.3, 0.6, 0.99])
def test_a_bit_within_an_array(tmp_path, at):
    values = np.random.default_rng(0).random(50_000, np.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": values}, {})
        checkpoints.save(2, {"x": values + 1}, {})
    flip(max(data(tmp_path / "2"), key=lambda path: path.stat().st_size), at)
    said = []
    with Checkpoints(tmp_path, say=said.append) as checkpoints:
        restored, _ = checkpoints.restore({"x": values})
    np.testing.assert_array_equal(restored["x"], values)
    assert len(said) == 1 and len(said[0]) < 600


def test_no_whole_checkpoint(copied):
    for step in copied.iterdir():
        if step.name.isdecimal():
            DAMAGE["cut"](step)
    said = []
    with opened(copied, say=said.append) as checkpoints, pytest.raises(UserError, match="no checkpoint is intact"):
        checkpoints.restore(state_on(OTHER))
    assert len(said) == 3 and "going on" not in said[-1]


@pytest.mark.parametrize(
    ("settings", "state", "message"),
    [
        ({"lr": 0.2}, state_on, "step 3 was made with lr 0.1, not 0.2"),
        ({"lr": 0.1, "rank": 2}, state_on, "step 3 was made with rank None, not 2"),
        ({"lr": 0.1}, lambda sizes: state_on(sizes, base_seed=1), "on a base with other weights"),
        ({"lr": 0.1}, lambda sizes: {"x": np.ones(3, np.float32)}, "of another model or method"),
    ],
    ids=["setting", "a further setting", "base", "shapes"],
)
def test_of_another_run(written, settings, state, message):
    with opened(written, settings) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(state(OTHER))


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/checkpoints: a checkpoint cannot be opened"):
        Checkpoints(tmp_path / "file" / "checkpoints")


FULL = """
    import sys
    from pathlib import Path
    import numpy as np
    from experiments.errors import UserError
    from experiments.training.checkpoints import Checkpoints

    directory, small, large = Path(sys.argv[1]), np.zeros(4), np.random.default_rng(0).random(400_000)
    try:
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(1, {"x": small}, {"at": 1}, wait=True)
            checkpoints.save(2, {"x": large}, {"at": 2}, wait=True)
    except UserError as error:
        print(error)
    with Checkpoints(directory) as checkpoints:
        print(checkpoints.restore({"x": small})[1])
"""


def test_a_full_disk(tmp_path):
    # A file system of its own, in a namespace of its own, with room for the small checkpoint only.
    mounted = 'mount -t tmpfs -o size=2m tmpfs "$1" && shift && exec "$@"'
    script = tmp_path / "full.py"
    script.write_text(textwrap.dedent(FULL))
    (tmp_path / "disk").mkdir()
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mounted, "sh", tmp_path / "disk"]
    command += [sys.executable, script, tmp_path / "disk" / "checkpoints"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    message, state = done.stdout.splitlines()
    assert "a checkpoint cannot be written at step 2" in message and "No space left on device" in message
    assert state == "{'at': 1}"


def test_a_damaged_checkpoint_prints_nothing_of_its_own(tmp_path, capfd):
    """What Orbax logs about a damaged file stays out of the output: the line on what is passed over says it."""
    lines = []
    state = state_on(SAVED)
    with Checkpoints(tmp_path, say=lines.append) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {}, score=0.5)
    for file in (tmp_path / "2" / "state").rglob("*"):
        if file.is_file() and file.name in ("_METADATA", "manifest.ocdbt"):
            file.write_bytes(b"")
    capfd.readouterr()
    with Checkpoints(tmp_path, say=lines.append) as checkpoints:
        same(checkpoints.restore(state)[0], state)
    assert len(lines) == 1 and "the checkpoint of step 2 is damaged" in lines[0]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"commit_timestamp_nsecs": 10**40}, {"custom_metadata": {"a": 1}, "\ud800": 1}],
    ids=["time", "surrogate"],
)
def test_damaged_metadata_are_one_sentence(copied, change):
    path = copied / "3" / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match="copy: a checkpoint cannot be opened") as raised:
        opened(copied)
    assert str(raised.value).encode("utf-8")
