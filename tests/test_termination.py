"""SIGTERM as an exception, wherever Python is when the signal arrives."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from lora_jax.termination import raising


class Terminated(BaseException):
    pass


def send(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def in_a_collection():
    def once(phase, info):
        gc.callbacks.remove(once)
        send()

    gc.callbacks.append(once)
    gc.collect()


def in_a_finalizer():
    class Finalized:
        __del__ = send

    Finalized()


def in_a_weak_reference():
    class Referenced:
        pass

    value = Referenced()
    reference = weakref.ref(value, send)
    del value
    assert reference() is None


def in_a_block_that_catches_everything():
    with contextlib.suppress(BaseException):
        send()


def twice():
    in_a_finalizer()
    in_a_collection()


WHERE = [send, in_a_collection, in_a_finalizer, in_a_weak_reference, in_a_block_that_catches_everything, twice]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("rest", [0, 30], ids=["at the end", "before the end"])
def test_the_block_ends_by_the_exception(where, rest, capsys):
    before, hook, threads = signal.getsignal(signal.SIGTERM), sys.unraisablehook, threading.active_count()
    began = time.monotonic()
    with pytest.raises(Terminated), raising(Terminated):
        where()
        time.sleep(rest)
    assert time.monotonic() - began < 20
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == (before, hook)
    assert threading.active_count() == threads
    assert capsys.readouterr() == ("", "")
    time.sleep(0.1)  # the exception is dropped by its catcher: no other signal comes


def test_cleaning_up_is_not_interrupted():
    done = False
    with pytest.raises(Terminated), raising(Terminated):
        try:
            in_a_collection()
            time.sleep(30)
        finally:
            time.sleep(0.3)
            done = True
    assert done


def test_other_exceptions_that_python_drops_are_shown():
    code = (
        "from lora_jax.termination import raising\n"
        "class Failing:\n    def __del__(self): raise ValueError('dropped')\n"
        "with raising(SystemExit):\n    Failing()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "ValueError: dropped" in done.stderr


def test_other_threads_have_no_handler():
    before, handlers = signal.getsignal(signal.SIGTERM), []

    def inside():
        with raising(Terminated):
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert handlers == [before]
