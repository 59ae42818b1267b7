"""What a GGUF vocabulary says about a model's tokens, checked against files made by hand."""

import json

import pytest
from builders.tokenizers_of_families import (
    LLAMA3,
    SPACE,
    byte_level,
    byte_level_json,
    sentencepiece_model,
    sequence,
    spaced_json,
    split,
    write_model_directory,
)
from transformers import AutoTokenizer

from qtool.checkpoint.gguf_values import flag, many, text, u32
from qtool.errors import DamagedError, UnsupportedError, UsageError
from qtool.formats.gguf_tokenizer_files import merges_of_scores, tokenizer_files
from qtool.formats.gguf_vocab import vocabulary
from qtool.formats.gguf_vocab_sentencepiece import read_sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NAMES = {"bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.fixture
def make(tmp_path):
    """Convert a tokenizer.json with other files beside it."""

    def convert(tokenizer, *, size=None, config=None, pre=None, files=None, **settings):
        held = write_model_directory(tmp_path, tokenizer, **settings)
        for name, content in (files or {}).items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            raw = content if isinstance(content, str | bytes) else json.dumps(content)
            path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
        size = size or held.get_vocab_size()
        return vocabulary(tmp_path, size=size, config=config or {}, pre=pre)

    return convert


def content(made, key):
    value = made.metadata.get(f"tokenizer.ggml.{key}")
    return None if value is None else value.content


def kinds(made):
    return dict(zip(content(made, "tokens"), content(made, "token_type"), strict=True))


def number(tokenizer, token):
    return next(item["id"] for item in tokenizer["added_tokens"] if item["content"] == token)


def test_tokens_are_typed(make):
    found = kinds(make(byte_level_json("qwen-2"), **NAMES))
    assert (found["<bos>"], found["<turn>"], found["<think>"]) == (CONTROL, CONTROL, USER_DEFINED)
    assert found["in"] == NORMAL


def test_a_token_that_any_file_calls_special_is_one(make):
    tokenizer = byte_level_json("qwen-2")
    assert kinds(make(tokenizer, pad_token="<think>"))["<think>"] == CONTROL
    assert kinds(make(tokenizer, extra_special_tokens=["<think>"]))["<think>"] == CONTROL
    assert kinds(make(tokenizer, eos_token="in"))["in"] == CONTROL
    where = number(tokenizer, "<think>")
    decoder = {str(where): {"content": "<think>", "special": True}}
    assert kinds(make(tokenizer, added_tokens_decoder=decoder))["<think>"] == CONTROL


def test_sentencepiece_tokens_are_typed(make):
    found = kinds(make(spaced_json("gemma"), bos_token="<s>", unk_token="<unk>"))
    assert found["<unk>"] == UNKNOWN
    assert found["<0x0A>"] == BYTE
    assert found["<s>"] == CONTROL
    assert found["   "] == USER_DEFINED  # three spaces, as they stand in a text
    assert SPACE * 3 not in found


def test_rows_without_a_token_are_filled_with_unused_ones(make):
    tokenizer = byte_level_json("gpt-2")
    tokenizer["model"]["vocab"]["[PAD1406]"] = 1405  # a name that the filling must avoid
    made = make(tokenizer, size=1408)
    assert made.size == len(content(made, "tokens")) == 1408
    assert content(made, "tokens")[1404:] == ("[PAD1404]", "[PAD1406]", "[[PAD1406]]", "[PAD1407]")
    assert content(made, "token_type")[1404:] == (UNUSED, NORMAL, UNUSED, UNUSED)


def test_added_tokens_without_a_row_are_left_out_and_named(make):
    made = make(byte_level_json("gpt-2"), size=1403)
    assert made.size == 1403
    assert any("<think>" in warning for warning in made.warnings)


def test_words_without_a_row_are_another_models(make):
    with pytest.raises(DamagedError, match="1000 rows"):
        make(byte_level_json("gpt-2"), size=1000)


def test_one_text_for_two_tokens_is_refused(make):
    tokenizer = byte_level_json("gpt-2")
    decoder = {"1404": {"content": "<turn>", "special": True}}
    with pytest.raises(DamagedError, match="'<turn>'"):
        make(tokenizer, size=1410, added_tokens_decoder=decoder)


def test_merges_are_the_same_as_strings_and_as_pairs(make):
    pairs = byte_level_json("gpt-2")
    strings = byte_level_json("gpt-2")
    model = strings["model"]
    strings["model"] = model | {"merges": [" ".join(pair) for pair in model["merges"]]}
    assert content(make(pairs), "merges") == content(make(strings), "merges")
    assert len(content(make(pairs), "merges")) == len(model["merges"])


def test_a_merge_with_a_space_inside_is_dropped_because_no_text_reaches_it(make):
    tokenizer = byte_level_json("gpt-2")
    model = tokenizer["model"]
    vocabulary_ = model["vocab"] | {"a b": 1404, "a bc": 1405}
    tokenizer["model"] = model | {
        "vocab": vocabulary_,
        "merges": [["a b", "c"], *model["merges"]],
    }
    assert content(make(tokenizer, size=1406), "merges")[0] == " ".join(model["merges"][0])


@pytest.mark.parametrize("merge", ["abc", "a b c", ["a"], ["a", 1], 3, None])
def test_a_malformed_merge_is_damage(make, tmp_path, merge):
    tokenizer = byte_level_json("gpt-2")
    write_model_directory(tmp_path, tokenizer)
    tokenizer["model"] = tokenizer["model"] | {"merges": [merge]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DamagedError):
        vocabulary(tmp_path, size=1500, config={})


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
def test_what_surrounds_a_text_is_what_transformers_surrounds_it_with(
    make, tmp_path, settings, before
):
    made = make(
        byte_level_json("qwen-2", bos=before),
        **NAMES,
        **settings,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    ids = AutoTokenizer.from_pretrained(tmp_path)("text").input_ids
    assert content(made, "add_bos_token") == (ids[0] == content(made, "bos_token_id")) == before
    assert content(made, "add_eos_token") is False
    contradicted = settings.get("add_bos_token", before) != before
    assert any("add_bos_token" in warning for warning in made.warnings) == contradicted


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (True, False)),
        ({"add_bos_token": False, "add_eos_token": True}, (False, True)),
    ],
)
def test_switches_count_for_a_tokenizer_model_alone(tmp_path, settings, expected):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("llama-2"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | settings))
    made = vocabulary(tmp_path, size=3000, config={})
    assert (content(made, "add_bos_token"), content(made, "add_eos_token")) == expected
    assert (content(made, "bos_token_id"), content(made, "eos_token_id")) == (1, 2)
    assert made.warnings == ()


def test_without_post_processor_nothing_surrounds_a_text(make):
    made = make(byte_level_json("gpt-2", bos=False), **NAMES)
    assert content(made, "add_bos_token") is False


def test_the_token_before_a_text_is_the_beginning_whatever_its_name(make):
    tokenizer = byte_level_json("qwen-2")
    made = make(tokenizer, bos_token="<turn>", eos_token="<eos>")
    assert content(made, "bos_token_id") == number(tokenizer, "<bos>")


def test_two_tokens_before_a_text_are_more_than_llama_cpp_adds(make):
    tokenizer = byte_level_json("qwen-2")
    single = tokenizer["post_processor"]["single"]
    single.insert(1, {"SpecialToken": {"id": "<turn>", "type_id": 0}})
    first = number(tokenizer, "<turn>")
    tokenizer["post_processor"]["special_tokens"]["<turn>"] = {
        "id": "<turn>",
        "ids": [first],
        "tokens": ["<turn>"],
    }
    assert any("at most one" in warning for warning in make(tokenizer, **NAMES).warnings)


def test_ids_come_from_the_settings_where_no_token_is_named(make):
    generation = {"eos_token_id": [7, 8], "pad_token_id": 3}
    made = make(
        byte_level_json("gpt-2", bos=False),
        config={"text_config": {"bos_token_id": 9}, "eos_token_id": 1},
        files={"generation_config.json": generation},
    )
    found = [content(made, f"{name}_token_id") for name in ("bos", "eos", "padding", "eot")]
    assert found == [9, 7, 3, 8]


def test_further_ends_of_generation_are_named_unless_llama_cpp_knows_them(make):
    tokenizer = byte_level_json("gpt-2", bos=False)
    ends = [number(tokenizer, token) for token in ("<eos>", "<turn>", "<think>", "<bos>")]
    made = make(tokenizer, **NAMES, files={"generation_config.json": {"eos_token_id": ends}})
    assert content(made, "eos_token_id") == ends[0]
    assert (content(made, "eot_token_id"), content(made, "eom_token_id")) == (ends[1], ends[2])
    tokenizer["added_tokens"][2]["content"] = "<|im_end|>"
    made = make(tokenizer, **NAMES, files={"generation_config.json": {"eos_token_id": ends[:2]}})
    assert content(made, "eot_token_id") is None


def test_a_model_without_end_is_warned_about(make):
    assert any("end-of-text" in text_ for text_ in make(byte_level_json("gpt-2")).warnings)


def test_an_end_that_is_no_token_is_warned_about(make):
    made = make(byte_level_json("gpt-2"), eos_token="<gone>")
    assert any("<gone>" in warning for warning in made.warnings)


def test_chat_templates_are_carried_over(make):
    tokenizer = byte_level_json("gpt-2")
    assert "tokenizer.chat_template" not in make(tokenizer).metadata
    assert make(tokenizer, chat_template="A").metadata["tokenizer.chat_template"] == text("A")
    several = [{"name": "default", "template": "A"}, {"name": "tool use", "template": "B"}]
    named = make(tokenizer, chat_template=several).metadata
    assert named["tokenizer.chat_template"] == text("A")
    assert named["tokenizer.chat_template.tool_use"] == text("B")
    assert named["tokenizer.chat_templates"] == many("string", ["tool_use"])


def test_a_template_in_a_file_of_its_own_goes_first(make):
    files = {"chat_template.jinja": "C", "additional_chat_templates/rag.jinja": "D"}
    found = make(byte_level_json("gpt-2"), files=files, chat_template="A").metadata
    assert found["tokenizer.chat_template"] == text("C")
    assert found["tokenizer.chat_template.rag"] == text("D")


def test_the_scores_are_the_order_of_the_merges(make):
    made = make(spaced_json("llama-2"), bos_token="<s>")
    scores = dict(zip(content(made, "tokens"), content(made, "scores"), strict=True))
    words = [left + right for left, right in spaced_json("llama-2")["model"]["merges"]]
    ranked = [scores[word] for word in dict.fromkeys(words)]
    assert ranked == sorted(ranked, reverse=True)
    assert len(set(ranked)) == len(ranked)


def test_the_scores_of_tokenizer_model_are_taken_where_it_agrees(make):
    raw = sentencepiece_model("llama-2")
    made = make(spaced_json("llama-2"), files={"tokenizer.model": raw})
    at = content(made, "tokens").index("the")
    assert content(made, "scores")[at] < -1
    tokenizer = spaced_json("llama-2")
    words = tokenizer["model"]["vocab"]
    words["the"], words["to"] = words["to"], words["the"]
    made = make(tokenizer, files={"tokenizer.model": raw})
    assert content(made, "tokens")[at] == "to"
    assert any("another vocabulary" in warning for warning in made.warnings)


def test_a_space_before_the_text_is_what_the_files_say(make, tmp_path):
    for family, expected in (("llama-2", True), ("gemma", False)):
        assert content(make(spaced_json(family)), "add_space_prefix") is expected
        alone = tmp_path / family
        alone.mkdir()
        (alone / "tokenizer.model").write_bytes(sentencepiece_model(family))
        assert content(vocabulary(alone, size=3000, config={}), "add_space_prefix") is expected


def test_a_word_that_merges_do_not_reach_is_warned_about(make):
    tokenizer = spaced_json("gemma")
    del tokenizer["model"]["merges"][-1]
    assert any("no merge" in warning for warning in make(tokenizer).warnings)
    assert make(spaced_json("gemma"), eos_token="</s>").warnings == ()


def test_whole_words_matter_only_where_no_merge_makes_a_token(make):
    tokenizer = byte_level_json("llama-3")
    tokenizer["pre_tokenizer"] = sequence(
        split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), byte_level(False)
    )
    assert make(tokenizer, **NAMES).warnings == ()
    tokenizer["model"]["vocab"]["zzzzzz"] = 1404
    assert any("'zzzzzz'" in warning for warning in make(tokenizer, size=1405, **NAMES).warnings)


def test_spaces_that_added_tokens_take_along_are_warned_about(make):
    tokenizer = byte_level_json("gpt-2")
    tokenizer["added_tokens"][2]["rstrip"] = True
    assert any("'<turn>'" in warning for warning in make(tokenizer, **NAMES).warnings)


def test_a_name_is_taken_as_it_is(make):
    tokenizer = byte_level_json("gpt-2")
    tokenizer["pre_tokenizer"] = sequence(split("cat"), byte_level(False))
    with pytest.raises(UnsupportedError, match="cat"):
        make(tokenizer)
    assert content(make(tokenizer, pre="kimi-k2"), "pre") == "kimi-k2"
    assert content(make(tokenizer, pre="smollm"), "pre") == "smollm"
    with pytest.raises(UsageError, match="cats"):
        make(tokenizer, pre="cats")
    with pytest.raises(UsageError, match="--pre"):
        make(spaced_json("gemma"), pre="gpt-2")


def test_what_rewrites_text_is_refused_unless_a_name_is_given(make):
    tokenizer = byte_level_json("gpt-2") | {"normalizer": {"type": "Lowercase"}}
    with pytest.raises(UnsupportedError, match="Lowercase"):
        make(tokenizer)
    assert any("Lowercase" in warning for warning in make(tokenizer, pre="gpt-2").warnings)
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    assert make(tokenizer, **NAMES).warnings == ()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"type": "WordPiece"}, "WordPiece"),
        ({"end_of_word_suffix": "</w>"}, "</w>"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path, change, match):
    tokenizer = byte_level_json("gpt-2")
    tokenizer["model"] = tokenizer["model"] | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedError, match=match):
        vocabulary(tmp_path, size=1500, config={})


def test_words_that_are_neither_bytes_nor_fall_back_to_them_are_refused(tmp_path, make):
    tokenizer = byte_level_json("gpt-2") | {"pre_tokenizer": {"type": "Whitespace"}}
    with pytest.raises(UnsupportedError, match="neither"):
        make(tokenizer)
    tokenizer = spaced_json("gemma")
    del tokenizer["model"]["vocab"]["<0x41>"]
    with pytest.raises(UnsupportedError, match="single bytes"):
        make(tokenizer)


def test_a_directory_without_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(UnsupportedError) as refusal:
        vocabulary(tmp_path, size=10, config={})
    assert "save_pretrained" in refusal.value.hint


@pytest.mark.parametrize(
    "content_",
    [
        "[]",
        "{",
        '{"model": []}',
        '{"model": {}, "added_tokens": {"a": 1}}',
        '{"model": {}, "added_tokens": [3]}',
        '{"model": {}, "added_tokens": [{"id": true, "content": "a"}]}',
        '{"model": {}, "added_tokens": [{"id": 1, "content": 1}]}',
    ]
    + [
        f'{{"model": {{"merges": [], "vocab": {words}}}, "pre_tokenizer": {{"type": "ByteLevel"}}}}'
        for words in ("[]", '{"a": -1}', '{"a": 1e9}', '{"a": 1, "b": 1}', '{"\\ud800": 1}')
    ],
)
def test_malformed_tokenizers_are_damage(tmp_path, content_):
    (tmp_path / "tokenizer.json").write_text(content_)
    with pytest.raises(DamagedError):
        vocabulary(tmp_path, size=10, config={})


@pytest.mark.parametrize("cut", [1, 5, 37, -1])
def test_a_truncated_tokenizer_model_is_damage(tmp_path, cut):
    raw = sentencepiece_model("llama-2")
    (tmp_path / "tokenizer.model").write_bytes(raw[:cut])
    with pytest.raises(DamagedError, match=r"tokenizer\.model"):
        read_sentencepiece(tmp_path / "tokenizer.model")


def test_the_library_reads_the_same_pieces(tmp_path):
    library = pytest.importorskip("sentencepiece", reason="the sentencepiece package is absent")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model("gemma"))
    theirs = library.SentencePieceProcessor(model_file=str(path))
    ours = read_sentencepiece(path)
    assert (ours.kind, ours.prefix, ours.normalizes, ours.squeezes) == ("bpe", False, False, False)
    assert [(piece.text, piece.score, piece.kind == CONTROL) for piece in ours.pieces] == [
        (theirs.id_to_piece(place), theirs.get_score(place), theirs.is_control(place))
        for place in range(theirs.vocab_size())
    ]


@pytest.mark.parametrize("family", ["llama-3", "llama-2"])
def test_transformers_loads_the_files_of_a_gguf_vocabulary(make, tmp_path, family):
    spaced = family == "llama-2"
    names = {"bos_token": "<s>", "eos_token": "</s>"} if spaced else NAMES
    made = make(spaced_json(family) if spaced else byte_level_json(family), **names, size=4000)
    back = tmp_path / "back"
    back.mkdir()
    extra = {
        "tokenizer.chat_template": text("T"),
        "tokenizer.chat_templates": many("string", ["rag"]),
        "tokenizer.chat_template.rag": text("R"),
    }
    for name, content_ in tokenizer_files(made.metadata | extra).items():
        (back / name).write_text(content_, encoding="utf-8")
    ours, theirs = AutoTokenizer.from_pretrained(back), AutoTokenizer.from_pretrained(tmp_path)
    sample = "Hello  there,\n<turn>I'm 12345 years old: é🚀\t."
    assert ours(sample).input_ids == theirs(sample).input_ids
    assert ours.decode(ours(sample).input_ids) == theirs.decode(theirs(sample).input_ids)
    assert (ours.bos_token, ours.eos_token) == tuple(names.values())
    assert ours.chat_template == {"default": "T", "rag": "R"}
    assert len(ours) == len(theirs)  # without the rows that only fill the embedding


def test_joining_by_score_is_written_as_merges():
    texts = ["<unk>", "a", "b", "c", "ab", "bc", "abc"]
    merges = merges_of_scores(texts, [2, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, -2, -1, -3])
    assert merges == [["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tokenizer.ggml.model": text("t5")}, UnsupportedError),
        ({"tokenizer.ggml.pre": text("kimi-k2")}, UnsupportedError),
        ({"tokenizer.ggml.pre": text("of the future")}, UnsupportedError),
        ({"tokenizer.ggml.tokens": many("i32", [1, 2])}, DamagedError),
        ({"tokenizer.ggml.tokens": many("string", ["a", "a"])}, DamagedError),
        ({"tokenizer.ggml.token_type": many("i32", [1])}, DamagedError),
        ({"tokenizer.ggml.merges": many("string", ["a z"])}, DamagedError),
        ({"tokenizer.ggml.merges": u32(3)}, DamagedError),
    ],
)
def test_a_vocabulary_that_cannot_come_back_is_refused(change, error):
    metadata = {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text("gpt-2"),
        "tokenizer.ggml.tokens": many("string", ["a", "b", "ab", "<eos>"]),
        "tokenizer.ggml.token_type": many("i32", [1, 1, 1, 3]),
        "tokenizer.ggml.merges": many("string", ["a b"]),
        "tokenizer.ggml.eos_token_id": u32(3),
        "tokenizer.ggml.add_bos_token": flag(False),
    }
    files = tokenizer_files(metadata)
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<eos>"
    with pytest.raises(error):
        tokenizer_files(metadata | change)
