"""Language models at settings drawn at random: every policy of the grid, in simulation.

    python benchmarks/drawn_texts.py --seed N [--count 84] [--requests 300] [--kind TEXT ...] [--policy NAME ...]
                                     [--jobs N] [--out FOLDER] [--fresh]

The grid of policies.py has the same points for everybody, so a rule can be tuned on them. Here promises, rates,
lengths, memory and noise are drawn from ranges by `--seed`, kind after kind, and a seed that nobody used says how a
rule does at settings that it was not made for. Most are of OPT-13B as in configs/paper/opt_13b_a6000.yaml.
Weight on time is counted, and the summary, its words, and what is kept of results are those of policies.py.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from grid.drawing import Keys, Parts, compare_drawn, named, rounded
from grid.plan import Part

CONFIG = "opt_13b_a6000"


def _rate(draw: Random, low: float = 2.0, high: float = 10.0) -> Keys:
    """Requests a second; 6.7 is about what the device can serve."""
    return {"workload.rate": rounded(draw, low, high)}


def _pace(draw: Random, step: tuple[float, float], first: tuple[float, float] = (0.5, 5.0)) -> Keys:
    return {"first_s": rounded(draw, *first), "step_s": rounded(draw, *step)}


def scaled(draw: Random) -> Keys:
    slo = {"first_scale": rounded(draw, 2, 6), "step_scale": rounded(draw, 1.2, 3)}
    return {**_rate(draw), "slo": slo}


def two_paces(draw: Random) -> Keys:
    classes = [_pace(draw, (0.04, 0.06), (0.5, 2)), _pace(draw, (0.08, 0.2), (0.5, 2))]
    return {**_rate(draw, 4), "slo": {"classes": classes}}


def a_pace_that_cannot_be(draw: Random) -> Keys:
    """Of two, one that a decode beside others does not keep."""
    classes = [_pace(draw, (0.0112, 0.014)), _pace(draw, (0.07, 0.15))]
    return {**_rate(draw, 4), "slo": {"classes": classes}}


def tight_first(draw: Random) -> Keys:
    slo = {"first_scale": rounded(draw, 1.3, 2.5), "step_s": rounded(draw, 0.15, 0.5)}
    return {**_rate(draw), "slo": slo}


def totals(draw: Random) -> Keys:
    return {**_rate(draw, 4), "slo": {"total_s": rounded(draw, 8, 30)}}


def scaled_totals(draw: Random) -> Keys:
    return {**_rate(draw, 4), "slo": {"scale": rounded(draw, 1.15, 3)}}


def far_below_max_tokens(draw: Random) -> Keys:
    slo = draw.choice([_pace(draw, (0.06, 0.2)), {"total_s": rounded(draw, 12, 30)}])
    return {**_rate(draw, 4), "workload.max_tokens": int(rounded(draw, 1000, 3000)), "slo": slo}


def noisy(draw: Random) -> Keys:
    slo = draw.choice([{"first_scale": 3, "step_scale": 1.5}, _pace(draw, (0.05, 0.12))])
    return {**_rate(draw), "simulation.latency_noise": rounded(draw, 0.1, 0.4), "slo": slo}


def first_outputs(draw: Random) -> Keys:
    return {**_rate(draw, 6, 16), "slo": {"first_s": rounded(draw, 0.5, 12)}}


def long_outputs(draw: Random) -> Keys:
    output = {"median": int(rounded(draw, 400, 900)), "sigma": 0.5, "min": 100, "max": 2000}
    keys = {"workload.output": output, "workload.max_tokens": 2000}
    return {**_rate(draw, 1, 3), **keys, "slo": _pace(draw, (0.1, 0.4), (1, 4))}


def beside_none(draw: Random) -> Keys:
    classes = [_pace(draw, (0.05, 0.15)), {"total_s": 100000}]
    return {**_rate(draw, 4), "slo": {"classes": classes}}


def weights(draw: Random) -> Keys:
    dear = {"weight": rounded(draw, 3, 30), "share": 1, **_pace(draw, (0.045, 0.1), (0.3, 2))}
    return {**_rate(draw, 4), "slo": {"classes": [dear, {"share": 4, **_pace(draw, (0.1, 0.2))}]}}


def little_memory(draw: Random) -> Keys:
    memory = {"tokens": int(rounded(draw, 1000, 5000)), "block": 16}
    return {**_rate(draw, 1.5, 6), "llm.memory": memory, "slo": _pace(draw, (0.08, 0.3), (1, 6))}


def first_outputs_in_little_memory(draw: Random) -> Keys:
    memory = {"tokens": int(rounded(draw, 1500, 5000)), "block": 16}
    classes = [{"share": 2, "first_s": rounded(draw, 0.2, 0.8)}, _pace(draw, (0.06, 0.12), (0.5, 2))]
    return {**_rate(draw, 5, 14), "workload.prompt": 16, "llm.memory": memory, "slo": {"classes": classes}}


def one_length(draw: Random) -> Keys:
    keys = {"workload.output": int(rounded(draw, 60, 200)), "slo": {"total_s": rounded(draw, 5, 12)}}
    return {**_rate(draw, 2, 8), **keys}


def paces_beside_totals(draw: Random) -> Keys:
    classes = [_pace(draw, (0.06, 0.15), (0.5, 2)), {"total_s": rounded(draw, 12, 30)}]
    return {**_rate(draw, 4), "slo": {"classes": classes}}


def three_paces(draw: Random) -> Keys:
    classes = [
        _pace(draw, (0.045, 0.07), (0.3, 2)),
        _pace(draw, (0.08, 0.15), (0.5, 4)),
        _pace(draw, (0.2, 0.5), (1, 8)),
    ]
    return {**_rate(draw, 4), "slo": {"classes": classes}}


def far_weights(draw: Random) -> Keys:
    """Weights from 0.001 to 1000 beside each other."""
    classes = [
        {"weight": weight, "share": draw.randint(1, 4), **_pace(draw, (0.05, 0.2))} for weight in (0.001, 1, 1000)
    ]
    return {**_rate(draw, 4, 12), "slo": {"classes": classes}}


def totals_far_below_max_tokens(draw: Random) -> Keys:
    slo = draw.choice([{"total_s": rounded(draw, 8, 40)}, {"scale": rounded(draw, 0.1, 0.6)}])
    return {**_rate(draw, 3), "workload.max_tokens": int(rounded(draw, 800, 4000)), "slo": slo}


def wrong_profile(draw: Random) -> Keys:
    slo = draw.choice([_pace(draw, (0.06, 0.2)), {"total_s": rounded(draw, 10, 40)}, {"first_s": rounded(draw, 1, 8)}])
    return {**_rate(draw, 2, 8), "simulation.latency_scale": rounded(draw, 0.5, 2), "slo": slo}


def slow_phases(draw: Random) -> Keys:
    slow = {"factor": rounded(draw, 1.4, 3), "lasts": rounded(draw, 20, 100), "every": rounded(draw, 150, 400)}
    slo = draw.choice([_pace(draw, (0.06, 0.2)), {"total_s": rounded(draw, 10, 40)}])
    return {**_rate(draw, 1, 6), "slow": slow, "slo": slo}


def stalls(draw: Random) -> Keys:
    slow = {"factor": rounded(draw, 4, 30), "lasts": 1, "every": rounded(draw, 80, 300)}
    return {**_rate(draw, 1, 6), "slow": slow, "slo": _pace(draw, (0.06, 0.2))}


def long_prompts(draw: Random) -> Keys:
    prompt = {"median": int(rounded(draw, 300, 900)), "sigma": 0.8, "min": 50, "max": 3000}
    slo = draw.choice([_pace(draw, (0.08, 0.3), (1, 6)), {"first_scale": rounded(draw, 1.5, 5), "step_s": 0.3}])
    return {**_rate(draw, 0.8, 3), "workload.prompt": prompt, "slo": slo}


def bursts(draw: Random) -> Keys:
    return {**_rate(draw, 1.5, 6), "workload.cv": rounded(draw, 3, 8), "slo": _pace(draw, (0.05, 0.2))}


def tiny_memory(draw: Random) -> Keys:
    memory = {"tokens": int(rounded(draw, 800, 3000)), "block": 16}
    slo = draw.choice([{"total_s": rounded(draw, 10, 40)}, {"first_s": rounded(draw, 1, 8)}, {"scale": 2}])
    return {**_rate(draw, 1, 5), "llm.memory": memory, "slo": slo}


def several_devices(draw: Random) -> Keys:
    devices = draw.randint(2, 3)
    return {**_rate(draw, 2 * devices, 8 * devices), "devices": devices, "slo": _pace(draw, (0.05, 0.2))}


def batching_does_not_pay(draw: Random) -> tuple[Parts, Keys]:
    scales = {"first_scale": rounded(draw, 2, 6), "step_scale": rounded(draw, 1.5, 5)}
    slo = draw.choice([scales, {"total_s": rounded(draw, 3, 12)}, _pace(draw, (0.05, 0.2))])
    return {"": Part(config="no_gain_text")}, {"load": rounded(draw, 0.4, 2), "slo": slo}


def two_models(draw: Random) -> tuple[Parts, Keys]:
    """One that is promised little beside one that is promised much."""
    tight = {"slo": {"first_s": rounded(draw, 0.5, 2), "step_s": rounded(draw, 0.08, 0.2)}}
    loose = {"slo": {"first_s": rounded(draw, 4, 15), "step_s": rounded(draw, 0.3, 1)}}
    parts = {
        "small": Part(config=CONFIG, share=rounded(draw, 0.3, 1), set=tight),
        "large": Part(config="opt_30b_a6000", share=rounded(draw, 0.3, 1), set=loose),
    }
    return parts, {"load": rounded(draw, 0.3, 1.2), "simulation.mixed_devices": True}


def _of_opt(keys: Callable[[Random], Keys]) -> Callable[[Random], tuple[Parts, Keys]]:
    return lambda draw: ({"": Part(config=CONFIG)}, keys(draw))


KINDS = {
    name: _of_opt(kind)
    for name, kind in named(
        scaled,
        two_paces,
        a_pace_that_cannot_be,
        tight_first,
        totals,
        scaled_totals,
        far_below_max_tokens,
        noisy,
        first_outputs,
        long_outputs,
        beside_none,
        weights,
        little_memory,
        first_outputs_in_little_memory,
        one_length,
        paces_beside_totals,
    ).items()
}


MORE = {
    name: _of_opt(kind)
    for name, kind in named(
        three_paces,
        far_weights,
        totals_far_below_max_tokens,
        wrong_profile,
        slow_phases,
        stalls,
        long_prompts,
        bursts,
        tiny_memory,
        several_devices,
    ).items()
}
MORE |= named(batching_does_not_pay, two_models)


def main() -> None:
    compare_drawn(__doc__, "drawn_texts", (KINDS, MORE), requests=300)


if __name__ == "__main__":
    main()
