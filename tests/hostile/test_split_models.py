"""Parts of a GGUF model that disagree are refused by whoever reads them, and named."""

import shutil

import gguf
import pytest
import torch
from builders.llama_gguf import llama_gguf
from builders.refusals import snapshot
from builders.tiny_models import tiny_model

COMMANDS = {
    "inspect": ("inspect",),
    "export": ("export", "-f", "gguf:Q8_0", "-o", "out.gguf"),
    "restore": ("export", "-f", "safetensors", "-o", "out"),
    "eval": ("eval", "-l", "32", "-n", "2"),
    "estimate-memory": ("estimate-memory",),
}
PARTS = 3


@pytest.fixture(scope="module")
def sound(tmp_path_factory, server):
    """A directory with one model in three parts, in ./m, and another in ./o."""
    place = tmp_path_factory.mktemp("sound")
    for name, seed in (("m", 0), ("o", 1)):
        tiny_model("llama", place / f"{name}-dir", seed=seed, dtype=torch.bfloat16)
        whole = llama_gguf(place / f"{name}-dir", place / f"{name}.gguf", "F16")
        (place / name).mkdir()
        split(whole, place / name)
        shutil.rmtree(place / f"{name}-dir")
        whole.unlink()
    return place


def part(directory, number, count=PARTS):
    return directory / f"x-{number:05d}-of-{count:05d}.gguf"


def split(whole, directory, **changes):
    """Write a file's tensors as three parts, by gguf-py."""
    reader = gguf.GGUFReader(whole)
    every = list(reader.tensors)
    step = -(-len(every) // PARTS)
    for number in range(PARTS):
        path = part(directory, number + 1)
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if key.startswith("GGUF.") or key == "general.architecture":
                    continue
                kind = field.types[0]
                inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), kind, inner)
        writer.add_uint16("split.no", changes.get(f"no{number}", number))
        writer.add_uint16("split.count", changes.get(f"count{number}", PARTS))
        writer.add_int32("split.tensors.count", changes.get(f"tensors{number}", len(every)))
        chosen = every[number * step : (number + 1) * step]
        if number == changes.get("twice"):
            chosen = [*chosen, every[0]]
        for tensor in chosen:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def rewritten(**changes):
    def spoil(place):
        whole = llama_gguf(
            tiny_model("llama", place / "dir", dtype=torch.bfloat16), place / "w.gguf", "F16"
        )
        for number in range(1, PARTS + 1):
            part(place / "m", number).unlink()
        split(whole, place / "m", **changes)
        shutil.rmtree(place / "dir")
        whole.unlink()

    return spoil


def missing(place):
    part(place / "m", 2).unlink()


def of_another(place):
    shutil.copy(part(place / "m", 3), part(place / "m", 2))


def linked_out(place):
    (place / "away").mkdir()
    part(place / "m", 2).rename(place / "away" / "part.gguf")
    part(place / "m", 2).symlink_to(place / "away" / "part.gguf")


def cut(place):
    path = part(place / "m", 2)
    path.write_bytes(path.read_bytes()[:-64])


def folder(place):
    part(place / "m", 3).unlink()
    part(place / "m", 3).mkdir()


def renamed(place):
    part(place / "m", 1).rename(place / "m" / "x-00001-of-00004.gguf")


CASES = {
    "a part is missing": (missing, "x-00002-of-00003.gguf"),
    "a part stands in for another": (of_another, "x-00002-of-00003.gguf"),
    "a part is a link out": (linked_out, "x-00002-of-00003.gguf"),
    "a part is cut short": (cut, "x-00002-of-00003.gguf"),
    "a part is a directory": (folder, "x-00003-of-00003.gguf"),
    "a name of another count": (renamed, "of-00004.gguf"),
    "another count": (rewritten(count1=4), "x-00002-of-00003.gguf"),
    "another number": (rewritten(no2=0), "x-00003-of-00003.gguf"),
    "a tensor in two parts": (rewritten(twice=2), "x-00003-of-00003.gguf"),
    "fewer tensors than promised": (rewritten(tensors0=99, tensors1=99, tensors2=99), "x-0000"),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_that_disagree_are_refused(server, sound, tmp_path, name):
    spoil, named = CASES[name]
    shutil.copytree(sound, tmp_path / "s")
    spoil(tmp_path / "s")
    first = next((tmp_path / "s" / "m").glob("x-00001-*"))
    for command in COMMANDS.values():
        before = snapshot(tmp_path)
        ended = server.run(command[0], first, *command[1:], cwd=tmp_path, seconds=60)
        assert ended.code in {4, 5, 6}, (command, ended.code, ended.err)
        assert "Traceback" not in ended.err
        assert named in ended.message, (command, ended.message)
        assert "torch" not in ended.heavy
        assert snapshot(tmp_path) == before
