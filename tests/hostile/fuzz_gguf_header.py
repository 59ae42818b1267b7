"""Coverage-guided fuzzing of the GGUF pre-check: `make fuzz`, or for longer

    python tests/hostile/fuzz_gguf_header.py CORPUS_DIRECTORY -max_total_time=600

Whatever bytes come in, the outcome is a table of contents or one of qtool's refusals, within a
second and a few megabytes. The seeds are sound files, so that mutations reach the inner fields.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["qtool"]):
    from qtool.checkpoint.gguf_header import read_gguf
    from qtool.errors import QtoolError
    from qtool.pipeline.gguf_admission import admit_gguf

PLACE = Path(tempfile.mkdtemp(prefix="qtool-fuzz-")) / "fuzzed.gguf"


def read(data):
    """Read what the fuzzer made; any exception but a refusal is a finding."""
    PLACE.write_bytes(data)
    try:
        admit_gguf((read_gguf(PLACE),))
    except QtoolError as error:
        if not (error.message.isprintable() and str(PLACE) in error.message):
            raise AssertionError(f"a refusal that does not name the file: {error}") from error


def write_seeds(directory):
    """Put sound files into a new corpus."""
    from builders.gguf_containers import ByHand, array, key, small, string, tensor

    tokens = b"".join(map(string, ["a", "b", "c", "d"]))
    seeds = {
        "small": small().content,
        "empty": ByHand().content,
        "lists": ByHand([key("x", "array", array("string", 4, tokens))]).content,
        "one": ByHand([], [tensor("w", [32, 2], 0, 0)], bytes(256)).content,
    }
    for name, content in seeds.items():
        (directory / name).write_bytes(content)


def main():
    """Fuzz until libFuzzer's own limits end it."""
    places = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    for place in places[:1]:
        place.mkdir(parents=True, exist_ok=True)
        if not any(place.iterdir()):
            write_seeds(place)
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
