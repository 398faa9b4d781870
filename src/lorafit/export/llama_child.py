"""llama.cpp in a process of its own, `python -m lorafit.export.llama_child`: what it expects after some beginnings.

A line of JSON comes in: {"file", "adapter" or null, "prefixes", "plain", "top", "threads"}. Lines go out, `answer JSON`
each: the likeliest tokens after each beginning as [[id, log-probability], ...], of the base, and with the adapter if
there is one. A file that llama.cpp dies of takes this process with it and not the caller's. Keys and values are kept in
fp32 and attention is the plain one, so that what is left is llama.cpp's own arithmetic on the file's formats.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    """Answer, and go: with a fault the server would wait for itself at the interpreter's end."""
    code = 1
    try:
        answer()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def answer() -> None:
    """Read the job, load the files, print the answers."""
    import xllamacpp

    job = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = job["file"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.n_parallel, params.cache_ram_mib, params.n_gpu_layers = 1, 0, 0
    params.n_ctx = max(map(len, job["prefixes"])) + 8
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if job["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["adapter"], 1.0)]
    server = xllamacpp.Server(params)
    scales: list[Any] = [[{"id": 0, "scale": 0.0}], [{"id": 0, "scale": 1.0}]] if job["adapter"] else [None]
    for lora in scales:
        print(
            "answer " + json.dumps([_next(server, ids, job["plain"], job["top"], lora) for ids in job["prefixes"]]),
            flush=True,
        )


def _next(server: Any, ids: list[int], plain: int, top: int, lora: Any) -> list[list[float]]:
    # A token that ends the text, or is half of a character, would leave no list: so a plain one is forced. What is
    # listed are the model's own logits, before that.
    rules = {"n_predict": 1, "n_probs": top, "temperature": 0, "cache_prompt": False, "logit_bias": [[plain, 1e6]]}
    if lora is not None:
        rules["lora"] = lora
    found = server.handle_completions({"prompt": ids, **rules})
    content = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return [[entry["id"], entry["logprob"]] for entry in content]


if __name__ == "__main__":
    main()
