"""Traces of image and video models that are public."""

from __future__ import annotations

from neustream.workload.cells import (
    MOST_PIXELS,
    MOST_STEPS,
    instant,
    promise,
    seconds,
    text,
    value,
    whole,
)
from neustream.workload.formats.columns import Column, Format

VLLM_OMNI = Format(
    "vllm_omni",
    "vLLM-Omni's Request(...) lines: seconds, sizes, steps, slo_ms",
    [
        Column("timestamp", "arrival_s", seconds(), needed=False),
        Column("num_inference_steps", "steps", whole(1, MOST_STEPS), needed=False),
        Column("width", "width", whole(1, MOST_PIXELS), needed=False),
        Column("height", "height", whole(1, MOST_PIXELS), needed=False),
        Column("num_frames", "frames", whole(1, MOST_STEPS), needed=False),
        Column("slo_ms", "slo_s", promise(unit=1e3), needed=False),
        Column("prompt", "params.prompt", text, needed=False),
        Column("seed", "params.seed", whole(0, 2**63 - 1), needed=False),
    ],
    tells=("timestamp", "num_inference_steps"),
)

DIFFUSIONDB = Format(
    "diffusiondb",
    "DiffusionDB: dates, steps, sizes, prompts; parquet or CSV",
    [
        Column("timestamp", "arrival_s", instant),
        Column("step", "steps", whole(1, MOST_STEPS, zero="no steps")),
        Column("width", "width", whole(1, MOST_PIXELS, zero="no width")),
        Column("height", "height", whole(1, MOST_PIXELS, zero="no height")),
        Column("prompt", "params.prompt", text, needed=False),
        Column("seed", "params.seed", whole(0, 2**63 - 1), needed=False),
        Column("cfg", "params.guidance_scale", value, needed=False),
    ],
)
