"""Greedy decoding on the packed file: tokens a second of lorafit and of llama.cpp, one prompt and sixteen at once.

    python -m benchmarks.decode [--models smollm2] [--tokens 128]

Both read the same file, take the same ids and give the same number of tokens, end tokens or not; a time is that of the
whole call, the prompt of 16 tokens included. llama.cpp (xllamacpp) runs in a process of its own, which waits while ours
decodes. It multiplies by 8-bit activations and lorafit in the compute dtype: the texts may differ.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

import torch

from benchmarks.common import ROOT, alternate, arguments, heading, model_file, publish, say, spread, table
from benchmarks.trainee import random_pack
from lorafit import machine
from lorafit.config import TrainConfig
from lorafit.model.generate import generate
from lorafit.use import open_base

PROMPT = 16  # tokens


class LlamaCpp:
    """llama.cpp in a child: a line of JSON with prompts goes in, the number of tokens it gave comes out."""

    def __init__(self, job: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "benchmarks.decode", "--child", json.dumps(job)]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        if self.answer() != "ready":
            raise SystemExit("error: xllamacpp: does not run here; pip install -e '.[bench]'")

    def answer(self) -> Any:
        """What the child says next; lines that llama.cpp prints are passed over."""
        for line in self.child.stdout or ():
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        return None

    def decode(self, prompts: list[list[int]]) -> int:
        assert self.child.stdin is not None, "the child was started with a pipe"
        print(json.dumps(prompts), file=self.child.stdin, flush=True)
        return int(self.answer())

    def close(self) -> None:
        assert self.child.stdin is not None, "the child was started with a pipe"
        self.child.stdin.close()
        self.child.wait()


def serve(job: dict[str, Any]) -> None:
    """The child: load the model, then answer."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["file"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.n_parallel = job["batch"]
    params.n_ctx = job["batch"] * (256 + job["tokens"])
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    print('answer "ready"', flush=True)
    rules = {"n_predict": job["tokens"], "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    for line in sys.stdin:
        prompts = json.loads(line)
        found = server.handle_completions({"prompt": prompts if len(prompts) > 1 else prompts[0], **rules})
        print(f"answer {found['usage']['completion_tokens']}", flush=True)


def measure(name: str, options: Any) -> list[list[object]]:
    """Two or three lines of the table."""
    file = model_file(name)
    base = open_base(TrainConfig(model=str(file), threads=options.threads))
    job = {"file": str(file), "threads": options.threads, "tokens": options.tokens, "batch": options.batch}
    theirs = LlamaCpp(job)
    rows: list[list[object]] = []
    for count in (1, options.batch):
        pack = random_pack(base.model.config.vocab_size, count, PROMPT)
        prompts = pack.ids_T.reshape(count, PROMPT).tolist()

        def ours(number: int, prompts: list[list[int]] = prompts) -> int:
            return sum(map(len, generate(base.model, prompts, max_tokens=options.tokens, end_ids=())))

        def llama(number: int, prompts: list[list[int]] = prompts) -> int:
            return theirs.decode(prompts)

        say(f"{file.name} {count}")
        times = alternate({"lorafit": ours, "llama.cpp": llama}, options.repeats)
        rates = {side: [tokens / seconds for seconds, tokens in found] for side, found in times.items()}
        ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
        rows.append([file.name, count, *(spread(found, 1) for found in rates.values()), f"{ratio:.2f}"])
    theirs.close()
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3"], help="names or GGUF files")
    parser.add_argument("--tokens", type=int, default=128, help="decoded for each prompt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="prompts at once (default: %(default)s)")
    options = parser.parse_args()
    if options.child:
        return serve(options.child)
    torch.set_num_threads(options.threads)
    machine.settle_allocator(keeps=True)
    rows = [row for name in options.models for row in measure(name, options)]
    title = f"Greedy decoding of {options.tokens} tokens after {PROMPT}"
    head = ["model", "prompts", "lorafit, tokens/s", "llama.cpp, tokens/s", "ratio"]
    return publish([heading(title, options.threads, ["xllamacpp"]), table(head, rows)], options.out)


if __name__ == "__main__":
    main()
