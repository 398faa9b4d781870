"""A GGUF file's tokenizer, built straight from its metadata (no tokenizer.json, no transformers).

A GGUF file lists the tokens with a type each, and one of three ways to join characters into them:

    gpt2    byte-level BPE: text is cut into words by the pre-tokenizer that `tokenizer.ggml.pre` names, words are
            spelled in 256 byte letters, and `merges` says which neighbours join first
    llama   SentencePiece BPE: no words; spaces become "▁", and the neighbours whose union has the best score join
            first. `tokenizers` wants merges, so they are recovered from the vocabulary: every cut of a piece into two
            pieces is a merge, ranked by the piece's score
    gemma4  BPE by `merges` on whole characters: no words; spaces become "▁", and what has no token is spelled in bytes

Types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. Control tokens are recognised in text as a
whole and are special; user-defined ones are recognised as a whole and are text.
Sources: the GGUF specification (ggml, docs/gguf.md); the names of `tokenizer.ggml.pre` and what they stand for are
those of llama.cpp's vocabulary loader; patterns agree with the models' own tokenizer.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lorafit.errors import ModelError
from lorafit.formats import place
from lorafit.formats.gguf import GgufFile
from lorafit.formats.tokenizer import END_OF_TURN, TextTokenizer, end_ids

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
KINDS = ("gpt2", "llama", "gemma4")
# Tokens of Gemma 4 that end an answer beside the one that its files name; llama.cpp knows them by their text too.
GEMMA4_ENDS = ("<eos>", "<|tool_response>")
# Control tokens of Gemma 4 that its files call user-defined, so that llama.cpp shows them.
SHOWN = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"


def _words(digits: str) -> str:
    """Contractions, letters with one leading sign, digits, signs with the newlines after them, spaces."""
    return rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + _TAIL


def _cased_words(digits: str, contractions: str) -> str:
    """As `_words`, but a word also ends where lower case turns into upper case."""
    cased = f"{_LEAD}{_UPPER}*{_LOWER}+{contractions}|{_LEAD}{_UPPER}+{_LOWER}*{contractions}"
    return rf"{cased}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _TAIL


class WordSplit(NamedTuple):
    """How a pre-tokenizer cuts text: patterns one after the other, each match a piece of its own.

    digits: every digit is a word. gpt2: GPT-2's own pattern, built into `tokenizers`, comes last. nfc: text is brought
    to Unicode's composed form first. whole: a word that is a token stays one, whatever the merges say.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    nfc: bool = False
    whole: bool = False


_GPT2 = WordSplit(gpt2=True)
_GPT2_DIGITS = WordSplit(gpt2=True, digits=True)
_LLAMA3 = WordSplit((_words(r"\p{N}{1,3}"),), whole=True)
_CL100K = WordSplit((_words(r"\p{N}{1,3}"),))
_QWEN2 = WordSplit((_words(r"\p{N}"),), nfc=True)
_QWEN35 = WordSplit(
    (rf"{_CONTRACTIONS}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*" + _TAIL,), nfc=True
)
_O200K = WordSplit((_cased_words(r"\p{N}{1,3}", _CONTRACTIONS + "?"),))
_TEKKEN = WordSplit((_cased_words(r"\p{N}", ""),), whole=True)
_DEEPSEEK_V3 = WordSplit(
    (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        + _TAIL,
    )
)

PRE_TOKENIZERS: dict[str, WordSplit] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _GPT2_DIGITS,
    "starcoder": _GPT2_DIGITS,
    "refact": _GPT2_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "lfm2": _LLAMA3,
    "dbrx": _CL100K,
    "smaug-bpe": _CL100K,
    "glm4": _CL100K,
    "chatglm-bpe": _CL100K,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2._replace(nfc=False),
    "qwen35": _QWEN35,
    "gpt-4o": _O200K,
    "llama4": _O200K,
    "tekken": _TEKKEN,
    "deepseek-v3": _DEEPSEEK_V3,
}


def from_gguf(gguf: GgufFile, template: str | None = None) -> TextTokenizer:
    """The tokenizer of a GGUF file; template: Jinja source to use instead of the file's own. Raises ModelError."""
    return from_metadata(gguf.metadata, gguf.path, template)


class _Keys:
    """The file's metadata, read with a check of every type; errors name file and key."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.metadata, self.path = metadata, path

    def error(self, key: str, what: str, remedy: str = "") -> ModelError:
        return ModelError(place(self.path, key), what, remedy)

    def scalar(self, key: str, kind: type) -> Any:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, kind):
            raise self.error(key, f"is {value!r:.60}, not of type {kind.__name__}")
        return value

    def array(self, key: str, kinds: tuple[type, ...], length: int | None = None) -> list[Any]:
        if key not in self.metadata:
            raise self.error(key, "is missing", "the file holds no usable tokenizer")
        values = self.metadata[key]
        wrong = set(map(type, values)) - set(kinds) if isinstance(values, list) else {type(values)}
        if wrong:
            raise self.error(key, f"holds {wrong.pop().__name__}, not a list of {kinds[0].__name__}")
        if length is not None and len(values) != length:
            raise self.error(key, f"has {len(values)} elements for {length} tokens")
        return values

    def token_id(self, key: str, count: int) -> int | None:
        value = self.scalar(key, int)
        if value is not None and not 0 <= value < count:
            raise self.error(key, f"is {value}, outside the {count} tokens")
        return value


def from_metadata(metadata: Mapping[str, Any], path: Path, template: str | None = None) -> TextTokenizer:
    """The tokenizer that `tokenizer.*` describes; path: the file, for errors.

    metadata: plain values, arrays as lists. Raises ModelError with file and key when an array is missing, of another
    type or length, when an id is out of range, or when the kind of tokenizer or the pre-tokenizer is not known here: a
    guess would give other ids than the model was trained with.
    """
    keys = _Keys(metadata, path)
    kind = keys.scalar("tokenizer.ggml.model", str)
    if kind not in KINDS:
        remedy = f"supported are {', '.join(map(repr, KINDS))}"
        raise keys.error("tokenizer.ggml.model", f"{kind!r} is not supported", remedy)
    tokens = keys.array("tokenizer.ggml.tokens", (str,))
    bos, eos, eot, eom = (
        keys.token_id(f"tokenizer.ggml.{name}_token_id", len(tokens)) for name in ("bos", "eos", "eot", "eom")
    )
    ends = [number for number in (eos, eot, eom) if number is not None]
    if kind == "gemma4":
        ends += [tokens.index(token) for token in GEMMA4_ENDS if token in tokens]
    types = _types(keys, tokens, ends if bos is None else [bos, *ends])
    if kind == "gpt2":
        backend = _byte_level(keys, tokens)
    else:
        backend = _sentencepiece(keys, tokens, types, merged=kind == "gemma4")
    special = {token: number for number, token in enumerate(tokens) if types[number] in (CONTROL, UNKNOWN)}
    _add_whole_tokens(backend, special, [token for n, token in enumerate(tokens) if types[n] == USER_DEFINED])

    add_bos = keys.scalar("tokenizer.ggml.add_bos_token", bool)
    if add_bos is None:  # files from before the flag: what llama.cpp assumes
        add_bos = kind != "gpt2" or PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]].whole
    return TextTokenizer(
        backend=backend,
        chat_template=keys.scalar("tokenizer.chat_template", str) if template is None else template,
        bos_token=None if bos is None else tokens[bos],
        bos_id=bos,
        eos_token=None if eos is None else tokens[eos],
        eos_id=eos,
        add_bos=add_bos and bos is not None,
        special=special,
        end_ids=end_ids(special, ends),
        place=str(path),
    )


def _types(keys: _Keys, tokens: Sequence[str], control: Sequence[int]) -> list[int]:
    """Each token's type; what begins or ends a text is a control token, whatever the file says.

    Some converters lose the flag of end-of-turn tokens; llama.cpp corrects it in the same way. Gemma 4's loses it on
    purpose.
    """
    types = [NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in keys.metadata:
        types = list(keys.array("tokenizer.ggml.token_type", (int,), len(tokens)))
    for number in control:
        types[number] = CONTROL
    known = (*END_OF_TURN, *(SHOWN if keys.metadata["tokenizer.ggml.model"] == "gemma4" else ()))
    return [
        CONTROL if kind == USER_DEFINED and token in known else kind for kind, token in zip(types, tokens, strict=True)
    ]


def _add_whole_tokens(backend: Tokenizer, special: Mapping[str, int], user_defined: Sequence[str]) -> None:
    """Tokens that are found in the text before it is cut into words: control tokens and user-defined ones."""
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    known = (token for token in user_defined if backend.token_to_id(token) is not None)  # runs of spaces are respelled
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in known])


def _numbered(keys: _Keys, tokens: Sequence[str]) -> dict[str, int]:
    """Token -> id; every token once."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        number = next(n for n, token in enumerate(tokens) if vocabulary[token] != n)
        raise keys.error("tokenizer.ggml.tokens", f"holds {tokens[number]!r:.60} twice, first as token {number}")
    return vocabulary


def _byte_level(keys: _Keys, tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE from tokens and merges."""
    name = keys.scalar("tokenizer.ggml.pre", str)
    split = PRE_TOKENIZERS.get(name)
    if split is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        what = "is missing" if name is None else f"{name!r} is not known"
        raise keys.error("tokenizer.ggml.pre", what, f"it says how text is cut into words; known are {known}")
    vocabulary = _numbered(keys, tokens)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(keys, vocabulary), ignore_merges=split.whole))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    if split.digits:
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.gpt2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(keys: _Keys, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The file's merges, each of two tokens into a third."""
    merges = []
    for number, merge in enumerate(keys.array("tokenizer.ggml.merges", (str,))):
        left, space, right = merge.partition(" ")
        if not (space and left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise keys.error(f"tokenizer.ggml.merges[{number}]", f"{merge!r:.60} does not join two tokens into a third")
        merges.append((left, right))
    return merges


def _sentencepiece(keys: _Keys, tokens: Sequence[str], types: Sequence[int], *, merged: bool) -> Tokenizer:
    """SentencePiece BPE from tokens, types and scores, or merges where the file has them (`merged`); what no piece
    covers falls back to byte tokens."""
    # Runs of spaces may be stored as spaces; the text will hold "▁" for them by then.
    pieces = ["▁" * len(token) if token and not token.strip(" ") and not merged else token for token in tokens]
    vocabulary = _numbered(keys, pieces)
    unknown = keys.token_id("tokenizer.ggml.unknown_token_id", len(tokens))
    if unknown is None and not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        raise keys.error(
            "tokenizer.ggml.tokens", "lacks byte tokens, and no unknown token is named for what they covered"
        )

    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(keys, vocabulary) if merged else _recovered_merges(pieces, types, _scores(keys, pieces)),
            unk_token=None if unknown is None else pieces[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    text: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if not merged and keys.scalar("tokenizer.ggml.add_space_prefix", bool) is not False:
        spaces.insert(0, normalizers.Prepend("▁"))
        text.append(decoders.Strip(" ", left=1))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(text)
    return backend


def _scores(keys: _Keys, pieces: Sequence[str]) -> list[float]:
    """A number for each piece."""
    scores = keys.array("tokenizer.ggml.scores", (float, int), len(pieces))
    if any(math.isnan(score) for score in scores):
        raise keys.error("tokenizer.ggml.scores", "holds NaN")
    return scores


def _recovered_merges(pieces: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every cut of a piece into two pieces, best piece first.

    Only normal and user-defined pieces take part: a control token must never grow out of plain text. SentencePiece
    takes user-defined pieces before it merges anything, so they rank above every score. Of the cuts of one piece the
    one with the longest left part comes first.
    """
    joinable = {piece for piece, kind in zip(pieces, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    ranks = [-math.inf if kind == USER_DEFINED else -score for kind, score in zip(types, scores, strict=True)]
    return [
        (left, right)
        for number in sorted(range(len(pieces)), key=ranks.__getitem__)
        if (piece := pieces[number]) in joinable
        for cut in range(len(piece) - 1, 0, -1)
        if (left := piece[:cut]) in joinable and (right := piece[cut:]) in joinable
    ]
