"""Stop a run where a signal, a full disk or a killed process would."""

import hashlib

from qtool.pipeline.progress import Silent
from qtool.pipeline.quantize import Calibration, RunSettings, run_plan


class Stops(Silent):
    """Progress that raises `error` after some blocks, and counts what was done."""

    def __init__(self, after=None, error=KeyboardInterrupt):
        super().__init__()
        self.after, self.error = after, error
        self.blocks = []

    def advance(self, detail):
        if detail.startswith("block "):
            self.blocks.append(int(detail.split()[1]))
        if self.after is not None and len(self.blocks) == self.after:
            raise self.error


def run(plan, destination, progress=None, *, device, **settings):
    """Carry a plan out; `settings` are those of the run, its calibration and the measurer."""
    progress = progress or Stops()
    run_settings = {k: settings.pop(k) for k in ("resume", "held_bytes") if k in settings}
    measurer = settings.pop("measurer", None)
    run_plan(
        plan,
        destination if isinstance(destination, list) else [destination],
        RunSettings(device, **run_settings),
        progress,
        Calibration(**settings),
        measurer=measurer,
    )
    return progress


def digests(directory):
    """Name -> SHA-256 of everything but the report, which holds times."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.endswith("qtool-report.json")
    }
