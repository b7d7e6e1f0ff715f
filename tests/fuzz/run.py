"""Fuzzes every reader: changes valid files, reads them, and reports what is neither a value nor an error in words.

    scripts/fuzz [--minutes N | --cases N] [--seed S] [--reader NAME] [--case NUMBER]

A finding is an exception other than ValueError and OSError, an error of many lines or without a sentence, a hang, a
process that ends, more memory than a small file needs, output beside the error, or damage that changes a number
without being detected. A case is reproduced by its seed and number. The exit status is 1 where there are findings.
"""

import argparse
import collections
import contextlib
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS = 20.0
"""What one case may take."""

MEMORY = 3 * 2**30
"""Bytes that a process may use beyond those after its start."""

_LINES, _LENGTH = 20, 4000
_PACKAGES = [Path(__file__).parents[2] / name for name in ("lora_jax", "experiments")]
_NOISE = ("Traceback", "Exception ignored", "never retrieved", "never awaited", "panicked", "absl")


class _TooLong(BaseException):
    pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=__doc__.splitlines()[2].strip())
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader")
    parser.add_argument("--case", type=int, help="run this one and print its traceback")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None or args.case is not None:
        first = args.worker if args.case is None else args.case
        return _work(args.seed, first, args.reader, single=args.case is not None)
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    return _drive(args.seed, args.cases or (10**9 if args.minutes else 200), end, args.reader)


def _drive(seed: int, cases: int, end: float, reader: str | None) -> int:
    """Starts workers, one after another as they end, and reads their lines."""
    done, outcomes, findings = 0, collections.Counter(), collections.defaultdict(list)
    while done < cases and time.monotonic() < end:
        command = [sys.executable, "-m", "tests.fuzz.run", "--seed", str(seed), "--worker", str(done)]
        command += ["--reader", reader] if reader else []
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        current = "start"
        try:
            while done < cases and time.monotonic() < end:
                ready, _, _ = select.select([worker.stdout], [], [], 300 if current == "start" else SECONDS + 40)
                line = worker.stdout.readline() if ready else ""
                if not line:
                    ended = "hangs in compiled code" if not ready else "ends the process"
                    findings[f"{current}: {ended}"].append(done)
                    outcomes["finding"] += 1
                    done += 1
                    break
                report = json.loads(line)
                if "start" in report:
                    current = report["start"]
                    continue
                done += 1
                outcomes[report["outcome"]] += 1
                if report["outcome"] == "finding":
                    findings[f"{current}: {report['what']}"].append(report["case"])
        finally:
            worker.kill()
            worker.communicate()
        if current == "start":
            print("the worker does not start; run it with --case 0", file=sys.stderr)
            return 2
    for what, numbers in sorted(findings.items()):
        print(f"{what}  (cases {', '.join(map(str, numbers[:5]))}{', …' if len(numbers) > 5 else ''})")
    kinds = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    print(f"{done} cases of seed {seed}: {kinds}; {len(findings)} different findings")
    return 1 if findings else 0


def _work(seed: int, first: int, only: str | None, single: bool) -> int:
    """Runs cases from a number on, each with its own generator; writes a line before and after each."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from tests.fuzz.mutations import mutated
    from tests.fuzz.readers import readers

    output, noise = os.dup(1), tempfile.TemporaryFile()  # noqa: SIM115
    folder = Path(tempfile.mkdtemp())
    valid: dict[str, tuple[dict[str, bytes], Any]] = {}
    signal.signal(signal.SIGALRM, _stop)
    if not single:
        os.dup2(noise.fileno(), 1)
        os.dup2(noise.fileno(), 2)
    names = [only] if only else [name for name, reader in readers().items() for _ in range(reader.weight)]
    limited = False
    try:
        for number in range(first, first + 1 if single else 10**9):
            rng = random.Random(f"{seed} {number}")
            name = rng.choice(names)
            reader = readers()[name]
            if name not in valid:
                _say(output, {"start": f"{name}, valid files"})
                valid[name] = _prepared(reader, folder / "valid")
                gc.freeze()  # a collection after each case looks at the case's objects alone
            files, expected = valid[name]
            path = rng.choice(sorted(path for path in files if not path.endswith(reader.skipped)))
            directory = folder / "case"
            shutil.rmtree(directory, ignore_errors=True)
            changed = mutated(Path(path).name, files[path], rng)
            for other, content in files.items():
                (directory / other).parent.mkdir(parents=True, exist_ok=True)
                (directory / other).write_bytes(changed if other == path else content)
            if not limited:
                limited = True
                _limit_memory()
            _say(output, {"start": f"{name}, {Path(path).name if Path(path).suffix else 'array data'}"})
            noise.truncate(0)
            what = _outcome(reader, directory, expected, single)
            gc.collect()
            if what is None or what == "refused":
                noise.seek(0)
                text = noise.read().decode("utf-8", "replace")
                if noisy := [line for line in text.splitlines() if any(word in line for word in _NOISE)]:
                    what = f"prints beside its error: {noisy[0][:100]} … {text.splitlines()[-1][:200]}"
            outcome = {None: "read", "refused": "refused"}.get(what, "finding")
            _say(output, {"case": number, "outcome": outcome, "what": what})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _prepared(reader: Any, directory: Path) -> tuple[dict[str, bytes], Any]:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    reader.write(directory)
    files = {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
    return files, reader.read(directory)


def _outcome(reader: Any, directory: Path, expected: Any, single: bool) -> str | None:
    """What is found; None where the files were read, 'refused' where an error says in words why not."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        value = reader.read(directory)
    except (ValueError, OSError) as error:
        if single:
            traceback.print_exc()
        return _worded(error)
    except _TooLong:
        return "hangs"
    except MemoryError:
        return "MemoryError"
    except BaseException as error:
        if single:
            traceback.print_exc()
        frames = [
            frame
            for package in _PACKAGES
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).is_relative_to(package)
        ]
        where = f" in {Path(frames[-1].filename).name}:{frames[-1].name}" if frames else ""
        return f"{type(error).__name__}{where}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "reads other numbers" if reader.checked and value != expected else None


def _worded(error: Exception) -> str:
    text = str(error)
    if type(error).__module__ in ("json.decoder", "numpy", "builtins") and type(error) not in (
        *(ValueError, OSError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError),
        *(FileExistsError,),
    ):
        return f"a bare {type(error).__name__}"
    with contextlib.suppress(UnicodeEncodeError):
        text.encode("utf-8")
        if not text.strip() or "Traceback" in text:
            return "an error without a sentence"
        if len(text.splitlines()) > _LINES or len(text) > _LENGTH:
            return "an error of many lines"
        return "refused"
    return "an error that cannot be printed"


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))


def _say(output: int, content: dict[str, Any]) -> None:
    os.write(output, (json.dumps(content) + "\n").encode())


def _stop(number: int, frame: Any) -> None:
    raise _TooLong


if __name__ == "__main__":
    sys.exit(main())
