"""Run hundreds of hostile command lines, each in a process of its own, in the time of a few.

A server that has imported the command line, and neither torch nor transformers, forks a child for
every one. What a child came to is looked at from outside: exit code, output, time, peak memory,
and which of the heavy libraries it had imported when it ended.
"""

import hashlib
import importlib
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "pyarrow")
LIGHT = (
    "gguf",
    "huggingface_hub",
    "qtool.cli.admission",
    "qtool.cli.inspect_model",
    "qtool.cli.recipe_flags",
    "qtool.evaluation.gates",
    "qtool.memory.shape_of_files",
    "qtool.pipeline.found_model",
)
WARM = (
    "qtool.calibration.builtin",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "qtool.pipeline.calibration_run",
    "qtool.pipeline.evaluate",
    "qtool.pipeline.export",
    "qtool.pipeline.ladder",
    "qtool.pipeline.quantize",
)
MEMORY = 12 << 30  # of address space
HANGS = 124  # the exit code of what did not end


@dataclass(frozen=True)
class Ended:
    """What a command line came to."""

    code: int  # negative: the signal that ended it
    out: str
    err: str
    seconds: float
    peak_bytes: int
    heavy: tuple[str, ...]  # of HEAVY, what it had imported

    @property
    def message(self):
        """The line that says what was wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return lines[-1].removeprefix("error: ") if lines else ""


class Server:
    """The process that forks; `run` a command line on it.

    Args:
        warm: whether it imports torch and transformers, and reads the built-in text, once for all
            of its children, where what they import is not what is looked at.
    """

    def __init__(self, *, warm=False):
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("QTOOL_")},
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__)), *(["warm"] if warm else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(self, *arguments, cwd, seconds=60, **environment):
        """Run `qtool ARGUMENTS` in a directory and wait for its end."""
        with tempfile.TemporaryDirectory() as aside:
            task = {
                "arguments": [os.fspath(argument) for argument in arguments],
                "cwd": str(cwd),
                "aside": aside,
                "seconds": seconds,
                "environment": environment,
            }
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            out, err = (
                (Path(aside) / name).read_bytes().decode(errors="replace")
                for name in ("out", "err")
            )
        return Ended(
            answer["code"],
            out,
            err,
            answer["seconds"],
            answer["peak_bytes"],
            tuple(answer["heavy"]),
        )

    def close(self):
        """End the server."""
        self._process.stdin.close()
        self._process.wait(10)


def snapshot(directory):
    """Path -> what lies there, for everything below a directory; reads regular files only."""
    found = {}
    for place, folders, names in os.walk(directory):
        for name in [*folders, *names]:
            path = Path(place) / name
            kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
            state = str(path.readlink()) if kind == "link" else ""
            if kind == "file" and path.is_file():
                with path.open("rb") as file:
                    state = (
                        f"{path.stat().st_size} {hashlib.sha256(file.read(1 << 24)).hexdigest()}"
                    )
            found[path.relative_to(directory).as_posix()] = (kind, state)
    return found


def _child(task):
    os.chdir(task["cwd"])
    os.environ.update(task["environment"])
    aside = Path(task["aside"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(aside / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from qtool.cli.app import run

    code = 99
    try:
        code = run(task["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        heavy = [name for name in HEAVY if name in sys.modules]
        (aside / "heavy").write_text(json.dumps(heavy))
        os._exit(code)


def _wait(child, seconds):
    """Return code, seconds and peak bytes of a child, ending it if it takes too long."""
    start = time.monotonic()
    watched = os.pidfd_open(child)
    ready = select.select([watched], [], [], seconds)[0]
    os.close(watched)
    if not ready:
        os.kill(child, 9)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status) if ready else HANGS
    return code, time.monotonic() - start, usage.ru_maxrss << 10


def _serve():
    sys.path.insert(0, str(ROOT))
    import qtool.cli.app

    for name in LIGHT:  # what a refusal needs, once for all
        importlib.import_module(name)
    assert Path(qtool.cli.app.__file__).is_relative_to(ROOT)
    assert not set(HEAVY) & set(sys.modules)
    if sys.argv[1:] == ["warm"]:
        for name in WARM:
            importlib.import_module(name)
        sys.modules["qtool.calibration.builtin"].builtin_pieces("calibration", None)
    for line in sys.stdin:
        task = json.loads(line)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _child(task)
        code, seconds, peak = _wait(child, task["seconds"])
        heavy = Path(task["aside"]) / "heavy"
        answer = {
            "code": code,
            "seconds": seconds,
            "peak_bytes": peak,
            "heavy": json.loads(heavy.read_text()) if heavy.exists() else [],
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
