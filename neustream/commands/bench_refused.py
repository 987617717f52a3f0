"""Flags of `vllm bench serve` that `neustream bench` does not take, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neustream.commands.sharing import Flags
from neustream.errors import ConfigError

HUB = "of a data set of a hub or of vLLM's own, of which none is loaded; --dataset-name custom reads a file"
MEDIA = "prompts are texts alone"
TRACE = "--dataset-name trace knows formats by their columns (--trace-format)"
DRAWN = "figures are drawn by `neustream bench compare FOLDER --out FOLDER`"
REFUSED: Mapping[str, str] = {
    "asr-": MEDIA,
    "bfcl-": HUB,
    "blazedit-": HUB,
    "chat-template-kwargs": "texts are put in no template here; a server takes them in --extra-body",
    "custom-ensure-client-side-data": MEDIA,
    "enable-multimodal-chat": MEDIA,
    "hf-": HUB,
    "no-reranker": "texts and images are asked for, no rankings",
    "no-stream": "it is of data sets of a hub, of which none is loaded; --whole asks for answers in one piece",
    "plot-dataset-stats": DRAWN,
    "plot-timeline": DRAWN,
    "probe-request-rate": "no probes are sent beside the load; --slo-class tells classes apart",
    "profile": "the server's profiler is its own: POST /start_profile",
    "random-batch-size": "each request has one prompt",
    "random-mm-": MEDIA,
    "spec-bench-": HUB,
    "speed-bench-": HUB,
    "timed-trace-": TRACE,
    "timeline-itl-thresholds": DRAWN,
    "use-beam-search": "vLLM's own client does nothing with it either; --extra-body asks a server for beams",
}
"""Name, or how names begin that end with a dash -> the reason."""
DATASETS: Mapping[str, str] = {
    **dict.fromkeys(("hf", "spec_bench", "speed_bench"), HUB),
    **dict.fromkeys(("random-mm", "custom_audio", "custom_image", "custom_mm"), MEDIA),
    "random-rerank": "texts and images are asked for, no rankings",
    "sonnet": "its poems come with vLLM; --dataset-name custom reads a file of prompts",
}
"""Data sets of vLLM's client that are not read -> the reason."""


class VllmFlags(Flags):
    """Those of vLLM's client that are not taken are refused by name, with the reason."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        taken = {name for each in self.params for name in [*each.opts, *each.secondary_opts]}
        refuse(args, taken)
        return super().parse_args(ctx, args)


def refuse(args: Sequence[str], taken: set[str]) -> None:
    """ConfigError for the first flag that is not taken, and known."""
    for each in args:
        flag = each.partition("=")[0].replace("_", "-")
        if not flag.startswith("--") or flag in taken:
            continue
        name = flag[2:].partition(".")[0].removesuffix("+")
        known = (
            name if name in REFUSED else next((key for key in REFUSED if key[-1] == "-" and name.startswith(key)), None)
        )
        if known is not None:
            raise ConfigError(f"{flag}: not taken: {REFUSED[known]}")
