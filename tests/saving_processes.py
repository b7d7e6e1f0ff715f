"""Kills processes that save an adapter over another one, and says which adapter then loads.

python tests/killed_saves.py operations     one kill before each file operation of a save, and one after the last
python tests/killed_saves.py random 300     kills at random times
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
import orbax.checkpoint  # noqa: F401  # once, instead of in the first save of each child

import lora_jax as lora
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.checkpoint import MANIFEST

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}


def delta(value):
    """An adapter whose arrays hold one value; the scale tells a mixture of two."""
    a, b = np.full((4, 64), value, np.float32), np.full((4, 32), value, np.float32)
    scale, rate = np.array(value, np.float32), np.zeros((), np.float32)
    return {"w": LoRAAdapter(a=a, b=b, scale=scale, dropout=rate, axes=("in", "out"), blocks=(True,))}


def save(directory, kill_at):
    """Saves; the process ends before the file operation of that number, if there are so many."""
    count = 0

    def hook(event, args):
        nonlocal count
        if event in OPERATIONS and str(args[0]).startswith(str(directory)):
            count += 1
            if count == kill_at:
                os._exit(9)

    sys.addaudithook(hook)
    lora.save(directory, delta(2))


def save_after_signal(directory, warm_up, signal_to):
    lora.save(warm_up, delta(0))  # starts JAX
    os.write(signal_to, b"x")
    lora.save(directory, delta(2))


def forked(work, *args):
    """Runs a function in a child, which starts JAX and TensorStore anew: no thread of theirs survives a fork."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def value_of(directory):
    """The value of the adapter in a directory; a mixture of two is an error."""
    node = lora.load(directory)["w"]
    values = {float(x) for leaf in (node.a, node.b, node.scale) for x in np.ravel(leaf)}
    if len(values) != 1:
        raise AssertionError(f"{directory} holds a mixture: {values}")
    return values.pop()


def loads(directories):
    """What loads from each directory, before and after another save, and what that leaves behind."""
    names = Counter()
    for directory in directories:
        names[{1.0: "old", 2.0: "new"}[value_of(directory)]] += 1
        lora.save(directory, delta(3))
        assert value_of(directory) == 3
        arrays = json.loads((directory / MANIFEST).read_text())["arrays"]
        if {entry.name for entry in directory.iterdir()} != {MANIFEST, arrays, "metrics.jsonl"}:
            raise AssertionError(f"{directory} holds {sorted(os.listdir(directory))}")
    return dict(names)


def save_again_and_again(directory, value, times):
    for _ in range(times):
        lora.save(directory, delta(value))


def load_again_and_again(directory, times):
    values = Counter(value_of(directory) for _ in range(times))
    assert set(values) <= {1.0, 2.0, 4.0}, values


def together(template, times):
    """Two processes that save to one directory and one that loads from it."""
    children = [forked(save_again_and_again, template, value, times) for value in (2, 4)]
    children.append(forked(load_again_and_again, template, 2 * times))
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"failed": sum(map(bool, statuses)), "left": len(os.listdir(template))}


def main(mode, number="0", seed="0"):
    folder = Path(tempfile.mkdtemp())
    template = folder / "template"
    os.waitpid(forked(lora.save, template, delta(1)), 0)
    (template / "metrics.jsonl").write_text("{}")
    if mode == "together":
        print(together(template, int(number)), flush=True)
        return
    directories = []

    def copy():
        directories.append(folder / str(len(directories)))
        shutil.copytree(template, directories[-1])
        return directories[-1]

    if mode == "operations":
        status = 9
        while status == 9:
            directory = copy()
            child = forked(save, directory, len(directories))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0 and len(directories) > 10, (status, len(directories))
    else:
        rng, seconds = random.Random(int(seed)), None
        for _ in range(int(number) + 1):
            started, starts = os.pipe()
            child = forked(save_after_signal, copy(), folder / "warm-up" / str(len(directories)), starts)
            os.read(started, 1)
            began = time.perf_counter()
            if seconds is not None:
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(started), os.close(starts)
            seconds = seconds or 1.2 * (time.perf_counter() - began)
    print(loads(directories), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
