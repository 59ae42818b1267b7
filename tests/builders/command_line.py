"""Run the command line as its users do, and look at what it printed and wrote."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "docs" / "reference" / "schemas"
SMALL = ("-n", "4", "-l", "32")  # calibration that takes no time
FORMATS = ("gptq", "awq", "compressed-tensors")


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def value(self):
        """The JSON object on stdout, checked against the schema that it names."""
        value = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        command = value["schema"].removeprefix("qtool.").removesuffix("/1")
        schema = json.loads((SCHEMAS / f"{command}.schema.json").read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.Draft202012Validator(schema).validate(value)
        return value


def in_process_of_its_own(*arguments, **settings):
    """Run `qtool` as the shell does; returns the completed process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "qtool", *map(str, arguments)],
        env=environment,
        check=False,
        **{"capture_output": True, "text": True, "timeout": 120, **settings},
    )


def contents(directory):
    """Name -> bytes of every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
