"""Diffusion models at settings drawn at random: every policy of the grid, in simulation.

    python benchmarks/drawn_images.py --seed N [--count 69] [--requests 600] [--kind TEXT ...] [--policy NAME ...]
                                      [--jobs N] [--out FOLDER] [--fresh]

What drawn_texts.py is for language models: models, steps, promises, loads and how the device differs are drawn
from ranges by `--seed`, kind after kind. Two kinds have texts beside the images, and the policies that serve both.
"""

from __future__ import annotations

from random import Random
from typing import Any

from grid.drawing import Keys, Parts, compare_drawn, named, rounded
from grid.plan import Part

DIT_S = "dit_s2_256_rtx4090"
MODELS = (DIT_S, "dit_xl2_256_rtx4090", "palette_256_rtx4090", "sd15_256_rtx4090", "sd15_512_h100", "sd15_512_rtx4090")
Drawn = tuple[Parts, Keys]


def _one(config: str, **keys: Any) -> Drawn:
    """One model; `__` in a key is a dot."""
    return {"": Part(config=config)}, {key.replace("__", "."): value for key, value in keys.items()}


def _steps(draw: Random, low: int, high: int) -> Keys:
    """From so many steps to at most 2.5 times as many."""
    least = int(rounded(draw, low, high))
    return {"min": least, "max": int(rounded(draw, 1.05 * least, 2.5 * least)) + 1}


def _classes(*scales: float, shares: tuple[int, ...] = ()) -> Keys:
    shares = shares or (1,) * len(scales)
    pairs = zip(scales, shares, strict=True)
    return {"slo": {"classes": [{"name": f"{scale:g}", "scale": scale, "share": share} for scale, share in pairs]}}


def loose_beside_tight(draw: Random) -> Drawn:
    promises = _classes(rounded(draw, 1.3, 4), rounded(draw, 8, 100), shares=(draw.randint(1, 3), draw.randint(1, 3)))
    parts, keys = _one(draw.choice(MODELS), load=rounded(draw, 0.8, 2), workload__cv=rounded(draw, 0.5, 2))
    return parts, {**keys, "workload.steps": _steps(draw, 20, 80), **promises}


def few_steps(draw: Random) -> Drawn:
    keys = {"load": rounded(draw, 0.8, 2), "workload.cv": rounded(draw, 0.5, 2), "slo.scale": rounded(draw, 1.5, 4)}
    return {"": Part(config=DIT_S)}, {**keys, "workload.steps": _steps(draw, 10, 30)}


def slow_phases(draw: Random) -> Drawn:
    slow = {"factor": rounded(draw, 1.4, 3), "lasts": rounded(draw, 50, 200), "every": rounded(draw, 250, 600)}
    parts, keys = _one(draw.choice((DIT_S, "sd15_512_h100")), load=rounded(draw, 0.2, 0.9), slow=slow, workload__cv=1)
    return parts, {**keys, "slo.scale": rounded(draw, 1.8, 4), "workload.steps": _steps(draw, 20, 50)}


def stalls(draw: Random) -> Drawn:
    slow = {"factor": rounded(draw, 4, 30), "lasts": 1, "every": rounded(draw, 80, 300)}
    parts, keys = _one(draw.choice(MODELS), load=rounded(draw, 0.4, 1), slow=slow, workload__cv=1)
    return parts, {**keys, "slo.scale": rounded(draw, 1.5, 4), "workload.steps": _steps(draw, 20, 60)}


def noise(draw: Random) -> Drawn:
    parts, keys = _one(draw.choice(MODELS), load=rounded(draw, 0.5, 1.5), workload__cv=rounded(draw, 0.5, 2))
    keys |= {"simulation.latency_noise": rounded(draw, 0.05, 0.4), "slo.scale": rounded(draw, 1.4, 4)}
    return parts, {**keys, "simulation.latency_scale": rounded(draw, 0.9, 1.4)}


def long_loops_past_capacity(draw: Random) -> Drawn:
    return _one(DIT_S, load=rounded(draw, 1, 2), workload__cv=rounded(draw, 0.5, 2), slo__scale=rounded(draw, 1.5, 3))


def mixed_promises(draw: Random) -> Drawn:
    promises = _classes(*(rounded(draw, 1.2, 6) for _ in range(draw.randint(2, 4))))
    parts, keys = _one(draw.choice(MODELS), load=rounded(draw, 0.5, 1.6), workload__cv=rounded(draw, 0.5, 2))
    return parts, {**keys, "workload.steps": _steps(draw, 20, 200), **promises}


def two_models(draw: Random) -> Drawn:
    return _models(draw, 2)


def three_models(draw: Random) -> Drawn:
    return _models(draw, 3)


def _models(draw: Random, count: int) -> Drawn:
    parts = {}
    for name, config in zip("abc", draw.sample(MODELS, count), strict=False):
        own: Keys = {"slo.scale": rounded(draw, 1.5, 10), "workload.cv": rounded(draw, 0.5, 2)}
        if draw.random() < 0.5:
            own["workload.steps"] = _steps(draw, 20, 50)
        parts[name] = Part(config=config, share=rounded(draw, 0.3, 1), set=own)
    return parts, {"load": rounded(draw, 0.5, 1.4), "simulation.mixed_devices": True}


def heavy_encoder(draw: Random) -> Drawn:
    keys = {"load": rounded(draw, 0.5, 1.5), "workload.cv": rounded(draw, 0.5, 2), "slo.scale": rounded(draw, 1.5, 10)}
    return {"": Part(config="heavy_encoder")}, keys


def one_step(draw: Random) -> Drawn:
    steps = draw.choice([1, {"min": 1, "max": 2}, {"min": 1, "max": 4}])
    keys = {"load": rounded(draw, 0.5, 1.5), "workload.steps": steps, "slo.scale": rounded(draw, 1.2, 3)}
    return _one("sd15_256_rtx4090", **keys)


def one_or_many_steps(draw: Random) -> Drawn:
    steps = {"choices": [draw.randint(1, 3), int(rounded(draw, 100, 300))]}
    parts, keys = _one(draw.choice(MODELS), load=rounded(draw, 0.3, 1), workload__cv=rounded(draw, 0.3, 1))
    return parts, {**keys, "workload.steps": steps, "slo.scale": rounded(draw, 1.05, 1.5)}


def several_workers(draw: Random) -> Drawn:
    where = draw.choice([{"pools.gpu.workers": draw.randint(2, 4)}, {"devices": draw.randint(2, 3)}])
    parts, keys = _one(draw.choice(MODELS), load=rounded(draw, 0.5, 1.5), workload__cv=rounded(draw, 0.5, 2))
    return parts, {**keys, **where, "slo.scale": rounded(draw, 1.5, 4), "workload.steps": _steps(draw, 20, 80)}


def texts_beside_images(draw: Random) -> Drawn:
    paces = {"first_s": rounded(draw, 0.5, 5), "step_s": rounded(draw, 0.06, 0.4)}
    promise = draw.choice([paces, {"total_s": rounded(draw, 12, 40)}, {"first_s": rounded(draw, 1, 6)}])
    images = {"slo.scale": rounded(draw, 1.5, 10), "workload.steps": _steps(draw, 20, 50)}
    parts = {
        "images": Part(config=draw.choice(MODELS), share=rounded(draw, 0.2, 1), set=images),
        "texts": Part(config="opt_13b_a6000", share=rounded(draw, 0.2, 1), set={"slo": promise}),
    }
    return parts, {"load": rounded(draw, 0.4, 1.4), "workload.cv": 1, "simulation.mixed_devices": True}


def wrong_profile(draw: Random) -> Drawn:
    keys = {"simulation.latency_scale": rounded(draw, 0.5, 2), "slo.scale": rounded(draw, 1.5, 5)}
    parts, more = _one(draw.choice(MODELS), load=rounded(draw, 0.3, 1.2), workload__cv=rounded(draw, 0.5, 2))
    return parts, {**more, **keys, "workload.steps": _steps(draw, 20, 80)}


def far_weights(draw: Random) -> Drawn:
    """Weights from 0.001 to 1000 beside each other."""
    classes = [
        {"name": f"{weight:g}", "weight": weight, "scale": rounded(draw, 1.3, 6), "share": draw.randint(1, 4)}
        for weight in (0.001, 1, 1000)
    ]
    parts, keys = _one(draw.choice(MODELS), load=rounded(draw, 0.6, 2), workload__cv=rounded(draw, 0.5, 2))
    return parts, {**keys, "workload.steps": _steps(draw, 20, 80), "slo": {"classes": classes}}


def loose_model_beside_tight(draw: Random) -> Drawn:
    loose, tight = draw.sample(MODELS, 2)
    parts = {
        "loose": Part(config=loose, share=rounded(draw, 0.3, 1), set={"slo.scale": rounded(draw, 8, 60)}),
        "tight": Part(config=tight, share=rounded(draw, 0.3, 1), set={"slo.scale": rounded(draw, 1.3, 3)}),
    }
    for part in parts.values():
        part.set["workload.steps"] = _steps(draw, 20, 60)
    keys = {"load": rounded(draw, 0.6, 1.6), "workload.cv": rounded(draw, 0.5, 2), "simulation.mixed_devices": True}
    return parts, keys


def large_beside_small(draw: Random) -> Drawn:
    """DiT-XL/2 beside DiT-S/2."""
    parts = {
        "large": Part(config=MODELS[1], share=rounded(draw, 0.3, 1), set={"slo.scale": rounded(draw, 1.4, 6)}),
        "small": Part(config=DIT_S, share=rounded(draw, 0.3, 1), set={"slo.scale": rounded(draw, 1.4, 6)}),
    }
    return parts, {"load": rounded(draw, 0.5, 1.4), "workload.cv": rounded(draw, 0.5, 2)}


def batching_does_not_pay(draw: Random) -> Drawn:
    keys = {"load": rounded(draw, 0.5, 2), "workload.cv": rounded(draw, 0.5, 2), "slo.scale": rounded(draw, 1.5, 8)}
    return {"": Part(config="no_gain")}, {**keys, "workload.steps": _steps(draw, 5, 50)}


def far_past_capacity(draw: Random) -> Drawn:
    parts, keys = _one(draw.choice(MODELS), load=rounded(draw, 2, 6), workload__cv=rounded(draw, 0.5, 4))
    return parts, {**keys, "workload.steps": _steps(draw, 20, 80), "slo.scale": rounded(draw, 1.3, 6)}


def bursts(draw: Random) -> Drawn:
    parts, keys = _one(draw.choice(MODELS), load=rounded(draw, 0.3, 1), workload__cv=rounded(draw, 3, 8))
    return parts, {**keys, "workload.steps": _steps(draw, 20, 200), "slo.scale": rounded(draw, 1.3, 5)}


def promised_beside_none(draw: Random) -> Drawn:
    classes = [{"name": "tight", "scale": rounded(draw, 1.4, 4), "share": draw.randint(1, 3)}, {"name": "none"}]
    parts, keys = _one(draw.choice(MODELS), load=rounded(draw, 0.5, 1.6), workload__cv=rounded(draw, 0.5, 2))
    return parts, {**keys, "workload.steps": _steps(draw, 20, 80), "slo": {"classes": classes}}


def two_texts_beside_images(draw: Random) -> Drawn:
    """Three models, of which one is slower or quicker than profiled, or noisy."""
    device = draw.choice(["simulation.latency_scale", "simulation.latency_noise"])
    odd = rounded(draw, 0.7, 1.5) if device.endswith("scale") else rounded(draw, 0.05, 0.3)
    first, second = ({"first_s": rounded(draw, 1, 6), "step_s": rounded(draw, 0.08, 0.5)} for _ in range(2))
    images = {"slo.scale": rounded(draw, 1.5, 10), "workload.steps": _steps(draw, 20, 50)}
    parts = {
        "images": Part(config=draw.choice(MODELS), share=rounded(draw, 0.2, 1), set=images),
        "short": Part(config="opt_13b_a6000", share=rounded(draw, 0.2, 1), set={"slo": first}),
        "long": Part(config="opt_30b_a6000", share=rounded(draw, 0.2, 1), set={"slo": second}),
    }
    return parts, {"load": rounded(draw, 0.3, 1.1), "workload.cv": 1, "simulation.mixed_devices": True, device: odd}


KINDS = named(
    loose_beside_tight,
    few_steps,
    slow_phases,
    stalls,
    noise,
    long_loops_past_capacity,
    mixed_promises,
    two_models,
    three_models,
    heavy_encoder,
    one_step,
    one_or_many_steps,
    several_workers,
    texts_beside_images,
)
MORE = named(
    wrong_profile,
    far_weights,
    loose_model_beside_tight,
    large_beside_small,
    batching_does_not_pay,
    far_past_capacity,
    bursts,
    promised_beside_none,
    two_texts_beside_images,
)


def main() -> None:
    compare_drawn(__doc__, "drawn_images", (KINDS, MORE), requests=600)


if __name__ == "__main__":
    main()
