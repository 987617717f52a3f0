"""vLLM's part of `benchmarks/text.py`, run by vLLM's own Python: serves a folder, asked by lines of JSON.

    .venv-vllm/bin/python benchmarks/text_vllm.py FOLDER SEATS LENGTH [--dtype float16] [--options JSON]

Each line is `{"prompts": [...], "counts": [...], "concurrent": n}`, and is answered by a line that begins
with `RESULT`: for each request the seconds at which it was asked, got its first and its last token,
and its tokens. Prefixes are not shared, which prompts at random do not have. On a CPU it is eager; on a GPU, where
other systems of `text.py` have memory too, it takes less than half of it. `--options` are vLLM's engine arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from time import perf_counter
from typing import Any

from arguments import at_least_one

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


BLOCK = 16
"""Tokens of a KV block on a GPU."""


def engine_of(folder: str, seats: int, length: int, dtype: str, options: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    more: dict[str, Any] = {"enforce_eager": True}
    if not current_platform.is_cpu():
        blocks = seats * (-(-length // BLOCK)) + 1  # one is a null block
        more = {"gpu_memory_utilization": 0.45, "block_size": BLOCK, "num_gpu_blocks_override": blocks}
    given = {
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "max_model_len": length,
        "max_num_seqs": seats,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    return LLM(folder, **given | more | options).llm_engine


def run(engine: Any, prompts: list[list[int]], counts: list[int], concurrent: int, turn: int) -> list[Any]:
    """Serve the requests with so many under way; what came of each."""
    from vllm import SamplingParams

    asked: dict[str, list[Any]] = {}
    left = list(range(len(prompts)))[::-1]
    began = perf_counter()
    done: dict[int, list[Any]] = {}

    def submit() -> None:
        at = left.pop()
        how = SamplingParams(temperature=0, max_tokens=counts[at], ignore_eos=True, detokenize=False)
        asked[f"{turn}-{at}"] = [perf_counter() - began, 0.0, 0.0, []]
        engine.add_request(f"{turn}-{at}", {"prompt_token_ids": prompts[at]}, how)

    while left and len(asked) < concurrent:
        submit()
    while len(done) < len(prompts):
        outputs = engine.step()
        now = perf_counter() - began
        for output in outputs:
            one = asked[output.request_id]
            one[1] = one[1] or now
            if output.finished:
                done[int(output.request_id.split("-")[1])] = [one[0], one[1], now, list(output.outputs[0].token_ids)]
                if left:
                    submit()
    return [done[at] for at in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the model")
    parser.add_argument("seats", type=at_least_one, help="requests that are served at once, at most")
    parser.add_argument("length", type=at_least_one, help="tokens of a prompt and its output, at most")
    parser.add_argument("--dtype", default="float32", help="of weights and KV")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="further engine arguments")
    given = parser.parse_args()
    engine = engine_of(given.folder, given.seats, given.length, given.dtype, given.options)
    print("RESULT ready", flush=True)
    for turn, line in enumerate(sys.stdin):
        wanted = json.loads(line)
        found = run(engine, wanted["prompts"], wanted["counts"], wanted["concurrent"], turn)
        print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
