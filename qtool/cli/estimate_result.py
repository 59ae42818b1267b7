"""The JSON object of `qtool estimate-memory`."""

from __future__ import annotations

from typing import Any

from qtool.cli.estimate_report import next_command
from qtool.errors import QtoolError
from qtool.memory.answers import Machine
from qtool.memory.overhead import Part, Range
from qtool.pipeline.estimate import Estimate, Row


def result_of(found: Estimate, missed: QtoolError | None = None) -> dict[str, Any]:
    """Return the JSON object; it holds the rows even where nothing fits."""
    wanted, model = found.wanted, found.model
    return {
        "schema": "qtool.estimate-memory/1",
        "ok": missed is None,
        "exit_code": 0 if missed is None else missed.exit_code,
        "phase": wanted.phase,
        "model": {
            "name": model.shape.name,
            "parameters": model.shape.parameters,
            "assumed": bool(model.assumed),
        },
        "assumption": model.assumed,
        "alternatives": list(model.others),
        "machine": _machine(found.machine),
        "context": found.context,
        "sequences": wanted.settings.sequences,
        "kv": {"dtype": wanted.settings.key_type, "bytes": found.kv_bytes},
        "rows": [_row(row) for row in found.rows],
        "details": [_details(row) for row in found.rows],
        "next": next_command(found),
        "warnings": [{"code": code, "message": text} for code, text in found.warnings],
        "error": None if missed is None else missed.as_json(),
    }


def _machine(machine: Machine) -> dict[str, Any]:
    devices = machine.devices
    gpu = None
    if devices is not None:
        gpu = {
            "name": devices.name,
            "count": devices.count,
            "usable_bytes": devices.total,
            "source": devices.source,
        }
    return {"gpu": gpu, "ram_bytes": machine.ram}


def _row(row: Row) -> dict[str, Any]:
    return {
        "format": row.name,
        "bits_per_weight": row.bits_per_weight,
        "file_bytes": row.file_bytes,
        "weights_bytes": row.weights_bytes,
        "kv_bytes": row.kv_bytes,
        "overhead_bytes": _range(row.overhead),
        "total_bytes": row.total_bytes,
        "exact": row.exact,
        "fits": row.fits,
        "max_context": row.max_context,
    }


def _range(size: Range) -> dict[str, int]:
    return {"low": size.low, "likely": size.likely, "high": size.high}


def _details(row: Row) -> dict[str, Any]:
    answer, memory = row.answer, row.memory
    details: dict[str, Any] = {
        "format": row.name,
        "engine": None if answer is None else answer.engine,
        "certain": row.certain,
        "blocks": len(row.found.block_bytes),
        "blocks_on_gpu": None if answer is None else answer.blocks_on_devices,
        "ram_bytes": None if answer is None else answer.ram_bytes,
        "parts": [_part(part) for part in row.parts],
    }
    if memory is not None:
        details |= {
            "moment": memory.moment,
            "ram_bytes": memory.peak_ram.likely,
            "ram": [_part(part) for part in memory.ram],
            "vram": [_part(part) for part in memory.vram],
            "disk_bytes": row.file_bytes,
            "in_step": memory.in_step,
        }
    return details


def _part(part: Part) -> dict[str, Any]:
    return {"name": part.name, **_range(part.size), "exact": part.exact, "why": part.why}
