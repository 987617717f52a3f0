"""One workload simulated, served in a process of its own without HTTP, and over HTTP, side by side.

    python benchmarks/side_by_side.py [--requests 200] [--rate 12] [--out out/side]
    python benchmarks/side_by_side.py --max-concurrency 4   # a closed loop

The model of the config is measured first, unless `OUT/profiles` is there. Then `neustream bench serve` plays the
same requests at the same instants three times: `--backend neustream`, the same with `--real`, and against
`neustream serve` of that model; `neustream bench compare` makes the table and the figures of all three.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from arguments import at_least_one
from http_load import serving

WAYS = ("simulated", "embedded", "http")
LATE = 3
"""The exit code of a benchmark whose client was too late."""


def neustream(*arguments: Any) -> None:
    """Call the command; SystemExit if it fails. That a client was too late, it says itself."""
    command = [sys.executable, "-c", "from neustream.cli import main; main()", *map(str, arguments)]
    code = subprocess.run(command).returncode
    if code not in (0, LATE):
        raise SystemExit(f"neustream {arguments[0]} {arguments[1]} ended with code {code}")


def served(config: Path) -> dict[str, Any]:
    """A server of the config's model."""
    told = yaml.safe_load(config.read_text())
    options = {"slots": told["llm"]["max_batch"], "measure_s": 5.0}
    backend = {key: value for key, value in told["backend"].items() if key != "kind"}
    model = {"name": told["name"], "kind": "text", "backend": backend, "tokenizer": "bytes"}
    return {"models": [{**model, "options": options}]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo/opt_tiny.yaml"))
    parser.add_argument("--requests", type=at_least_one, default=200)
    parser.add_argument("--rate", type=float, default=12.0)
    parser.add_argument("--max-concurrency", type=at_least_one, help="a closed loop in place of a rate")
    parser.add_argument("--promises", nargs="+", default=["ttft:100", "tpot:12"], help="as of --goodput, milliseconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/side"))
    options = parser.parse_args(arguments)
    profiles = options.out / "profiles"
    if not list(profiles.glob("*.json")):  # a measuring that was stopped leaves an empty folder
        neustream("profile", options.config, "--out", profiles)
    when = ["--request-rate", options.rate]
    if options.max_concurrency is not None:
        when = ["--max-concurrency", options.max_concurrency]
    lengths = ["--random-input-len", 40, "--random-output-len", 24, "--random-range-ratio", 0.5, "--tokenizer", "bytes"]
    goodput = ["--goodput", *options.promises]
    asked = ["--dataset-name", "random", "--num-prompts", options.requests, "--seed", options.seed, *lengths, *when]
    play = ["bench", "serve", *asked, *goodput, "--ignore-eos"]
    here = [*play, "--backend", "neustream", "--config", options.config, "--set", f"profiles={profiles.resolve()}"]
    folders = {way: options.out / way for way in WAYS}
    neustream(*here, "--out", folders["simulated"])
    neustream(*here, "--real", "--out", folders["embedded"])
    with serving(served(options.config)) as server:
        neustream(*play, "--base-url", server.url, "--out", folders["http"])
    neustream("bench", "compare", *folders.values(), "--out", options.out / "figures")


if __name__ == "__main__":
    main()
