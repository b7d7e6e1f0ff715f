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

from lora_jax.io.signals import raise_on_signal

sent = signal.SIGTERM


class Terminated(BaseException):
    pass


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as Python has it, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(*_):
    os.kill(os.getpid(), sent)


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
@pytest.mark.parametrize("number, error", [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_the_block_ends_by_the_exception(where, rest, number, error, capsys, monkeypatch):
    monkeypatch.setitem(globals(), "sent", number)
    before, hook, threads = signal.getsignal(number), sys.unraisablehook, set(threading.enumerate())
    began = time.monotonic()
    with pytest.raises(error), raise_on_signal(Terminated):
        where()
        time.sleep(rest)
    assert time.monotonic() - began < 20
    assert (signal.getsignal(number), sys.unraisablehook) == (before, hook)
    assert set(threading.enumerate()) <= threads
    assert capsys.readouterr() == ("", "")
    time.sleep(0.1)  # the exception is dropped by its catcher: no other signal comes


def test_cleaning_up_is_not_interrupted():
    done = False
    with pytest.raises(Terminated), raise_on_signal(Terminated):
        try:
            in_a_collection()
            time.sleep(30)
        finally:
            time.sleep(0.3)
            done = True
    assert done


def test_other_exceptions_that_python_drops_are_shown():
    code = (
        "from lora_jax.io.signals import raise_on_signal\n"
        "class Failing:\n    def __del__(self): raise ValueError('dropped')\n"
        "with raise_on_signal(SystemExit):\n    Failing()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "ValueError: dropped" in done.stderr


def test_other_threads_have_no_handler():
    before, handlers = signal.getsignal(signal.SIGTERM), []

    def inside():
        with raise_on_signal(Terminated):
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_an_ignored_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts a command in the background
    try:
        with raise_on_signal(Terminated):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
