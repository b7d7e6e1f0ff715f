"""A command from its first moment on: signals during imports, and outputs that cannot take what is printed."""

import os
import signal
import subprocess
import sys
import time

from experiments import run, startup
from experiments.training import processes


def python(code, **options):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, timeout=120, **options)


def test_sigterm_while_python_imports():
    code = "import experiments.run as r; print(flush=True); r.main(['sft', '--steps', '1', '--out', '/nonexistent/x'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()  # run.py is imported, JAX is not
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == startup.PREEMPTED == 75
    assert err == b"preempted before the first step: nothing to save; the same command starts again\n"


def test_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    assert run.main(["--help"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_output_that_takes_ascii_only():
    code = "from experiments import startup; startup.run('x', lambda: print('1 – 2 │ \\ud83d') or 0)"
    done = python(code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"1 \\u2013 2 \\u2502 \\ud83d\n", b"")


def test_an_output_that_is_closed():
    code = "import sys; from experiments import startup; sys.exit(startup.run('x', lambda: print('y' * 100000) or 0))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert done.returncode == 2
    assert done.stderr == b"error: x: the standard output was closed before the end\n"


def test_a_console_whose_output_is_closed(monkeypatch):
    class Closed:
        encoding, isatty = "utf-8", staticmethod(lambda: False)

        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    console = processes.console()
    console.file = Closed()
    try:
        console.print("a line")
    except BrokenPipeError:
        return
    raise AssertionError("a closed output ended the process, or nothing")
