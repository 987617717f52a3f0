"""How long reading a trace takes, by format: rows made up in each format's schema, read and sorted into requests' rows.

    python benchmarks/traces.py [--rows N] [--repeats N] [--json FILE]

Writes N rows (100,000) a format to a temporary folder, plain and gzipped, and takes all of them:
medians in seconds of R readings (5), on the clock and of the processor (less where others use the machine
too), and the most memory that Python held for a window of 1,000 rows at the end of the file. DiffusionDB
is measured as CSV and, with pyarrow, as parquet. ShareGPT's rows are a tenth of N, with texts of 20 and 80
words and a tokenizer that knows words: its time is the tokenizer's.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import importlib.util
import json
import platform
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from arguments import at_least_one
from rich.console import Console

from neustream import __version__
from neustream.analysis.tables import new_table
from neustream.profiling import processor
from neustream.workload import Trace, Window, take

START = datetime(2024, 5, 10, tzinfo=UTC)
WORDS = ["[UNK]", *(f"word{at}" for at in range(500))]


def _date(at: int, zone: str = "") -> str:
    moment = START + timedelta(milliseconds=37 * at)
    return f"{moment:%Y-%m-%d %H:%M:%S}.{moment.microsecond:06d}0{zone}"


def _texts(at: int, count: int) -> str:
    return " ".join(WORDS[1 + (at * 7 + n) % 500] for n in range(count))


def lines_of(name: str, rows: int) -> Iterator[str]:
    """The lines of a file in the schema of a format."""
    if name == "sharegpt":
        yield from _conversations(rows)
        return
    head, row = FORMATS[name]
    if head:
        yield head
    for at in range(rows):
        yield row(at, at * 37 % 4000 + 1, at * 11 % 900 + 1)


def _conversations(rows: int) -> Iterator[str]:
    """One JSON list, a conversation a line."""
    for at in range(rows):
        turns = [
            {"from": "human", "value": _texts(at, 20)},
            {"from": "gpt", "value": _texts(at, 80)},
        ]
        end = "]" if at == rows - 1 else ","
        yield ("[" if at == 0 else "") + json.dumps({"id": str(at), "conversations": turns}) + end


def _own(at: int, prompt: int, output: int) -> str:
    return f"{at * 0.037:.3f},{prompt},{output},500,50,s{at % 100}"


def _own_images(at: int, prompt: int, output: int) -> str:
    params = {"prompt": "a cat"}
    return json.dumps({"arrival_s": at * 0.037, "steps": prompt % 50 + 1, "slo_ms": 900, "params": params})


def _azure_llm(at: int, prompt: int, output: int) -> str:
    return f"{_date(at, '+00:00')},{prompt},{output}"


def _azure_lmm(at: int, prompt: int, output: int) -> str:
    return f"{_date(at)},{at % 3},{prompt},{output}"


def _burstgpt(at: int, prompt: int, output: int) -> str:
    return f"{at},{at % 99},2.5,ChatGPT,{prompt},{output},{prompt + output},API log"


def _mooncake(at: int, prompt: int, output: int) -> str:
    blocks = list(range(prompt // 512 + 1))
    row = {"timestamp": at * 37, "input_length": prompt, "output_length": output, "hash_ids": blocks}
    return json.dumps(row)


def _guidellm(at: int, prompt: int, output: int) -> str:
    return json.dumps({"timestamp": at / 9, "input_length": prompt, "output_length": output})


def _vidur(at: int, prompt: int, output: int) -> str:
    return f"{at / 9},{prompt},{output}"


def _vllm_omni(at: int, prompt: int, output: int) -> str:
    return (
        f"Request(prompt='{_texts(at, 12)}', width=512, height=768, num_frames=1, "
        f"num_inference_steps={prompt % 50 + 1}, seed={at}, timestamp={at / 9}, slo_ms=900.5, "
        f"request_id='{at}')"
    )


def _diffusiondb(at: int, prompt: int, output: int) -> str:
    drawn = f"1,{at},{prompt % 50 + 1},7.0,8,512,704"
    return f'{at}.png,"{_texts(at, 12)}, art",{drawn},u,{_date(at)[:19]}+00:00,0.1,0.2'


FORMATS: dict[str, tuple[str, Callable[[int, int, int], str]]] = {
    "neustream": ("arrival_s,prompt_tokens,output_tokens,slo_ttft_ms,slo_tpot_ms,session", _own),
    "neustream jsonl": ("", _own_images),
    "azure_llm": ("TIMESTAMP,ContextTokens,GeneratedTokens", _azure_llm),
    "azure_lmm": ("TIMESTAMP,NumImages,ContextTokens,GeneratedTokens", _azure_lmm),
    "burstgpt": (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
        _burstgpt,
    ),
    "mooncake": ("", _mooncake),
    "guidellm": ("", _guidellm),
    "vidur": ("arrived_at,num_prefill_tokens,num_decode_tokens", _vidur),
    "vllm_omni": ("", _vllm_omni),
    "diffusiondb": (
        "image_name,prompt,part_id,seed,step,cfg,sampler,width,height,user_name,timestamp,image_nsfw,prompt_nsfw",
        _diffusiondb,
    ),
}
"""The first line of a file, "" for none, and each further one by its number and its tokens."""


NAMES = (*FORMATS, "sharegpt")


def measure(trace: Trace, rows: int, repeats: int) -> dict[str, float]:
    """The median seconds of reading all, and the most MB held for the last thousand rows."""
    times, busy = [], []
    for _ in range(repeats):
        before, cpu = perf_counter(), process_time()
        found = take(trace)
        times.append(perf_counter() - before)
        busy.append(process_time() - cpu)
        assert len(found.rows) == rows
    last = found.rows[-min(1000, rows)].arrival_s if found.timed else None
    del found
    tracemalloc.start()
    take(trace, Window(start_s=last) if last is not None else Window(requests=1000))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"median_s": statistics.median(times), "cpu_s": statistics.median(busy), "window_mb": most / 1e6}


def parquet(source: Path, path: Path) -> None:
    """DiffusionDB's CSV as the parquet file that it is published as."""
    read, write = (importlib.import_module(f"pyarrow.{name}") for name in ("csv", "parquet"))
    write.write_table(read.read_csv(source), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=at_least_one, default=100_000)
    parser.add_argument("--repeats", type=at_least_one, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        model = {"type": "WordLevel", "vocab": {word: at for at, word in enumerate(WORDS)}, "unk_token": "[UNK]"}
        tokenizer.write_text(json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model,
                                         "added_tokens": []}))  # fmt: skip
        for name in NAMES:
            path = Path(folder) / name
            rows = asked.rows // 10 if name == "sharegpt" else asked.rows
            path.write_text("\n".join(lines_of(name, rows)) + "\n")
            packed = Path(folder) / f"{name} gzipped"
            packed.write_bytes(gzip.compress(path.read_bytes(), 6))
            files = [path, packed]
            if name == "diffusiondb" and importlib.util.find_spec("pyarrow"):
                files.append(Path(folder) / "diffusiondb parquet")
                parquet(path, files[-1])
            for file in files:
                found = measure(Trace(file, tokenizer=tokenizer), rows, asked.repeats)
                entries.append({"file": file.name, "rows": rows, "mb": file.stat().st_size / 1e6, **found})
                file.unlink()
    table = new_table(
        f"reading traces, {processor()}", "file", ["rows", "MB", "median s", "CPU s", "rows/s", "MB for 1,000"]
    )
    for entry in entries:
        rate = f"{entry['rows'] / entry['median_s']:,.0f}"
        times = (f"{entry[key]:.2f}" for key in ("median_s", "cpu_s"))
        table.add_row(
            entry["file"], f"{entry['rows']:,}", f"{entry['mb']:.1f}", *times, rate, f"{entry['window_mb']:.1f}"
        )
    Console().print(table)
    if asked.json:
        about = {"rows": asked.rows, "repeats": asked.repeats, "processor": processor(), "neustream": __version__}
        about["python"] = platform.python_version()
        asked.json.write_text(json.dumps({**about, "traces": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
