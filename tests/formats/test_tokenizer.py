"""The laws of lorafit.formats.tokenizer: ids, offsets and templates of any folder, one line if it is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from builders.tokenizers_tiny import (
    PARAGRAPH,
    gappy_tokenizer,
    tiny_backend,
    tiny_gguf_metadata,
    tiny_tokenizer,
    write_tiny_folder,
)
from lorafit.errors import ModelError
from lorafit.formats.gguf_tokenizer import from_metadata
from lorafit.formats.tokenizer import Encoded, end_ids, load_tokenizer

TEXTS = ["", " a  b\n\n\tc 123 ", "é 日本語 🙂👩‍👧", "<|im_start|>user\nHi<|im_end|>\n", PARAGRAPH]
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "config.json", "chat_template.json")
MESSAGES = [{"role": "user", "content": "How many ships?"}, {"role": "assistant", "content": "160 ships."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path / "model")


def change(file: Path, **fields: Any) -> None:
    """Sets fields of a JSON file, which need not exist; None removes one."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content = {name: value for name, value in (content | fields).items() if value is not None}
    file.write_text(json.dumps(content))


def same(one: Encoded, other: Encoded) -> bool:
    return one.ids == other.ids and one.offsets.tolist() == other.offsets.tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(folder: Path, text: str) -> None:
    """A folder gives the ids and the texts that transformers gives."""
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text).ids
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)


def test_rendered_ids_are_those_of_transformers(folder: Path) -> None:
    """render and encode together are `apply_chat_template`."""
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in (False, True):
        expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, return_dict=False)
        assert ours.encode(ours.render(MESSAGES, add_generation_prompt=prompt)).ids == expected


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("parse_special", [True, False])
def test_offsets_cover_the_text(text: str, parse_special: bool) -> None:
    """Offsets follow one another and leave no character out, so tokens can be shown and spans can be placed."""
    encoded, reached = tiny_tokenizer().encode(text, parse_special), 0
    for start, end in encoded.offsets.tolist():
        assert start in (reached, max(reached - 1, 0))  # the bytes of one character share its offsets
        assert end > start
        reached = max(reached, end)
    assert reached == len(text)


@pytest.mark.parametrize("parse_special", [True, False])
def test_many_texts_are_encoded_as_one_by_one(parse_special: bool) -> None:
    """encode_many gives each text what the backend gives it alone, in order; of no texts nothing."""
    tokenizer, texts = tiny_tokenizer(), TEXTS * 30
    many = tokenizer.encode_many(texts, parse_special)
    tokenizer.backend.encode_special_tokens = not parse_special
    alone = [tokenizer.backend.encode(text, add_special_tokens=False) for text in texts]
    assert [encoded.ids for encoded in many] == [one.ids for one in alone]
    assert [list(map(tuple, encoded.offsets)) for encoded in many] == [one.offsets for one in alone]
    assert all(encoded.offsets.dtype == np.int32 for encoded in many)
    assert tokenizer.encode_many([]) == []


def test_characters_that_the_vocabulary_cannot_spell_are_lost() -> None:
    """A character is lost where its bytes lack tokens, the first byte of a longer one too; asking again is the same."""
    tokenizer = gappy_tokenizer()
    text = "é 日本 🙂 a\x04b\x05 \U00040000\U0010fffd\ufffd"
    for _ in range(2):
        assert tokenizer.lost(text) == ["\x04", "\U00040000"]
        assert tokenizer.lost("\x04") == ["\x04"]
        assert tokenizer.lost("ab") == []
    assert tokenizer.decode(tokenizer.encode("a\x04b").ids) == "ab"
    assert tiny_tokenizer().lost(text) == []


NORMALIZERS = [normalizers.NFC(), normalizers.Strip(), normalizers.Lowercase(), normalizers.BertNormalizer()]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_what_is_left_out_by_design_is_not_lost(normalizer: normalizers.Normalizer) -> None:
    """White space, accents and control characters that normaliser or pre-tokenizer take away are no gap."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend.normalizer = normalizer
    assert tokenizer.lost(" e\u0301 A\x05\n\ufffd ") == []
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert tokenizer.lost("\t e\u0301\u00a0A\x05\n") == []


def test_unknown_tokens_are_seen() -> None:
    """A vocabulary with an unknown token loses nothing without a word."""
    backend = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>"))
    tokenizer = tiny_tokenizer()
    tokenizer.backend = backend
    assert tokenizer.encode("aé").ids == [1, 0]
    assert tokenizer.lost("aé") == []


def test_look_alikes_stay_text() -> None:
    """With parse_special=False a control token's name is characters; the switch leaves nothing behind."""
    tokenizer = tiny_tokenizer()
    plain = tokenizer.encode("a<|im_end|>b", parse_special=False).ids
    assert not set(plain) & set(tokenizer.special.values())
    assert tokenizer.decode(plain) == "a<|im_end|>b"
    assert tokenizer.backend.encode("<|im_end|>").ids == [2]
    assert tokenizer.encode("<|im_end|>").ids == [2]


@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[4]])
def test_without_look_alikes_both_ways_are_one(text: str) -> None:
    """parse_special changes nothing where there is nothing to parse."""
    assert same(tiny_tokenizer().encode(text, parse_special=False), tiny_tokenizer().encode(text))


def test_encode_adds_nothing(folder: Path) -> None:
    """Neither a post-processor, nor truncation, nor padding of the file touches an encoded text."""
    backend = tiny_backend()
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]),
        ]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    assert same(load_tokenizer(folder).encode(PARAGRAPH), tiny_tokenizer().encode(PARAGRAPH))
    assert load_tokenizer(folder).add_bos is False  # as tokenizer_config.json says
    change(folder / "tokenizer_config.json", add_bos_token=None)
    assert load_tokenizer(folder).add_bos is True  # as the post-processor does


def test_a_folder_and_a_gguf_file_of_one_tokenizer_agree(folder: Path) -> None:
    """Same ids, same fingerprint, same template fingerprint, wherever the tokenizer comes from."""
    ours, theirs = load_tokenizer(folder), from_metadata(tiny_gguf_metadata(), Path("model.gguf"))
    for name in ("bos_token", "bos_id", "eos_token", "eos_id", "add_bos", "special", "end_ids", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.fingerprint() == theirs.fingerprint() == tiny_tokenizer().fingerprint()
    assert ours.template_fingerprint() == theirs.template_fingerprint()


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    """A further token, or a control token more, is another tokenizer; a template is told apart by its own."""
    plain, more, special = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer(chat_template=None)
    more.backend.add_tokens(["<more>"])
    special.special = special.special | {"<x>": 5}
    assert len({plain.fingerprint(), more.fingerprint(), special.fingerprint()}) == 3
    assert plain.template_fingerprint() != special.template_fingerprint()


def test_the_digest_changes_with_whatever_ids_and_texts_follow_from() -> None:
    """Equal tokenizers have one digest; a word cut, a template or an end token more makes another."""
    plain, cut, ends = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    assert plain.digest() == tiny_tokenizer().digest()
    cut.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends.end_ids = frozenset({0, 1, 2, 3})
    other = tiny_tokenizer(chat_template="{{ messages }}")
    assert len({tokenizer.digest() for tokenizer in (plain, cut, ends, other, gappy_tokenizer())}) == 5


def test_a_template_that_may_ask_for_the_time_has_no_digest() -> None:
    """What it writes does not follow from the tokenizer alone."""
    assert tiny_tokenizer(chat_template="{{ strftime_now(0) }}").digest() is None


def test_without_a_template_the_plain_one_is_used() -> None:
    """has_template says which; the plain one writes BOS only for models that are served with it."""
    tokenizer = tiny_tokenizer(chat_template=None)
    assert not tokenizer.has_template
    assert tokenizer.render(MESSAGES) == "### User:\nHow many ships?\n\n### Assistant:\n160 ships.<|im_end|>\n\n"
    tokenizer.add_bos = True
    assert tokenizer.render(MESSAGES).startswith("<|im_start|>### User:")
    assert tiny_tokenizer().has_template


def test_a_template_reaches_its_tokens_and_variables() -> None:
    """bos_token, eos_token, tools and further variables are there in the template."""
    tokenizer = tiny_tokenizer("{{ bos_token }}{{ eos_token }}{{ tools | length }}{{ mood }}")
    assert tokenizer.render([], tools=[{}], mood="well") == "<|im_start|><|im_end|>1well"


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_template_is_found_wherever_folders_keep_it(folder: Path, place: str) -> None:
    """A file of its own wins over the configuration; an argument wins over both."""
    change(folder / "tokenizer_config.json", chat_template="from the configuration")
    if place.endswith(".jinja"):
        (folder / place).write_text("from chat_template.jinja")
    elif place == "chat_template.json":
        change(folder / place, chat_template="from chat_template.json")
    expected = "from the configuration" if place == "tokenizer_config.json" else f"from {place}"
    assert load_tokenizer(folder).chat_template == expected
    assert load_tokenizer(folder, "given").chat_template == "given"


def test_of_several_templates_the_default_one_counts(folder: Path) -> None:
    """A list of named templates gives `default`, or its only entry; else it is refused."""
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert load_tokenizer(folder).chat_template == "chat"
    change(folder / "tokenizer_config.json", chat_template=named[:1])
    assert load_tokenizer(folder).chat_template == "tools"
    change(folder / "tokenizer_config.json", chat_template=[named[0], {"name": "rag", "template": "rag"}])
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: chat_template: .*tool_use"):
        load_tokenizer(folder)


def test_bos_and_eos_by_name_or_by_number(folder: Path) -> None:
    """The tokenizer's files name BOS and EOS; where they do not, the model's configuration numbers them."""
    config = folder / "tokenizer_config.json"
    change(config, bos_token=None, eos_token=None)
    assert load_tokenizer(folder).eos_token is None
    change(folder / "special_tokens_map.json", eos_token={"content": "<|im_end|>"})
    assert load_tokenizer(folder).eos_id == 2
    change(folder / "config.json", bos_token_id=0, eos_token_id=2)
    change(folder / "generation_config.json", eos_token_id=[2, 7])
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.bos_id) == ("<|endoftext|>", 0)
    assert tokenizer.end_ids == {0, 2, 7}


def test_what_ends_a_generation() -> None:
    """End-of-turn tokens count where they are control tokens; in gpt-oss <|end|> only ends a part of an answer."""
    assert end_ids({"<|eot_id|>": 5, "<|x|>": 6}, [3]) == {3, 5}
    assert end_ids({"<|end|>": 5}, []) == {5}
    assert end_ids({"<|end|>": 5, "<|return|>": 6, "<|call|>": 7}, []) == {6, 7}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"model": 3}',
        b'{"version": "1.0", "model": {"type": "BPE"}}',
        b"[" * 99999,
    ],
)
def test_a_broken_tokenizer_json_is_one_line(folder: Path, content: bytes) -> None:
    """Whatever the file holds, the error is a ModelError of one line with its place."""
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError) as error:
        load_tokenizer(folder)
    assert error.value.place == str(folder / "tokenizer.json")
    assert "\n" not in str(error.value)


def test_a_panic_of_the_backend_is_one_line(folder: Path) -> None:
    """A pattern that backtracks for ever panics in Rust, which is no Exception in Python; it ends as a ModelError."""
    change(
        folder / "tokenizer.json",
        normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
    )
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ModelError, match="the tokenizer fails"):
        tokenizer.encode("a" * 40 + "!")
    assert tokenizer.encode("b").ids


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "config.json", "chat_template.json"]
)
@pytest.mark.parametrize("content", ["{", "[]", "3", "[" * 99999])
def test_a_broken_companion_is_one_line(folder: Path, name: str, content: str) -> None:
    """The files beside tokenizer.json are checked in the same way."""
    (folder / name).write_text(content)
    with pytest.raises(ModelError) as error:
        load_tokenizer(folder)
    assert error.value.place == str(folder / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("token", ["<nosuch>", 7, {"content": None, "x": 1}, {"content": ["a"]}])
def test_a_named_token_must_be_in_the_vocabulary(folder: Path, token: Any) -> None:
    """An EOS that the vocabulary lacks means that the files do not belong together."""
    change(folder / "tokenizer_config.json", eos_token=token)
    if token == {"content": None, "x": 1}:
        assert load_tokenizer(folder).eos_id is None
    else:
        with pytest.raises(ModelError, match="eos_token"):
            load_tokenizer(folder)


def test_nothing_of_the_folder_is_run(folder: Path) -> None:
    """`auto_map` and Python files are ignored; a folder without tokenizer.json is refused, whatever code it brings."""
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    (folder / "evil.py").write_text("raise SystemExit('run')")
    assert load_tokenizer(folder).vocab_size == 400
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="is missing"):
        load_tokenizer(folder)


def test_a_template_that_does_not_compile_is_told_at_once() -> None:
    """The error comes when the tokenizer is made, not at the first row."""
    with pytest.raises(ModelError, match="tiny: chat template: does not compile"):
        tiny_tokenizer("{% if %}")
