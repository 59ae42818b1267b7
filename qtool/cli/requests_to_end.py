"""Requests to end a run: Ctrl-C, kill, a terminal that closes; none of them is lost."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED = 130
# The last comes where a limit on the processor's time is used up, a little before the end.
REQUESTS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU")
AGAIN_AFTER = 0.02  # seconds: whatever swallowed the interrupt should be over by then


def heed_requests() -> None:
    """Have every request to end unwind the main thread as `KeyboardInterrupt`, until it does.

    What a run has begun to write is then removed; without this the process would just stop.
    Python drops what is raised where nobody can catch it: in a finalizer, a weak reference's
    callback or a callback from C, whichever happens to run when the signal comes. A request that
    was dropped so is made again.
    """
    _handle_requests(_interrupt)
    sys.unraisablehook = _asking_again(sys.unraisablehook)


class Ending:
    """The end of the process, with the exit code of the contract whatever comes late.

    Left to Python, a signal that comes while modules are torn down kills a run that has finished,
    and an interrupt that passed through `exec` of a string, as in many an import, ends the process
    by SIGINT although it was caught.
    """

    def __init__(self) -> None:
        self._code: int | None = None
        self._show = sys.excepthook
        sys.excepthook = self._uncaught

    def leave(self, code: int, last_words: Callable[[], None] | None = None) -> NoReturn:
        """Exit with a code, after any last words; from now on requests to end change nothing."""
        while self._code is None:
            with suppress(KeyboardInterrupt):  # one more, just before they are ignored
                _handle_requests(signal.SIG_IGN)
                self._code = code
        if last_words is not None:
            last_words()
        # Python notes an interrupt that leaves such an `exec`, and forgets it with the next one.
        exec("")  # noqa: S102
        sys.exit(code)

    def _uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """End at once and say nothing where an interrupt comes while another is heeded."""
        if not issubclass(kind, KeyboardInterrupt):
            self._show(kind, error, trace)
            return
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, full or not there
                stream.flush()
        os._exit(INTERRUPTED)


def _handle_requests(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for name in REQUESTS:
        number = getattr(signal, name, None)  # there is no SIGHUP on Windows
        # Whoever started us under nohup, or as a shell's background job, wants that ignored.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    del frame
    raise KeyboardInterrupt(number)


def _asking_again(
    otherwise: Callable[[UnraisableHookArgs], object],
) -> Callable[[UnraisableHookArgs], None]:
    def hook(dropped: UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            otherwise(dropped)
        elif not sys.is_finalizing():  # the run is over then, and no thread can start
            number = next(iter(getattr(dropped.exc_value, "args", ())), signal.SIGINT)
            # Not from here: what is raised while the hook runs is dropped as well.
            timer = threading.Timer(AGAIN_AFTER, _send, [number])
            timer.daemon = True
            timer.start()

    return hook


def _send(number: int) -> None:
    if hasattr(signal, "pthread_kill"):  # wakes the main thread where it waits for something
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(signal.Signals(number))
