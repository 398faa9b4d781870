"""The laws of lorafit.formats.gguf_tokenizer: a GGUF file's metadata gives the ids that its model was trained with."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from builders.tokenizers_tiny import (
    CHAT_TEMPLATE,
    GEMMA4_SPECIAL,
    PARAGRAPH,
    SPECIAL,
    gemma4_gguf_metadata,
    tiny_gguf_metadata,
    tiny_tokenizer,
    write_gemma4_folder,
)
from lorafit.errors import ModelError
from lorafit.formats.gguf_tokenizer import PRE_TOKENIZERS, from_metadata
from lorafit.formats.tokenizer import TextTokenizer, load_tokenizer

PLACE = Path("model.gguf")
PIECES = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "ca", "▁▁", "aa", "▁c", "cab"]
TEXTS = [
    "",
    PARAGRAPH,
    "a  b   c\n\n\td \r\n  12345 3.14",
    "it's I'LL we'VE naïve café é 日本語 🙂👩‍👧 ½ ² ٣",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "<|im_end <|im_end|><|im_end|>",
]


def build(metadata: dict[str, Any]) -> TextTokenizer:
    return from_metadata(metadata, PLACE)


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: four control tokens, 256 bytes, a user-defined tag and space run, `PIECES`."""
    control = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
    tokens = control + [f"<0x{byte:02X}>" for byte in range(256)] + ["<tag>", "   ", *PIECES]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, 3, 3] + [6] * 256 + [4, 4] + [1] * len(PIECES),
        "tokenizer.ggml.scores": [-1000.0] * 263 + [-float(number) for number in range(len(PIECES))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def slow_sentencepiece(text: str) -> list[str]:
    """SentencePiece BPE as it is defined: again and again, join the neighbours whose union has the best score."""
    parts = list(text.replace(" ", "▁"))
    while True:
        unions = [(PIECES.index(a + b), n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in PIECES]
        if not unions:
            return parts
        _, n = min(unions)
        parts[n : n + 2] = [parts[n] + parts[n + 1]]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_ids_are_those_of_the_tokenizer_in_the_file(text: str) -> None:
    """Tokenizer -> GGUF metadata -> tokenizer changes no id, offset or text."""
    ours, original = build(tiny_gguf_metadata()), tiny_tokenizer()
    for parse_special in (True, False):
        encoded, expected = ours.encode(text, parse_special), original.encode(text, parse_special)
        assert encoded.ids == expected.ids
        assert encoded.offsets.tolist() == expected.offsets.tolist()
        assert ours.decode(encoded.ids) == text


def test_everything_but_the_backend_comes_from_the_metadata() -> None:
    """BOS, EOS, control tokens, ends and template are the file's."""
    ours, original = build(tiny_gguf_metadata()), tiny_tokenizer()
    for name in ("bos_token", "bos_id", "eos_token", "eos_id", "add_bos", "special", "end_ids", "chat_template"):
        assert getattr(ours, name) == getattr(original, name), name
    assert ours.fingerprint() == original.fingerprint()
    assert ours.place == "model.gguf"
    assert from_metadata(tiny_gguf_metadata(), PLACE, "{{ 1 }}").chat_template == "{{ 1 }}"
    assert not build(tiny_gguf_metadata(chat_template=None)).has_template
    assert build(tiny_gguf_metadata()).chat_template == CHAT_TEMPLATE


# How each pattern cuts one text that tells them apart; written out by hand from the published patterns.
SAMPLE = "He'Ll  go\n\n  1234 x.\nABcd"
CUTS = {
    "gpt-2": ["He", "'", "Ll", " ", " go", "\n\n ", " 1234", " x", ".", "\n", "ABcd"],
    "smollm": ["He", "'", "Ll", " ", " go", "\n\n  ", "1", "2", "3", "4", " x", ".", "\n", "ABcd"],
    "llama-bpe": ["He", "'Ll", " ", " go", "\n\n", " ", " ", "123", "4", " x", ".\n", "ABcd"],
    "qwen2": ["He", "'Ll", " ", " go", "\n\n", " ", " ", "1", "2", "3", "4", " x", ".\n", "ABcd"],
    "gpt-4o": ["He'Ll", " ", " go", "\n\n", " ", " ", "123", "4", " x", ".\n", "ABcd"],
    "tekken": ["He", "'Ll", " ", " go", "\n\n", " ", " ", "1", "2", "3", "4", " x", ".\n", "ABcd"],
    "deepseek-v3": ["He", "'Ll", " ", " go", "\n\n", "  ", "123", "4", " x", ".\n", "ABcd"],
}


@pytest.mark.parametrize("name", CUTS)
def test_the_named_pre_tokenizer_cuts_the_text(name: str) -> None:
    """`tokenizer.ggml.pre` decides where words end: contractions, digits, spaces before words, newlines."""
    backend = build(tiny_gguf_metadata() | {"tokenizer.ggml.pre": name}).backend
    assert [SAMPLE[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(SAMPLE)] == CUTS[name]


def test_every_known_pre_tokenizer_builds() -> None:
    """Every pattern in the table compiles, and loses no text."""
    for name in PRE_TOKENIZERS:
        tokenizer = build(tiny_gguf_metadata() | {"tokenizer.ggml.pre": name})
        assert tokenizer.decode(tokenizer.encode(TEXTS[3]).ids) == TEXTS[3], name


def test_qwen_composes_accents_first() -> None:
    """Qwen's models read text in Unicode's composed form; the offsets still point into the text as it was."""
    tokenizer = build(tiny_gguf_metadata() | {"tokenizer.ggml.pre": "qwen2"})
    decomposed = tokenizer.encode("e\u0301 x")
    assert decomposed.ids == tokenizer.encode("é x").ids
    assert decomposed.offsets[-1].tolist() == [3, 4]


def test_a_word_that_is_a_token_stays_one_for_llama_3() -> None:
    """Llama 3's tokenizer asks the vocabulary before the merges, GPT-2's never does."""
    metadata = tiny_gguf_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zqx"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    assert len(build(metadata | {"tokenizer.ggml.pre": "llama-bpe"}).encode("zqx").ids) == 1
    assert len(build(metadata | {"tokenizer.ggml.pre": "gpt-2"}).encode("zqx").ids) == 3


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_bos_is_added_where_llama_cpp_adds_it(model: str) -> None:
    """The flag decides; without one, SentencePiece and Llama 3 models start with BOS, other models do not."""
    metadata = sentencepiece_metadata() if model == "llama" else tiny_gguf_metadata()
    metadata.pop("tokenizer.ggml.add_bos_token", None)
    assert build(metadata).add_bos is (model == "llama")
    assert build(metadata | {"tokenizer.ggml.pre": "llama-bpe"}).add_bos
    assert not build(metadata | {"tokenizer.ggml.add_bos_token": False}).add_bos
    assert build(metadata | {"tokenizer.ggml.add_bos_token": True}).add_bos
    del metadata["tokenizer.ggml.bos_token_id"]
    assert not build(metadata | {"tokenizer.ggml.add_bos_token": True}).add_bos


def test_sentencepiece_joins_as_defined() -> None:
    """On 300 random texts the recovered merges give the pieces of the slow definition."""
    tokenizer, letters = build(sentencepiece_metadata()), random.Random(0)
    for _ in range(300):
        text = "".join(letters.choice("abc ") for _ in range(letters.randint(0, 24)))
        while "   " in text:
            text = text.replace("   ", " ")  # three spaces are a user-defined token, taken before any score counts
        ids = tokenizer.encode(text).ids
        assert [tokenizer.backend.id_to_token(number) for number in ids] == slow_sentencepiece(text), text
        assert tokenizer.decode(ids) == text


def test_sentencepiece_falls_back_to_bytes() -> None:
    """What no piece covers is spelled in byte tokens, and read back from them."""
    tokenizer = build(sentencepiece_metadata())
    ids = tokenizer.encode("aé🙂").ids
    assert [tokenizer.backend.id_to_token(number) for number in ids[1:3]] == ["<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "aé🙂"


def test_a_prefix_space_is_added_and_taken_away() -> None:
    """With add_space_prefix (the default) a text starts with "▁"; decoding removes it; after a control token too."""
    metadata = sentencepiece_metadata()
    del metadata["tokenizer.ggml.add_space_prefix"]
    tokenizer = build(metadata)
    pieces = [tokenizer.backend.id_to_token(number) for number in tokenizer.encode("ab<end_of_turn>c").ids]
    assert pieces == ["▁ab", "<end_of_turn>", "▁c"]
    assert tokenizer.decode(tokenizer.encode("ab c").ids) == "ab c"
    assert tokenizer.encode("ab c").offsets.tolist() == [[0, 2], [2, 4]]


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "<end_of_turn>", "<start_of_turn>a"])
def test_plain_text_never_becomes_a_control_token(text: str) -> None:
    """With parse_special=False a look-alike is text, although the vocabulary could be merged into it."""
    metadata = sentencepiece_metadata()
    parts = ["<", ">", "/", "_", "<s", "</", "</s", "<u", "<un", "<unk", "<e", "<end", "<end_of_turn", "<start_of_turn"]
    for name, more in (("tokens", parts), ("token_type", [1] * 14), ("scores", [-50.0] * 14)):
        metadata[f"tokenizer.ggml.{name}"] = metadata[f"tokenizer.ggml.{name}"] + more
    tokenizer = build(metadata)
    assert set(tokenizer.encode(text).ids) & set(tokenizer.special.values())
    plain = tokenizer.encode(text, parse_special=False).ids
    assert not set(plain) & set(tokenizer.special.values())
    assert tokenizer.decode(plain) == text


def test_user_defined_tokens_are_whole_and_text() -> None:
    """A user-defined token is found whole, and survives skip_special; space runs join as such."""
    tokenizer = build(sentencepiece_metadata())
    pieces = [tokenizer.backend.id_to_token(number) for number in tokenizer.encode("a<tag>   b").ids]
    assert pieces == ["a", "<tag>", "▁▁▁", "b"]
    assert tokenizer.decode(tokenizer.encode("<tag>a</s>").ids, skip_special=True) == "<tag>a"
    assert "<tag>" not in tokenizer.special


def test_an_end_of_turn_token_is_a_control_token_whatever_its_type() -> None:
    """A converter that marks <|im_end|> as user-defined, or EOS as normal, is corrected."""
    metadata = tiny_gguf_metadata()
    types = list(metadata["tokenizer.ggml.token_type"])
    types[0], types[2] = 4, 1
    tokenizer = build(metadata | {"tokenizer.ggml.token_type": types})
    assert set(tokenizer.special) == set(SPECIAL)
    assert tokenizer.end_ids == {0, 2}
    assert build(metadata | {"tokenizer.ggml.eot_token_id": 1}).end_ids == {0, 1, 2}


GEMMA4_TEXTS = (
    *TEXTS,
    "\n", "\n\n", "a\n\n\nb\n\n\n\n\n c", " leading   and    trailing  ", "tabs\t\tand ▁ itself", "東京🚢é",
    '<|turn>user\nHi<turn|>\n<|tool_call>call:f{a:<|"|>b<|"|>}', "<0x41> <unk>",
)  # fmt: skip


@pytest.mark.parametrize("text", GEMMA4_TEXTS)
def test_gemma_4_is_read_as_the_converter_writes_it(text: str, tmp_path: Path) -> None:
    """What gguf-py makes of a tokenizer of transformers' class gives that tokenizer's ids, and the text back."""
    folder = write_gemma4_folder(tmp_path)
    ours, theirs = build(gemma4_gguf_metadata(folder)), AutoTokenizer.from_pretrained(folder)
    wanted = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text).ids == wanted
    assert ours.decode(wanted) == text.replace("▁", " ")  # as in transformers: it stands for a space
    assert load_tokenizer(folder).encode(text, parse_special=False).ids == ours.encode(text, parse_special=False).ids


def test_gemma_4s_shown_tokens_are_control_tokens(tmp_path: Path) -> None:
    """The converter calls some user-defined, so that llama.cpp shows them: text that looks like one stays text here."""
    folder = write_gemma4_folder(tmp_path)
    metadata = gemma4_gguf_metadata(folder)
    assert metadata["tokenizer.ggml.token_type"][GEMMA4_SPECIAL.index("<|channel>")] == 4
    assert metadata["tokenizer.ggml.token_type"][GEMMA4_SPECIAL.index("<eos>")] == 1
    ours = build(metadata)
    assert set(ours.special) == set(GEMMA4_SPECIAL)
    assert not set(ours.encode('<|channel> <|"|>', parse_special=False).ids) & set(ours.special.values())
    assert (ours.add_bos, ours.bos_token, ours.eos_token) == (True, "<bos>", "<turn|>")
    assert ours.end_ids == {ours.special[token] for token in ("<turn|>", "<eos>", "<|tool_response>")}
    del metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_space_prefix"]
    again = build(metadata | {"tokenizer.ggml.pre": "default"})  # which llama.cpp does not read here
    assert again.add_bos
    assert again.encode("a b").ids == ours.encode("a b").ids


@pytest.mark.parametrize(
    ("changes", "key"), [({"merges": None}, "merges"), ({"merges": ["a"]}, "merges[0]"), ({"tokens": ["a"]}, "")]
)
def test_a_damaged_gemma_4_tokenizer_is_refused(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    """No merges, a merge of one token, arrays that do not fit: one line that names the key."""
    metadata = gemma4_gguf_metadata(write_gemma4_folder(tmp_path))
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    with pytest.raises(ModelError, match=rf"model.gguf: tokenizer.ggml.{re.escape(key)}"):
        build({name: value for name, value in metadata.items() if value is not None})


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({"model": None}, "tokenizer.ggml.model"),
    "another kind": ({"model": "bert"}, "tokenizer.ggml.model"),
    "kind of another type": ({"model": 3}, "tokenizer.ggml.model"),
    "an unknown pre-tokenizer": ({"pre": "quux"}, "tokenizer.ggml.pre"),
    "no pre-tokenizer": ({"pre": None}, "tokenizer.ggml.pre"),
    "tokens that are no text": ({"tokens": [1, 2, 3]}, "tokenizer.ggml.tokens"),
    "tokens that are no list": ({"tokens": "abc"}, "tokenizer.ggml.tokens"),
    "a token twice": ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "tokenizer.ggml.tokens"),
    "too few types": ({"token_type": [1]}, "tokenizer.ggml.token_type"),
    "types that are no numbers": ({"token_type": ["1"]}, "tokenizer.ggml.token_type"),
    "merges that are no text": ({"merges": [[1, 2]]}, "tokenizer.ggml.merges"),
    "a merge of one": ({"merges": ["ab"]}, "tokenizer.ggml.merges[0]"),
    "a merge into nothing": ({"merges": ["t h", "z z"]}, "tokenizer.ggml.merges["),
    "BOS out of range": ({"bos_token_id": 400}, "tokenizer.ggml.bos_token_id"),
    "EOS below zero": ({"eos_token_id": -1}, "tokenizer.ggml.eos_token_id"),
    "EOS of another type": ({"eos_token_id": "2"}, "tokenizer.ggml.eos_token_id"),
    "a flag of another type": ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
}
SENTENCEPIECE_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "too few scores": ({"scores": [0.0]}, "tokenizer.ggml.scores"),
    "no scores": ({"scores": None}, "tokenizer.ggml.scores"),
    "scores that are no numbers": ({"scores": ["x"] * 277}, "tokenizer.ggml.scores"),
    "a score that is NaN": ({"scores": [math.nan] * 277}, "tokenizer.ggml.scores"),
    "unknown token out of range": ({"unknown_token_id": 999}, "tokenizer.ggml.unknown_token_id"),
    "no bytes and no unknown token": (
        {"tokens": ["a", "b", "c"], "token_type": [1] * 3, "scores": [0.0] * 3, "unknown_token_id": None},
        "tokenizer.ggml.tokens",
    ),
}


@pytest.mark.parametrize("fault", [*FAULTS, *SENTENCEPIECE_FAULTS])
def test_a_wrong_file_is_refused_with_its_key(fault: str) -> None:
    """Wrong kinds, types, lengths, ids and merges are one-line errors that name file and key."""
    changes, key = (FAULTS | SENTENCEPIECE_FAULTS)[fault]
    metadata = tiny_gguf_metadata() if fault in FAULTS else sentencepiece_metadata(bos_token_id=None, eos_token_id=None)
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    with pytest.raises(ModelError) as error:
        build({name: value for name, value in metadata.items() if value is not None})
    assert error.value.place.startswith(f"model.gguf: {key}")
    assert "\n" not in str(error.value)


def test_an_unknown_pre_tokenizer_is_told_what_is_known() -> None:
    """A guess would give other ids than the model was trained with, so the names are listed instead."""
    with pytest.raises(ModelError, match=r"'quux' is not known.*known are .*qwen2.*smollm"):
        build(tiny_gguf_metadata() | {"tokenizer.ggml.pre": "quux"})


def test_the_tiny_tokenizer_is_the_same_everywhere() -> None:
    """Other tests count on its ids, so a change of the builder shows here."""
    assert tiny_tokenizer().encode("SELECT name FROM the ships").ids == [53, 328, 329, 326, 379, 261, 303]
