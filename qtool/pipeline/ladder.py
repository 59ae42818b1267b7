"""Quantize a model in several ways, from the largest on, and find the smallest that is good enough.

Every rung that was tried leaves a record, so that an interrupted ladder goes on where it was, and
one with other gates is decided anew without quantizing again what is known.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.output import commit_all
from qtool.checkpoint.shards import file_digest
from qtool.checkpoint.untrusted import read_json_object
from qtool.checkpoint.work_directory import work_path
from qtool.errors import DamagedError
from qtool.evaluation.gates import Gate, GateOutcome, check_gates
from qtool.pipeline.gguf_output import PlannedGguf
from qtool.pipeline.identity import identity_of
from qtool.pipeline.measurement import Measurement, Measurer
from qtool.pipeline.plan import Plan
from qtool.pipeline.progress import Progress
from qtool.pipeline.quantize import Calibration, RunSettings, completed

OUT, RECORD = "out", "rung.json"
MAX_RECORD_BYTES = 16 << 20
# What a table of rungs shows.
SHOWN = {"ppl": ("ratio",), "kld": ("mean", "se"), "top1": ("value",)}
# A rung counts as smaller only by more than formats differ for the same codes.
SMALLER = 0.98
SAFE_BITS = 8.0  # bits per weight at which rounding hardly matters
Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class RungPlan:
    """One way to quantize the model."""

    name: str
    plan: Plan

    @property
    def n_bytes(self) -> int:
        """Bytes of the weight files of its output."""
        return self.plan.outputs[0].n_bytes


@dataclass(frozen=True)
class Rung:
    """What became of one way.

    Args:
        name: of the rung.
        plan: what was done, or would have been.
        status: whether all gates hold; skipped where it was not tried.
        why: it was skipped.
        result: in the terms of the JSON contract, see `Measurement`; None where it was skipped.
        outcomes: of the gates.
        seconds: that quantizing took.
        directory: where the output is; None where it is gone.
    """

    name: str
    plan: Plan
    status: Status
    why: str = ""
    result: Mapping[str, Any] | None = None
    outcomes: tuple[GateOutcome, ...] = ()
    seconds: float = 0.0
    directory: Path | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the weight files of its output."""
        return self.plan.outputs[0].n_bytes


@dataclass(frozen=True)
class Ladder:
    """A ladder being climbed.

    Args:
        rungs: from the largest on, the cheapest of a size first.
        work: directory for outputs and records; the caller's, who locks it.
        settings: of every run.
        progress: told what happens.
        calibration: gives the inputs that a plan needs.
        measurer: of every output.
        keep_all: keep the outputs of rungs that did not win.
    """

    rungs: Sequence[RungPlan]
    work: Path
    settings: RunSettings
    progress: Progress
    calibration: Callable[[Plan], Calibration]
    measurer: Measurer
    keep_all: bool = False

    def climb(self) -> list[Rung]:
        """Try rungs until no smaller one is left, or no other can pass.

        Raises:
            As `completed`; what was tried is kept in `work`.
        """
        found: list[Rung] = []
        for number, rung in enumerate(self.rungs, start=1):
            why = self._pointless(rung, found)
            if why:
                found.append(Rung(rung.name, rung.plan, "skipped", why))
                continue
            self.progress.note(f"rung {number} of {len(self.rungs)}: {rung.name}")
            found.append(self._tried(rung))
            if not self.keep_all:
                _drop_outputs(found)
        return found

    def _pointless(self, rung: RungPlan, found: Sequence[Rung]) -> str:
        """Say why a rung need not be tried, empty if it must be."""
        best = winner(found)
        if best is not None and rung.n_bytes > SMALLER * best.n_bytes:
            return f"no smaller than {best.name}, which passed"
        for tried in found:
            failed = [outcome for outcome in tried.outcomes if not outcome.passed]
            if any(outcome.gate.measure.kind == "same" for outcome in failed):
                return f"{tried.name} failed a gate that does not depend on the weights"
            lost = any(outcome.gate.measure.kind == "number" for outcome in failed)
            if lost and tried.plan.bits_per_weight >= SAFE_BITS:
                return f"{tried.name}, with {tried.plan.bits_per_weight:.1f} bits, lost too much"
        return ""

    def _tried(self, rung: RungPlan) -> Rung:
        """Quantize and measure one rung, or read what is known of it."""
        place = self.work / "rungs" / rung.name
        calibration = self.calibration(rung.plan)
        key = self._key(rung.plan, calibration)
        out = place / OUT
        known = _record(place / RECORD, key)
        if known is not None and out.exists() and _digests(out) != known["files"]:
            self.progress.warn(
                "damaged_state", f"what an earlier run left of {rung.name} is damaged: done again"
            )
            known = None
        if known is None and not work_path(out).exists():
            shutil.rmtree(out, ignore_errors=True)  # nobody knows what made it
        if known is None:
            known = self._run(rung, place, calibration)
            _write_record(place / RECORD, {"key": key, **known})
        else:
            self.progress.note(f"{rung.name} was tried before")
        outcomes = _outcomes(self.measurer.gates, rung.name, known["result"])
        passed = all(outcome.passed for outcome in outcomes)
        if passed and not out.exists():  # other gates than when it was thrown away
            self._run(rung, place, calibration)
        return Rung(
            rung.name,
            rung.plan,
            "passed" if passed else "failed",
            result=known["result"],
            outcomes=outcomes,
            seconds=known["seconds"],
            directory=out if out.exists() else None,
        )

    def _run(self, rung: RungPlan, place: Path, calibration: Calibration) -> dict[str, Any]:
        settings = replace(self.settings, overwrite=True)
        with completed(
            rung.plan, [place / OUT], settings, self.progress, calibration, self.measurer
        ) as done:
            commit_all(done.places)
        measured: Measurement = done.result.measured[0]
        return {
            "result": dict(measured.result),
            "seconds": done.result.seconds,
            "files": _digests(place / OUT),
        }

    def _key(self, plan: Plan, calibration: Calibration) -> str:
        """Return what changes where the result or its figures would."""
        windows = self.measurer.windows
        parts = {
            "identity": identity_of(
                plan, self.settings.device, calibration.windows, calibration.file
            ),
            "metrics": sorted(self.measurer.metrics),
            "text": None if windows is None else windows.sha256,
            "same": sorted(g.name for g in self.measurer.gates if g.measure.kind == "same"),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def winner(rungs: Sequence[Rung]) -> Rung | None:
    """Return the smallest rung that passed, None where none did."""
    passed = [rung for rung in rungs if rung.status == "passed"]
    return min(passed, key=lambda rung: rung.n_bytes, default=None)


def nearest(rungs: Sequence[Rung]) -> Rung | None:
    """Return the rung that failed by least, None where none was tried."""
    failed = [rung for rung in rungs if rung.status == "failed"]
    return min(failed, key=lambda rung: _missed_by(rung.outcomes), default=None)


def _missed_by(outcomes: Sequence[GateOutcome]) -> float:
    """Return by what part of its limit the worst failed gate was missed."""
    found = 0.0
    for outcome in outcomes:
        if outcome.passed:
            continue
        if not isinstance(outcome.value, float | int):
            return float("inf")
        found = max(
            found, abs(outcome.value - outcome.gate.limit) / max(1e-12, abs(outcome.gate.limit))
        )
    return found


def _drop_outputs(rungs: list[Rung]) -> None:
    """Remove all outputs but that of the best, or without one of the nearest."""
    best = winner(rungs) or nearest(rungs)
    for number, rung in enumerate(rungs):
        if rung.directory is not None and rung is not best:
            shutil.rmtree(rung.directory, ignore_errors=True)
            rungs[number] = replace(rung, directory=None)


def _outcomes(
    gates: Sequence[Gate], name: str, result: Mapping[str, Any]
) -> tuple[GateOutcome, ...]:
    return check_gates(gates, [{**result, "model": name}])


def named(plan: Plan, stem: str) -> Plan:
    """Return a plan whose GGUF file is called `stem`."""
    outputs = tuple(
        replace(output, stem=stem) if isinstance(output, PlannedGguf) else output
        for output in plan.outputs
    )
    return replace(plan, outputs=outputs)


def _record(path: Path, key: str) -> dict[str, Any] | None:
    """Return what is known of a rung; None where that is nothing, or of another one."""
    try:
        found = read_json_object(path, max_bytes=MAX_RECORD_BYTES)
        if found["key"] != key:
            return None
        result, seconds = dict(found["result"]), float(found["seconds"])
        _check_figures(result["metrics"])
        return {"result": result, "seconds": seconds, "files": dict(found["files"])}
    except (DamagedError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _check_figures(metrics: Mapping[str, Any]) -> None:
    """Check that the figures which a table shows are there.

    Raises:
        KeyError, TypeError: they are not.
    """
    for name, keys in SHOWN.items():
        for key in keys:
            if not isinstance(metrics[name][key], int | float):
                raise TypeError(name)
    if not all(isinstance(figures, Mapping) for figures in metrics.values()):
        raise TypeError("metrics")


def _digests(directory: Path) -> dict[str, str]:
    """Return name -> SHA-256 of everything in an output."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {path.relative_to(directory).as_posix(): file_digest(path) for path in files}


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("x", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    except ValueError as error:
        raise DamagedError(f"the figures of {path} cannot be kept: {error}") from error


def rung_json(rung: Rung, *, won: bool) -> dict[str, Any]:
    """Return a rung in the terms of the JSON contract."""
    from qtool.evaluation.gates import gate_json
    from qtool.pipeline.evaluate import brief

    result = rung.result or {"metrics": {}}
    return {
        "name": rung.name,
        "method": rung.plan.method.name,
        "format": rung.plan.outputs[0].name,
        "bits_per_weight": rung.plan.bits_per_weight,
        "bytes": rung.n_bytes,
        "status": "won" if won else rung.status,
        "why": rung.why,
        "metrics": brief(result["metrics"]),
        "gates": [gate_json(outcome) for outcome in rung.outcomes],
        "seconds": rung.seconds,
    }
