"""Text to token ids and back, and conversations to text.

A model file brings three things for text: a vocabulary with its merges (the backend of the `tokenizers` package), the
names of its control tokens, and a chat template. `TextTokenizer` holds all three, wherever they came from: a GGUF
file's metadata (gguf_tokenizer.py builds the backend) or a Hugging Face folder (read here). Two laws matter for
training:

    encode never adds a token: the beginning-of-text token of a row is the caller's decision (`add_bos`), made once
    text from the data is encoded with parse_special=False: "<|im_end|>" typed by a user stays eight characters
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from lorafit.formats.template import PLAIN_TEMPLATE, ChatTemplate

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
    "<|endofturn|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
)


class Encoded(NamedTuple):
    """Token ids of a text, and for each the [start, end) characters of that text that it covers."""

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass
class TextTokenizer:
    """A tokenizer with its control tokens and its chat template.

    Not for several threads at once: whether control tokens are recognised is a switch of the backend.
    """

    backend: Tokenizer
    chat_template: str | None
    """Jinja source, None where the model has none; `render` then uses the plain template."""
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
    _template: ChatTemplate | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def has_template(self) -> bool:
        """Whether the model brought a chat template of its own."""
        return self.chat_template is not None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; every id is below it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, parse_special: bool = True) -> Encoded:
        """The ids of `text` and their character offsets; never adds a BOS or EOS of its own.

        parse_special=False encodes what looks like a control token as the plain characters that it is; on text
        without such look-alikes both give the same ids. A character cut into several byte tokens gives each of them
        the offsets of the whole character.
        """
        self.backend.encode_special_tokens = not parse_special
        encoding = self.backend.encode(text, add_special_tokens=False)
        return Encoded(encoding.ids, encoding.offsets)

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. skip_special=True leaves control tokens out."""
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **extra: Any,
    ) -> str:
        """The conversation as the text that the model sees, by its own template or by `PLAIN_TEMPLATE`.

        extra: further variables for the template (`enable_thinking=False`). Raises TemplateRefusal when the template
        itself refuses the messages, ModelError when it is broken or asks for too much.
        """
        if self._template is None:
            source = PLAIN_TEMPLATE if self.chat_template is None else self.chat_template
            self._template = ChatTemplate(source, f"{self.place}: chat template")
        return self._template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
            **extra,
        )

    def fingerprint(self) -> str:
        """sha256 (hex) over vocabulary, merges and control tokens: equal exactly when texts give equal ids."""
        model = json.loads(self.backend.to_str())
        content = json.dumps([model, self.special], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def template_fingerprint(self) -> str:
        """sha256 (hex) of the template in use, the plain one where the model has none."""
        source = PLAIN_TEMPLATE if self.chat_template is None else self.chat_template
        return hashlib.sha256(source.encode()).hexdigest()
