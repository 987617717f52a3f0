"""Traces of language models that are public.

Where the number of prompt or output tokens is 0 the call failed, or there was nothing to do: such
rows are skipped, and counted by reason.
"""

from __future__ import annotations

from neustream.workload.cells import MOST_STEPS, MOST_TOKENS, ids, instant, seconds, text, whole
from neustream.workload.formats.columns import Column, Format


def _tokens(prompt: str, output: str) -> list[Column]:
    return [
        Column(prompt, "prompt_tokens", whole(1, MOST_TOKENS, zero="no prompt tokens")),
        Column(output, "output_tokens", whole(1, MOST_TOKENS, zero="no output tokens: a failed call")),
    ]


_AZURE = [Column("TIMESTAMP", "arrival_s", instant), *_tokens("ContextTokens", "GeneratedTokens")]

AZURE_LLM = Format("azure_llm", "Azure LLM inference 2023 and 2024: dates, tokens", _AZURE)

AZURE_LMM = Format(
    "azure_lmm",
    "Azure LMM inference 2025: as azure_llm, with numbers of images",
    [*_AZURE, Column("NumImages", "images", whole(0, MOST_STEPS))],
)

BURSTGPT = Format(
    "burstgpt",
    "BurstGPT: seconds from day 0, tokens, sessions",
    [
        Column("Timestamp", "arrival_s", seconds()),
        *_tokens("Request tokens", "Response tokens"),
        Column("Session ID", "session", text, needed=False),
    ],
)
"""Its `Model` says who answered then, which is no model that a server here could be asked for."""

MOONCAKE = Format(
    "mooncake",
    "Mooncake: milliseconds, tokens, hash_ids of the prompt's blocks",
    [
        Column("timestamp", "arrival_s", seconds(unit=1e3)),
        *_tokens("input_length", "output_length"),
        Column("hash_ids", "hash_ids", ids, needed=False),
    ],
    tells=("timestamp", "input_length", "output_length", "hash_ids"),
)

GUIDELLM = Format(
    "guidellm",
    "guidellm's trace_synthetic: as mooncake without hash_ids, in seconds",
    [Column("timestamp", "arrival_s", seconds()), *_tokens("input_length", "output_length")],
)

VIDUR = Format(
    "vidur",
    "Vidur's processed traces: seconds, tokens",
    [Column("arrived_at", "arrival_s", seconds()), *_tokens("num_prefill_tokens", "num_decode_tokens")],
)
