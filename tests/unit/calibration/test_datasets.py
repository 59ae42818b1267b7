"""Datasets: every form parses, every bad input is refused with its place."""

import json
import subprocess
import sys

import pytest

from qtool.calibration import builtin
from qtool.calibration.builtin import builtin_pieces
from qtool.calibration.datasets import (
    DatasetSpec,
    from_recipe,
    parse_dataset,
    read_rows,
    to_recipe,
)
from qtool.errors import DamagedError, HubError, UsageError
from qtool.recipe.schema import Dataset

FORMS = {
    "builtin": DatasetSpec("builtin"),
    "builtin:n=64": DatasetSpec("builtin", windows=64),
    "notes.txt": DatasetSpec("file", "notes.txt"),
    "/data/a b.TXT:n=1": DatasetSpec("file", "/data/a b.TXT", windows=1),
    "rows.jsonl": DatasetSpec("file", "rows.jsonl"),
    "rows.jsonl:body:n=3": DatasetSpec("file", "rows.jsonl", column="body", windows=3),
    "./x.parquet": DatasetSpec("file", "./x.parquet"),
    "odd:name.txt": DatasetSpec("file", "odd:name.txt"),
    "hf:allenai/c4": DatasetSpec("hub", "allenai/c4"),
    "hf:allenai/c4/en:validation:text:n=9": DatasetSpec(
        "hub", "allenai/c4/en", "validation", "text", 9
    ),
}


def rows_of(path, seed=None, **options):
    return list(read_rows(DatasetSpec("file", str(path), **options), seed))


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("text", FORMS)
def test_every_form_of_the_contract_parses(text):
    assert parse_dataset(text) == FORMS[text]


@pytest.mark.parametrize("text", FORMS)
def test_a_spec_survives_the_recipe(text):
    spec = FORMS[text]
    assert from_recipe(Dataset(**to_recipe(spec))) == spec


@pytest.mark.parametrize("text", FORMS)
def test_the_name_parses_to_the_same_source(text):
    spec, again = FORMS[text], parse_dataset(FORMS[text].name)
    assert (again.kind, again.source, again.column) == (spec.kind, spec.source, spec.column)


@pytest.mark.parametrize(
    "text",
    ["", "bultin", "notes.pdf", "notes", "hf:", "hf:a b", "hf:a:b:c:d", "notes.txt:column"]
    + [f"builtin:n={n}" for n in ("0", "-1", "x", "", "1.5")],
)
def test_what_is_no_dataset_is_refused_with_the_forms(text):
    with pytest.raises(UsageError) as caught:
        parse_dataset(text)
    assert f"'{text}'" in caught.value.message
    assert "hf:ID[:SPLIT[:COLUMN]]" in caught.value.hint


@pytest.mark.parametrize(
    ("entry", "said"),
    [({"path": "a.csv"}, "a.csv"), ({"path": "a.txt", "column": "b"}, "no columns")],
)
def test_a_recipe_path_that_is_no_dataset_is_refused(entry, said):
    with pytest.raises(UsageError, match=said):
        from_recipe(Dataset(**entry))


def test_a_text_file_is_one_row_with_unix_line_ends_and_no_byte_order_mark(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xc3\xa4")
    assert [row.text for row in rows_of(path)] == ["one\ntwo\nthree\nä"]


def test_jsonl_rows_come_in_file_order_and_a_seed_shuffles_them_reproducibly(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", *({"text": str(n)} for n in range(50)))
    order = [row.text for row in rows_of(path)]
    shuffled = [row.text for row in rows_of(path, seed=5)]
    assert order == [str(n) for n in range(50)]
    assert shuffled == [row.text for row in rows_of(path, seed=5)]
    assert shuffled != order
    assert sorted(shuffled) == sorted(order)


def test_chats_are_read_in_both_dialects(tmp_path):
    openai = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, openai[1]]
    path = jsonl(
        tmp_path / "r.jsonl",
        {"messages": openai, "text": "ignored"},
        {"conversations": sharegpt},
        {"messages": parts},
    )
    assert [row.messages for row in rows_of(path)] == [tuple(openai)] * 3


def test_a_named_column_may_hold_text_or_a_chat(tmp_path):
    path = jsonl(
        tmp_path / "r.jsonl",
        {"x": "plain", "text": "no"},
        {"x": [{"role": "user", "content": "hi"}]},
        {"x": None},
    )
    first, second, third = rows_of(path, column="x")
    assert first.text == "plain"
    assert second.messages == ({"role": "user", "content": "hi"},)
    assert (third.text, third.messages) == ("", ())


def test_parquet_gives_the_same_rows_as_jsonl(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"text": f"row {n}", "other": n} for n in range(7)]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "r.parquet")
    ours = rows_of(tmp_path / "r.parquet")
    theirs = rows_of(jsonl(tmp_path / "r.jsonl", *records))
    assert [row.text for row in ours] == [row.text for row in theirs]


def test_parquet_chats_are_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "hi"}]
    parquet.write_table(pa.Table.from_pylist([{"messages": chat}]), tmp_path / "r.parquet")
    assert rows_of(tmp_path / "r.parquet")[0].messages == tuple(chat)


BAD_FILES = {
    # name: (file, content, error, what the message must hold)
    "absent": ("a.txt", None, UsageError, "a.txt': No such file"),
    "empty text": ("a.txt", b"", UsageError, "a.txt' is empty"),
    "blank text": ("a.txt", b" \n\n", UsageError, "a.txt' is empty"),
    "latin-1 text": ("a.txt", b"caf\xe9 noir", DamagedError, "byte 0xe9 at offset 3"),
    "utf-16 text": ("a.txt", "hello".encode("utf-16"), DamagedError, "at offset 0"),
    "absent rows": ("a.jsonl", None, UsageError, "a.jsonl': No such file"),
    "empty rows": ("a.jsonl", b"\n\n", UsageError, "a.jsonl' is empty"),
    "rows of nothing": ("a.jsonl", b'{"text": ""}\n', UsageError, "a.jsonl' is empty"),
    "not json": ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', DamagedError, "a.jsonl:3: not JSON"),
    "endless json": ("a.jsonl", b"[" * 200_000, DamagedError, "a.jsonl:1: not JSON"),
    "list row": ("a.jsonl", b"[1]\n", DamagedError, "a.jsonl:1: a list where an object"),
    "latin-1 row": ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}', DamagedError, "a.jsonl:2: not"),
    "no column": ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', UsageError, "a.jsonl:2: no column"),
    "number": ("a.jsonl", b'{"text": 3}\n', UsageError, "a.jsonl:1: no column"),
    "bad chat": ("a.jsonl", b'{"messages": ["hi"]}\n', UsageError, "a.jsonl:1: messages: not a"),
    "absent parquet": ("a.parquet", None, UsageError, "a.parquet': No such file"),
    "empty parquet": ("a.parquet", b"", DamagedError, "a.parquet: not a readable parquet"),
    "cut parquet": ("a.parquet", b"PAR1xxxx", DamagedError, "a.parquet: not a readable parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_name_and_place(case, tmp_path):
    name, content, kind, said = BAD_FILES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(kind) as caught:
        rows_of(tmp_path / name)
    assert type(caught.value) is kind
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_directory_is_not_a_dataset(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(UsageError, match="cannot read"):
        rows_of(tmp_path / "a.txt")


def test_a_missing_column_names_the_ones_there_are(tmp_path):
    with pytest.raises(UsageError) as caught:
        rows_of(jsonl(tmp_path / "a.jsonl", {"body": "x", "title": "y"}), column="boddy")
    assert "column 'boddy'" in caught.value.message
    assert "body, title" in caught.value.hint


def test_a_missing_parquet_column_names_the_ones_there_are(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"body": ["x"], "title": ["y"]}), tmp_path / "r.parquet")
    with pytest.raises(UsageError, match=r"r\.parquet:1: no column") as caught:
        rows_of(tmp_path / "r.parquet")
    assert "body, title" in caught.value.hint


# --- the built-in text


def test_builtin_is_the_same_for_a_seed_and_differs_between_seeds():
    assert builtin_pieces("calibration", 3) == builtin_pieces("calibration", 3)
    assert builtin_pieces("calibration", 3) != builtin_pieces("calibration", 4)
    assert sorted(builtin_pieces("calibration", 3)) == sorted(builtin_pieces("calibration", 4))


def test_builtin_is_large_enough_for_128_windows_of_2048_tokens():
    assert sum(map(len, builtin_pieces("calibration", 1))) > 1_100_000
    assert sum(map(len, builtin_pieces("evaluation", 1))) > 100_000


def test_builtin_is_mostly_prose_with_much_code():
    documents = list(builtin._documents())
    code = sum(
        len(builtin._source(module)[: builtin.LONGEST_SOURCE]) for module in builtin.SOURCE_OF
    )
    assert 0.3 < code / sum(map(len, documents)) < 0.5


def test_builtin_evaluation_text_is_never_calibrated_on():
    calibration = {p for x in builtin_pieces("calibration", 1) for p in x.split("\n\n")}
    evaluation = [p for x in builtin_pieces("evaluation", 1) for p in x.split("\n\n")]
    long = [p for p in evaluation if len(p) > 200]
    assert len(long) > 100
    assert not [p for p in long if p in calibration]
    assert not set(builtin.DOCSTRINGS_OF) & set(builtin.SOURCE_OF)


@pytest.fixture
def other_python():
    """Forget the documents of this Python before and after it is made to look like another."""
    builtin._documents.cache_clear()
    yield
    builtin._documents.cache_clear()


def test_builtin_does_without_modules_that_are_missing(other_python, monkeypatch):
    monkeypatch.setattr(builtin, "SOURCE_OF", ["no_such_module", "no.such.module", "copy", "math"])
    monkeypatch.setattr(builtin, "DOCSTRINGS_OF", ["nor_this_one", "json"])
    assert len(builtin_pieces("calibration", 1)) > 50


def test_a_python_without_any_text_is_refused(other_python, monkeypatch):
    monkeypatch.setattr(builtin, "SOURCE_OF", [])
    monkeypatch.setattr(builtin, "DOCSTRINGS_OF", [])
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match="carries no text"):
        builtin_pieces("calibration", 1)


def test_datasets_are_described_without_importing_heavy_libraries():
    code = (
        "import sys, qtool.calibration.datasets as d; d.parse_dataset('hf:a/b');"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


# --- the hub, without the hub


class FakeDataset(list):
    def shuffle(self, *, seed, **_):
        return FakeDataset(self[seed % len(self) :] + self[: seed % len(self)])


def test_a_hub_dataset_is_asked_for_with_its_configuration_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options["split"]))
        return FakeDataset([{"body": "a"}, {"body": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows(parse_dataset("hf:o/n/conf:test:body"), seed=1))
    assert asked == [(("o/n", "conf"), "test")]
    assert [row.text for row in rows] == ["b", "a"]
    list(read_rows(DatasetSpec("hub", "plain", column="body"), seed=None))
    assert asked[1] == (("plain", None), "train")


def hub_errors():
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HTTPError

    return [
        (DatasetNotFoundError("gone"), HubError, "no such dataset"),
        (ConnectionError("Couldn't reach 'o/n'\nand more"), HubError, "cannot be reached"),
        (HTTPError("no route"), HubError, "cannot be reached"),
        (ValueError('Unknown split "tset".'), UsageError, "Unknown split"),
        (RuntimeError("Dataset scripts are no longer supported"), UsageError, "scripts"),
    ]


@pytest.mark.parametrize("case", range(5))
def test_what_the_hub_library_raises_becomes_one_line_and_an_exit_code(case, monkeypatch):
    import datasets

    raised, kind, said = hub_errors()[case]

    def load_dataset(*_, **__):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(kind, match=said) as caught:
        list(read_rows(parse_dataset("hf:o/n:tset"), seed=1))
    assert "hf:o/n:tset" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_hub_row_without_the_column_names_dataset_and_row(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: FakeDataset([{"body": "a"}]))
    with pytest.raises(UsageError, match=r"hf:o/n\[0\]: no column 'text'"):
        list(read_rows(parse_dataset("hf:o/n"), seed=None))


def test_a_network_that_breaks_while_rows_stream_is_a_hub_error(monkeypatch):
    import datasets

    def stream():
        yield {"text": "a"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream())
    with pytest.raises(HubError, match="reset by peer"):
        list(read_rows(parse_dataset("hf:o/n"), seed=None))
