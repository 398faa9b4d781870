"""Text to token ids and back, and conversations to text.

A model file brings three things for text: a vocabulary with its merges (the backend of the `tokenizers` package), the
names of its control tokens, and a chat template. `TextTokenizer` holds all three, wherever they came from: a GGUF
file's metadata (gguf_tokenizer.py) or a Hugging Face folder (`load_tokenizer`). Two laws matter for training:

    encode adds no token: whether a row starts with the beginning-of-text token is decided once, by the caller
    text from the data is encoded with parse_special=False: "<|im_end|>" typed by a user stays ten characters
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import AddedToken, Tokenizer

from lorafit.errors import ModelError
from lorafit.formats.template import PLAIN_TEMPLATE, ChatTemplate

Result = TypeVar("Result")

MAX_FILE = 1 << 27  # bytes of one file of a folder; the largest published tokenizer.json has a quarter

# Tokens that end a turn or a text in published models; only those that a vocabulary holds as control tokens count.
END_OF_TURN = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
)


class Encoded(NamedTuple):
    """The L token ids of a text, and for each the characters [start, end) of that text that it covers."""

    ids: list[int]
    offsets: np.ndarray
    """(L, 2) int32."""


@dataclass
class TextTokenizer:
    """A tokenizer with its control tokens and its chat template.

    Raises ModelError when the template does not compile. Not for several threads at once: whether control tokens are
    recognised is a switch of the backend.
    """

    backend: Tokenizer
    chat_template: str | None
    """Jinja source; None where the model has none, and `render` uses the plain template."""
    bos_token: str | None
    bos_id: int | None
    eos_token: str | None
    eos_id: int | None
    add_bos: bool
    """Plain text starts with BOS when the model is served."""
    special: dict[str, int]
    """Control tokens: text -> id."""
    end_ids: frozenset[int]
    """Every token that ends a generation."""
    place: str
    """The file or folder it came from, for errors."""
    added: tuple[str, ...] = ()
    """Tokens that the model's own tokenizer does not have, see `add`."""

    def __post_init__(self) -> None:
        self._template = ChatTemplate(self._template_source, f"{self.place}: chat template")
        self._checked: set[str] = set()  # characters that `lost` has looked at
        self._lost: set[str] = set()

    @property
    def has_template(self) -> bool:
        """Whether the model brought a chat template of its own."""
        return self.chat_template is not None

    @property
    def _template_source(self) -> str:
        return PLAIN_TEMPLATE if self.chat_template is None else self.chat_template

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def add(self, tokens: Sequence[str]) -> None:
        """Give these texts ids of their own, after all others; in every text they are one token from now on.

        Raises ModelError for one that is a token already.
        """
        for token in tokens:
            if self.backend.token_to_id(token) is not None:
                raise ModelError(f"{self.place}: {token!r}", "is a token already", "give it to --train-tokens")
        self.backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
        self.added += tuple(tokens)

    def encode(self, text: str, parse_special: bool = True) -> Encoded:
        """The ids of `text` and their character offsets; never a BOS or EOS that the text does not spell.

        parse_special=False encodes what looks like a control token as the plain characters that it is; on text
        without such look-alikes both give the same ids. Of a character that is cut into several tokens each has the
        offsets of the whole. Raises ModelError when the backend breaks down (a broken pattern in a tokenizer.json).
        """
        return self.encode_many([text], parse_special)[0]

    def encode_many(self, texts: Sequence[str], parse_special: bool = True) -> list[Encoded]:
        """`encode` of each text, on all cores."""
        self.backend.encode_special_tokens = not parse_special
        try:
            encodings = _backend_call(
                self.place, lambda: self.backend.encode_batch(list(texts), add_special_tokens=False)
            )
        finally:
            self.backend.encode_special_tokens = False
        return [Encoded(encoding.ids, _pairs(encoding.offsets)) for encoding in encodings]

    def lost(self, text: str) -> list[str]:
        """The characters of `text` that the vocabulary cannot spell, whole or in part, sorted.

        A byte-level vocabulary may lack a byte; the backend leaves it out without a word. What the normaliser or the
        pre-tokenizer takes away by design is not lost, and what becomes an unknown token is seen.
        """
        characters = set(text)
        unchecked = sorted(characters - self._checked)
        if unchecked:
            encoded = self.encode_many(unchecked, parse_special=False)
            self._lost.update(one for one, (ids, _) in zip(unchecked, encoded, strict=True) if self._loses(one, ids))
            self._checked.update(unchecked)
        return sorted(characters & self._lost)

    def _loses(self, character: str, ids: list[int]) -> bool:
        """Whether `ids`, the character's own, miss bytes of it."""
        if ids:
            return character != "\ufffd" and "\ufffd" in self.decode(ids)
        normalizer, cuts = self.backend.normalizer, self.backend.pre_tokenizer
        meant = normalizer.normalize_str(character) if normalizer else character
        return bool(cuts.pre_tokenize_str(meant) if cuts else meant)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. skip_special=True leaves control tokens out."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **extra: Any,
    ) -> str:
        """The conversation as the text that the model sees, by its own template or by `PLAIN_TEMPLATE`.

        extra: further variables for the template (`enable_thinking=False`, `today=`). Raises TemplateRefusal when the
        template itself refuses the messages, ModelError when it fails or asks for too much.
        """
        return self._template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            # A model's own template knows whether it writes BOS; the plain one writes what it is given.
            bos_token=self.bos_token if self.has_template or self.add_bos else None,
            eos_token=self.eos_token,
            **extra,
        )

    def fingerprint(self) -> str:
        """sha256 (hex) over vocabulary, merges and control tokens."""
        merges = json.loads(self.backend.to_str())["model"].get("merges")
        content = [sorted(self.backend.get_vocab().items()), merges, sorted(self.special.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def template_fingerprint(self) -> str:
        """sha256 (hex) of the template in use, the plain one where the model has none."""
        return hashlib.sha256(self._template_source.encode()).hexdigest()

    def digest(self) -> str | None:
        """sha256 (hex) over all that `encode` and `render` follow from; None where a template may ask for the time."""
        if "strftime_now" in self._template_source:
            return None
        tokens = [self.bos_token, self.bos_id, self.eos_token, self.eos_id, self.add_bos, self.has_template]
        sets = [sorted(self.special.items()), sorted(self.end_ids)]
        content = [self.backend.to_str(), self._template_source, *tokens, *sets]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def end_ids(special: Mapping[str, int], named: Iterable[int]) -> frozenset[int]:
    """The ids that end a generation: those that the model's files name, and the end-of-turn tokens that it has."""
    ends = {special[token] for token in END_OF_TURN if token in special} | set(named)
    if "<|return|>" in special and "<|call|>" in special:
        ends.discard(special.get("<|end|>", -1))  # gpt-oss: between the parts of one answer
    return frozenset(ends)


def load_tokenizer(folder: str | Path, template: str | None = None) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder.

    Reads tokenizer.json, and what tells of control tokens and templates: tokenizer_config.json,
    special_tokens_map.json, generation_config.json, config.json, chat_template.jinja or .json. Nothing in them is run
    or fetched. template: Jinja source to use instead of the folder's own. Raises ModelError with the file.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(str(file), "is missing", "give a folder with a fast tokenizer")
    backend = _backend_call(str(file), lambda: Tokenizer.from_str(_read_text(file)))
    backend.no_truncation()
    backend.no_padding()
    config = _read_object(folder / "tokenizer_config.json")
    named = _read_object(folder / "special_tokens_map.json") | config
    model = _read_object(folder / "config.json") | _read_object(folder / "generation_config.json")
    special = {token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special}

    bos, eos = (_named_token(backend, named, model, kind, folder) for kind in ("bos", "eos"))
    begins = _backend_call(str(file), lambda: backend.encode("", add_special_tokens=True).ids)
    add_bos = config.get("add_bos_token")
    if not isinstance(add_bos, bool):
        add_bos = bos.id is not None and begins[:1] == [bos.id]
    backend.post_processor = None  # it adds tokens and shortens offsets; neither is wanted here
    ends = [number for number in (eos.id, *_ids(model.get("eos_token_id"))) if number is not None]
    return TextTokenizer(
        backend=backend,
        chat_template=_folder_template(folder, config) if template is None else template,
        bos_token=bos.text,
        bos_id=bos.id,
        eos_token=eos.text,
        eos_id=eos.id,
        add_bos=add_bos and bos.id is not None,
        special=special,
        end_ids=end_ids(special, ends),
        place=str(folder),
    )


class _Token(NamedTuple):
    text: str | None
    id: int | None


def _named_token(
    backend: Tokenizer, named: Mapping[str, Any], model: Mapping[str, Any], kind: str, folder: Path
) -> _Token:
    """The BOS or EOS token: by text in the tokenizer's files, else by id in the model's."""
    value = named.get(f"{kind}_token")
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        number = next(iter(_ids(model.get(f"{kind}_token_id"))), None)
        text = None if number is None else backend.id_to_token(number)
        return _Token(text, None if text is None else number)
    number = backend.token_to_id(text) if isinstance(text, str) else None
    if number is None:
        place = f"{folder / 'tokenizer_config.json'}: {kind}_token"
        raise ModelError(place, f"{text!r:.60} is not in the vocabulary", "the folder's files do not belong together")
    return _Token(text, number)


def _ids(value: Any) -> list[int]:
    """`eos_token_id` is an id, a list of ids, or absent."""
    return [number for number in (value if isinstance(value, list) else [value]) if type(number) is int and number >= 0]


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template, from the first place that has one; of several by name, the one called default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    for source, place in (
        (_read_object(folder / "chat_template.json"), folder / "chat_template.json"),
        (config, folder / "tokenizer_config.json"),
    ):
        template = source.get("chat_template")
        if isinstance(template, list):
            by_name = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = by_name.get("default", next(iter(by_name.values())) if len(by_name) == 1 else by_name)
        if isinstance(template, str):
            return template
        if template is not None:
            raise ModelError(f"{place}: chat_template", f"is {template!r:.80}", "give one with --template")
    return None


def _pairs(offsets: list[tuple[int, int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(offsets), np.int32, 2 * len(offsets)).reshape(-1, 2)


def _read_text(file: Path) -> str:
    try:
        size = file.stat().st_size
        if size > MAX_FILE:
            raise ModelError(str(file), f"has {size:,} bytes, more than {MAX_FILE:,}")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(str(file), f"does not read: {error}", "download it again") from error


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelError(str(file), f"is not valid JSON: {error}", "download it again") from error
    if not isinstance(value, dict):
        raise ModelError(str(file), f"holds {type(value).__name__}, not an object", "download it again")
    return value


def _backend_call(place: str, call: Callable[[], Result]) -> Result:
    """What the backend answers, or a ModelError.

    The backend raises bare `Exception`, and when its Rust side panics a class of its own that is no Exception at all
    and has no public name; so everything is caught here but what Python itself stops a program with.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError, ModelError):
        raise
    except BaseException as error:
        raise ModelError(place, f"the tokenizer fails: {error!s:.200}", "use another copy of the file") from error
