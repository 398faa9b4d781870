"""The tokenizer in transformers' clothes, for Python users: call it, `.decode`, `.apply_chat_template`."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from lorafit.formats.tokenizer import TextTokenizer


def as_transformers(tokenizer: TextTokenizer) -> PreTrainedTokenizerFast:
    """A transformers tokenizer over the same vocabulary and chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
    )
