"""A request to end is heeded even where Python drops what its handler raises."""

import json
import os
import signal
import subprocess
import sys

import pytest
from builders.command_line import ROOT

# Each sends the signal to itself from where nobody can catch an exception, then has 30 s of work.
DROPPING = {
    "finalizer": """
class Dropping:
    def __del__(self):
        send()

Dropping()
""",
    "weak reference": """
class Dropping:
    pass

def callback(reference):
    send()

target = Dropping()
reference = weakref.ref(target, callback)
del target
""",
    "callback from C": """
@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def compare(first, second):
    send()
    return 0

two = (ctypes.c_int * 2)(2, 1)
ctypes.CDLL(None).qsort(two, 2, 4, compare)
""",
    "two finalizers in turn": """
class Second:
    def __del__(self):
        time.sleep(1)  # the request comes again while this runs

class First:
    def __del__(self):
        send()

First()
Second()
""",
}
ANSWER = ["error: interrupted", "  try: run the same command again"]
PROGRAM = """
import ctypes, os, signal, sys, time, weakref
from qtool.cli.requests_to_end import heed_requests

def send():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    for _ in range(1000):  # until the handler has run
        pass

heed_requests()
try:
    {dropping}
    {work}
except KeyboardInterrupt:
    print("interrupted")
else:
    print("went on")
"""
WORK = {
    "computing": """
    end = time.monotonic() + 30
    while time.monotonic() < end:
        pass
""",
    "waiting": "time.sleep(30)",
}


def said(dropping, work, sent, **settings):
    indented = dropping.strip().replace("\n", "\n    ")
    program = PROGRAM.format(dropping=indented, work=work.strip())
    return subprocess.run(
        [sys.executable, "-c", program, sent],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        **settings,
    )


def heed_all():
    """A shell's background jobs ignore Ctrl-C, those of nohup a closed terminal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)


def ignore_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU"])
@pytest.mark.parametrize("where", DROPPING)
def test_a_request_that_python_drops_is_made_again(where, sent):
    outcome = said(DROPPING[where], WORK["computing"], sent, preexec_fn=heed_all)
    assert (outcome.stdout, outcome.stderr) == ("interrupted\n", "")


@pytest.mark.parametrize("where", DROPPING)
def test_it_wakes_what_waits(where):
    outcome = said(DROPPING[where], WORK["waiting"], "SIGTERM")
    assert (outcome.stdout, outcome.stderr) == ("interrupted\n", "")


def test_a_job_that_ignores_ctrl_c_is_still_told_to_end_by_kill():
    where, work = DROPPING["finalizer"], WORK["waiting"]
    assert said(where, work, "SIGTERM", preexec_fn=ignore_ctrl_c).stdout == "interrupted\n"


def test_a_job_that_ignores_ctrl_c_goes_on_ignoring_it():
    outcome = said(DROPPING["finalizer"], "time.sleep(0.5)", "SIGINT", preexec_fn=ignore_ctrl_c)
    assert outcome.stdout == "went on\n"


def test_what_else_python_drops_is_reported_as_before():
    dropping = """
class Dropping:
    def __del__(self):
        raise ValueError("a mistake in a finalizer")

Dropping()
"""
    outcome = said(dropping, "pass", "SIGTERM")
    assert outcome.stdout == "went on\n"
    assert "a mistake in a finalizer" in outcome.stderr


ENDING = """
import atexit, os, signal, sys, time
import qtool.cli.app
from qtool import __main__

def work(arguments):
{work}

qtool.cli.app.run = work
__main__.main()
"""


def ends(work):
    program = ENDING.format(work="\n".join(f"    {line}" for line in work))
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=heed_all,
    )


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupt_through_exec_of_a_string_ends_with_130(sent):
    """Python ends by SIGINT after such an interrupt, caught or not; many imports have an `exec`."""
    outcome = ends([f"exec('os.kill(os.getpid(), signal.{sent}); time.sleep(9)')"])
    assert (outcome.returncode, outcome.stderr.splitlines()) == (130, ANSWER)


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("code", [0, 3])
def test_a_request_that_comes_after_the_work_changes_no_exit_code(sent, code):
    work = (
        f"atexit.register(os.kill, os.getpid(), signal.{sent})",
        "print('the result', end='')",
        f"return {code}",
    )
    outcome = ends(work)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (code, "the result", "")


def test_an_error_nobody_foresaw_is_shown_with_its_traceback():
    outcome = ends(["raise RuntimeError('a mistake')"])
    assert outcome.returncode == 1
    assert "RuntimeError: a mistake" in outcome.stderr


def test_one_more_while_the_first_is_heeded_has_no_word_of_its_own():
    """Just before requests are ignored for good."""
    program = """
import os, signal, time
from qtool.cli import app, requests_to_end
from qtool import __main__

def interrupted(arguments):
    raise KeyboardInterrupt

handle, left = requests_to_end._handle_requests, [1, 2, 3]

def disturbed(handler):
    if handler is signal.SIG_IGN and left:
        left.pop()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)
    handle(handler)

class Ending(requests_to_end.Ending):
    def leave(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)

app.run = interrupted
requests_to_end._handle_requests = disturbed
requests_to_end.Ending = ENDING
__main__.main()
"""
    for ending, answer in (("requests_to_end.Ending", ANSWER), ("Ending", [])):
        done = subprocess.run(
            [sys.executable, "-c", program.replace("ENDING", ending)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            preexec_fn=heed_all,
        )
        assert (done.returncode, done.stderr.splitlines()) == (130, answer)


# Where no session hears of a request: each sends it from there.
UNHEARD = {
    "while the commands are loaded": """
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "qtool.cli.app":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(9)

sys.meta_path.insert(0, Finder())
""",
    "while the line is parsed": """
import typer

def interrupted(app):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(9)

typer.main.get_command = interrupted
""",
    "twice in a row": """
import qtool.cli.session

def interrupted(*_):
    left.append(os.kill(os.getpid(), signal.SIGTERM))
    time.sleep(9)

def again(*told, show=qtool.cli.session._show):
    if len(left) < 3:
        interrupted()
    show(*told)

left = []
qtool.cli.session._show = again
qtool.cli.session._refuse_lost_directory = interrupted
""",
    "before the work": """
import qtool.cli.session

def interrupted():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(9)

qtool.cli.session._quieten_libraries = interrupted
""",
    "while another is heeded": """
import qtool.cli.session

def interrupted(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(9)

def again(*told, show=qtool.cli.session._show):
    qtool.cli.session._show = show
    interrupted()

qtool.cli.session._show = again
qtool.cli.session._refuse_lost_directory = interrupted
""",
}


@pytest.mark.parametrize("where", UNHEARD)
def test_a_request_at_any_time_is_answered(where):
    program = f"""
import os, signal, sys, time
from qtool import __main__
{UNHEARD[where]}
sys.argv = ["qtool", "inspect", "model", "--json"]
__main__.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=heed_all,
    )
    assert done.returncode == 130
    assert done.stderr.splitlines() == ANSWER
    answer = json.loads(done.stdout)
    assert (answer["schema"], answer["exit_code"]) == ("qtool.inspect/1", 130)
    assert answer["error"]["code"] == "interrupted"
