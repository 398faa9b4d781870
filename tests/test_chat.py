"""chat as a command: through a pipe and through a terminal, with what a person does there."""

from __future__ import annotations

import io
import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest
import torch

from builders.commands import Outcome, World, run, write_rows
from builders.models import save_folder, tiny_model
from builders.tokenizers_tiny import tiny_tokenizer

FP32 = ("--compute", "fp32", "--threads", "1")
FEW = ("--max-tokens", "4", *FP32)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("chat"))


def piped(text: str, *words: object) -> Outcome:
    """The chat in this process, with `text` as its standard input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(text))
        return run("chat", *words)


def answers(world: World, folder: Path, talk: list[dict], *words: object) -> str:
    """What `lorafit generate` says to the conversation."""
    data = write_rows(folder / "talk.jsonl", [{"messages": talk}])
    return run("generate", world.model, "--data", data, "--json", *words, *FEW).json["output"]


def test_a_conversation_has_its_history(world, tmp_path):
    """Each answer is what generate says to all that was said; /clear forgets it; standard output has answers alone."""
    told = piped("Hi\n\nWho?\n/clear\nWho?\n", world.model, *FEW)
    assert told.code == 0, told.err
    talk = [{"role": "user", "content": "Hi"}]
    first = answers(world, tmp_path, talk)
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "Who?"}]
    second, fresh = answers(world, tmp_path, talk), answers(world, tmp_path, talk[-1:])
    assert told.out == f"{first}\n{second}\n{fresh}\n"
    assert second != fresh, "the test must see that history counts"
    assert "the conversation begins anew" in told.err


def test_compare_asks_both_and_each_keeps_its_own_history(world, tmp_path):
    """Base and adapter answer as they do alone, named, the system message before both."""
    adapter = ("--adapter", world.out / "adapter")
    told = piped("Hi\nWho?\n", world.model, *adapter, "--compare", "--system", "Be short", *FEW)
    alone = [piped("Hi\nWho?\n", world.model, *words, "--system", "Be short", *FEW).out for words in ((), adapter)]
    base, tuned = (text.split("\n") for text in alone)
    assert alone[0] != alone[1], "the test must see two voices"
    assert "".join(told.out.split()) == "".join(f"base:{base[n]}adapter:{tuned[n]}".replace(" ", "") for n in range(2))


def test_draws_follow_the_seed(world):
    """Equal seeds, equal answers; each turn draws anew."""
    words = (world.model, "--temperature", "2", *FEW)
    first, again, other = (piped("Hi\n/clear\nHi\n", *words, "--seed", seed).out for seed in ("1", "1", "7"))
    assert first == again != other


def test_a_full_context_loses_its_oldest_turns_and_says_so(world):
    """256 tokens: the oldest exchange goes, in one line; a message that fits nowhere is refused, the chat goes on."""
    long = "word " * 25
    told = piped(f"{long}\n{long}\n{long}\n{'word ' * 300}\nHi\n", world.model, *FEW)
    assert told.code == 0, told.err
    assert "the context of 256 tokens is full: the oldest 2 messages are left out" in told.err
    assert "warning: the message: has " in told.err
    assert "and the model's context is 256, 4 of them for an answer; shorten it" in told.err
    assert told.err.count("warning:") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--compare",), "--compare: needs an adapter to compare the base with; give --adapter DIR"),
        (("--temperature", "-1"), "--temperature: is -1.0"),
        (("--adapter", "nowhere"), "adapter_config.json: does not exist"),
    ],
)
def test_chat_refuses_in_one_line(world, words, says):
    """Before anything is asked."""
    outcome = run("chat", world.model, *words, *FP32)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.err


def test_a_template_without_system_messages_refuses_one_at_the_start(world, tmp_path):
    """--system with such a template is one line, and no conversation begins."""
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    outcome = run("chat", world.model, "--system", "Be short", "--template", template, *FP32)
    assert outcome.code == 2
    assert "error: --system: the chat template refuses it: " in outcome.err


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, *words: object, module: bool = True) -> None:
        command = [sys.executable, *(("-m", "lorafit", "chat") if module else ()), *map(str, words)]
        pid, self.fd = pty.fork()
        if pid == 0:
            os.execve(sys.executable, command, {**os.environ, "TERM": "dumb"})
        self.pid, self.seen = pid, ""

    def until(self, text: str, seconds: float = 60.0) -> str:
        """Wait for `text` after what was waited for before; what came up to it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} did not come: {self.seen[-500:]!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode("utf-8", "replace")
                except OSError:  # the other side is gone
                    raise AssertionError(f"{text!r} did not come before the end: {self.seen[-500:]!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C once the chat waits for a line: a signal between its prompt and its waiting would wait with it."""
        asleep = 0
        while asleep < 10:
            time.sleep(0.02)
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            asleep = asleep + 1 if state == "S" else 0
        self.type("\x03")

    def code(self) -> int:
        """Read to the end; the exit code."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                if select.select([self.fd], [], [], 0.1)[0] and not os.read(self.fd, 4096):
                    break
            except OSError:
                break
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(tmp_path):
    """In a terminal: an answer that would take 90,000 tokens ends within a step or two and the prompt comes back;
    Ctrl-C there drops the line, and once more leaves with code 0."""
    endless = tiny_model("llama", max_position_embeddings=100_000, tie_word_embeddings=True)
    with torch.no_grad():
        endless.model.embed_tokens.weight[sorted(tiny_tokenizer().end_ids)] = 0  # never the likeliest
    model = save_folder(endless, tmp_path / "m")
    chat = Terminal(model, "--max-tokens", 90_000, *FP32)
    chat.until("> ")
    chat.type("Hi\n")
    chat.until("Hi\r\n")
    time.sleep(1.0)
    chat.type("\x03")
    chat.until("(stopped)", 20)
    chat.until("> ")
    chat.type("half a line")
    chat.interrupt()
    chat.until("once more, or Ctrl-D, leaves")
    chat.until("> ")
    chat.type("/clear\n")
    chat.until("the conversation begins anew")
    chat.until("> ")
    chat.interrupt()
    chat.until("once more, or Ctrl-D, leaves")
    chat.until("> ")
    chat.interrupt()
    assert chat.code() == 0


def test_ctrl_d_leaves_and_what_a_terminal_would_obey_is_shown(world, tmp_path):
    """At the prompt, with code 0; escape sequences in an answer appear as pictures."""
    console_words = "from lorafit import console; console.piece('\\x1b[31mred\\n')"
    shown = Terminal("-c", console_words, module=False)
    shown.until("\u241b[31mred\r\n")
    assert shown.code() == 0
    chat = Terminal(world.model, *FEW)
    chat.until("> ")
    chat.type("Hi\n")
    chat.until("> ")
    chat.type("\x04")
    assert chat.code() == 0


def test_slash_words_are_commands(world):
    """/exit leaves before what follows is answered; an unknown one says what there is and is no message."""
    told = piped("/what\n/exit\nHi\n", world.model, *FEW)
    assert (told.code, told.out) == (0, "")
    assert told.err.count("/clear forgets the conversation, /exit or Ctrl-D leaves") == 2
