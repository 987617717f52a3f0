"""Language models: ours beside vLLM's, Sarathi's and NeuStream's rules, simulated and on real engines.

    python benchmarks/llm.py simulate [--quick] [--jobs N] [--group TEXT ...] [--policy NAME ...]
    OMP_NUM_THREADS=1 python benchmarks/llm.py transformers
    OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python benchmarks/llm.py vllm [--quick]

`simulate` runs the points of language models of the grid of policies.py, which says what its options and words mean; it
writes llm_simulated.json and so on into its `--out`. `transformers` profiles the model of configs/demo/opt_tiny.yaml,
serves its workload at several loads and simulates the same. `vllm` (see llm_vllm.py; `make .venv-vllm/installed` makes
its venv) serves the same arrivals on a real vLLM under its own two schedulers and ours, in turns. These two write
benchmarks/results/llm_<part>.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arguments import at_least_one
from policies import add_arguments, command_of, compare

from neustream import __version__
from neustream.config import LlmExperiment, load_experiment
from neustream.experiment import LlmPipeline, simulate

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
LOADS = (1.0, 1.5, 2.0, 2.5, 3.0)


# -- served by transformers -------------------------------------------------------------------------


def run_transformers(args: argparse.Namespace) -> None:
    """Serve and simulate the demo's workload at several loads."""
    from neustream.backends.measuring import profile_steps
    from neustream.backends.serving import Session

    path = ROOT / "configs/demo/opt_tiny.yaml"
    with tempfile.TemporaryDirectory() as folder:
        base = [f"profiles={folder}"]
        setting = load_experiment(path, base)
        assert isinstance(setting, LlmExperiment)
        profile_steps(LlmPipeline(setting), "cpu", Path(folder), args.profile_s, lambda *step: None)
        rows = []
        for load in LOADS:
            experiment = load_experiment(path, [*base, f"workload.load={load}", f"workload.requests={args.requests}"])
            session = Session(experiment, "cpu")
            for policy in args.policies:
                report = session.serve(policy, [], lambda: None, lambda replay: None)
                slower = report.profile_error()
                same = simulate(session.prepared, policy)
                again = simulate(session.prepared, policy, speed=slower)
                row = {"load": load, "policy": policy, "served": report.attainment, "simulated": same.attainment}
                row |= {"simulated_as_observed": again.attainment, "slower": slower}
                rows.append(row)
                print(
                    f"load {load:g} {policy:14s} served {report.attainment:.3f}, simulated {same.attainment:.3f}, "
                    f"at its speed {again.attainment:.3f}; steps took "
                    + ", ".join(f"{x:.2f} x ({stage})" for stage, x in slower.items()),
                    flush=True,
                )
    write("transformers", rows, "OMP_NUM_THREADS=1 python benchmarks/llm.py transformers")


def write(part: str, rows: Sequence[dict[str, Any]], command: str, more: dict[str, Any] = {}) -> None:
    """Results with their origin, one row a line."""
    from neustream.profiling import processor, versions

    origin = {"command": command, "neustream": __version__, "seed": 0, "python": platform.python_version()}
    origin |= {"device": processor(), "versions": versions()}
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"origin": origin, **more})[:-1]
    path = RESULTS / f"llm_{part}.json"
    path.write_text(f'{head}, "rows": [\n  {lines}\n]}}\n')
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    add_arguments(parts.add_parser("simulate"))
    some = parts.add_parser("transformers")
    some.add_argument("--requests", type=at_least_one, default=120)
    some.add_argument("--profile-s", type=float, default=30.0, help="seconds of measuring")
    some.add_argument("--policies", nargs="+", default=["fcfs", "neustream_llm", "priced"])
    some = parts.add_parser("vllm")
    some.add_argument("--quick", action="store_true", help="one SLO, two rates, one round; write nothing")
    some.add_argument("--requests", type=at_least_one, default=150)
    some.add_argument("--rounds", type=at_least_one, default=3)
    args = parser.parse_args()
    if args.part == "simulate":
        compare(["texts"], args, command_of("llm.py simulate", args, ()), "llm_simulated")
    elif args.part == "transformers":
        run_transformers(args)
    else:
        from llm_vllm import run_vllm

        run_vllm(args, write)


if __name__ == "__main__":
    main()
