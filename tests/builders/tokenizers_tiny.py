"""A tokenizer of about 400 tokens, trained here and now: byte-level BPE with ChatML's tokens, shaped like SmolLM2's.

It is the same on every machine: the text is below, the trainer breaks ties by token number, nothing is downloaded.
Three forms of the same tokenizer: the class (`tiny_tokenizer`), a GGUF file's metadata (`tiny_gguf_metadata`) and
a Hugging Face folder (`write_tiny_folder`). Beside it one that is shaped like Gemma 4's, as a folder and as metadata.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lorafit.formats.tokenizer import TextTokenizer

VOCABULARY = 400
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
BOS, EOS = 1, 2
GEMMA4_SHOWN = ("<|channel>", "<channel|>", "<|tool_call>", "<|tool_response>", '<|"|>')  # in its files user-defined
GEMMA4_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", *GEMMA4_SHOWN)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PARAGRAPH = """The question is what the answer is. A user asks the assistant for the name of the table and the number of
rows in it, and the assistant writes the query: SELECT name FROM people WHERE age > 30 ORDER BY name. When the sun
rises over the harbour, the ships leave one after another, and the people who stayed behind count them from the wall.
There were 12 ships in the first year, 48 in the second and 100 in the third; how many ships were there in all? There
were 160 ships. The first thing to learn about learning is that it takes time, and the second thing is that time is
never enough. She sells the remaining eggs at the market every day for 2 dollars an egg, and then she walks home along
the river, where the children are playing and the light is on the water. What is the total number of wins for the team
that plays at home? SELECT COUNT wins FROM team WHERE place = 'home'. You are a helpful assistant. This is the end of
the paragraph, and these are the words that it ends with: system, user, assistant, tool, message, content, model."""


@cache
def _backend_json() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
    )
    backend.train_from_iterator([PARAGRAPH], trainer)
    return backend.to_str()


def tiny_backend() -> Tokenizer:
    """A fresh backend; ids 0 to 2 are `SPECIAL`, then the 256 bytes, then the merges."""
    return Tokenizer.from_str(_backend_json())


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> TextTokenizer:
    """The tokenizer as the rest of lorafit sees it; pass `chat_template=None` for a model without one."""
    return TextTokenizer(
        backend=tiny_backend(),
        chat_template=chat_template,
        bos_token=SPECIAL[BOS],
        bos_id=BOS,
        eos_token=SPECIAL[EOS],
        eos_id=EOS,
        add_bos=False,
        special={token: number for number, token in enumerate(SPECIAL)},
        end_ids=frozenset({0, EOS}),
        place="tiny",
    )


def gappy_tokenizer() -> TextTokenizer:
    """The tiny tokenizer without tokens for the bytes 0x04 and 0xF1, two of those that SmolLM2's vocabulary lacks."""
    content = json.loads(_backend_json())
    for number, letter in enumerate("Ąñ"):
        content["model"]["vocab"][f"unused{number}"] = content["model"]["vocab"].pop(letter)
    tokenizer = tiny_tokenizer()
    tokenizer.backend = Tokenizer.from_str(json.dumps(content))
    return tokenizer


def tiny_gguf_metadata(chat_template: str | None = CHAT_TEMPLATE) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF file that holds this tokenizer."""
    model = json.loads(_backend_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": False,
    }
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    return metadata


def write_tiny_folder(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Writes tokenizer.json and tokenizer_config.json into `folder` (made if need be) and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_backend().save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS], "add_bos_token": False}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@cache
def _gemma4_parts() -> tuple[dict[str, int], list[tuple[str, str]]]:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    backend.train_from_iterator([*PARAGRAPH.splitlines(), "\n\n\n\n", "\n\n", "▁▁▁▁"] * 2, trainer)
    model = json.loads(backend.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: number for number, token in enumerate([*GEMMA4_SPECIAL, *bytes_, *pieces])}
    return vocabulary, [tuple(pair) for pair in model["merges"]]


def write_gemma4_folder(folder: Path) -> Path:
    """A tokenizer as Gemma 4 has it, by transformers' own class: BPE on characters, bytes for what it does not know.
    Its text ends at the end of a turn, and <eos> is nothing special to the converter then."""
    from transformers import GemmaTokenizer

    vocabulary, merges = _gemma4_parts()
    own = list(GEMMA4_SPECIAL[5:])
    made = GemmaTokenizer(vocab=vocabulary, merges=merges, eos_token="<turn|>", extra_special_tokens=own)
    made.save_pretrained(folder)
    return folder


def gemma4_gguf_metadata(folder: Path) -> dict[str, Any]:
    """What llama.cpp's converter makes of that folder's tokenizer, by gguf-py's own reading of it."""
    tokens, scores, types = [], [], []
    for text, score, kind in gguf.LlamaHfVocab(folder).all_tokens():
        tokens.append(text.decode())
        scores.append(score)
        types.append(int(gguf.TokenType.USER_DEFINED if tokens[-1] in GEMMA4_SHOWN else kind))
    special = gguf.SpecialVocab(folder, load_merges=True)
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": special.merges,
        **{f"tokenizer.ggml.{kind}_token_id": number for kind, number in special.special_token_ids.items()},
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
    }
