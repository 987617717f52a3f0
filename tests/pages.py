"""The READMEs as tests read them: their code, the commands that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/policy_notes.md",
    "configs/README.md",
    "profiles/README.md",
    "neustream/README.md",
    "neustream/analysis/bounds/README.md",
    "neustream/bench/README.md",
    "neustream/backends/diffusers/README.md",
    "neustream/backends/transformers/README.md",
    "neustream/backends/vllm/README.md",
    "neustream/cluster/README.md",
    "neustream/core/policies/README.md",
    "neustream/server/README.md",
]
OF_REPOSITORY = r"(?:configs|benchmarks|tests|neustream|profiles|\.ci)/[\w./-]*\w\.(?:yaml|py|sh|png|md|json)"
CHECKPOINT = "path/to/checkpoint"
EVERY_PAGE = pytest.mark.parametrize("page", PAGES)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks that are marked with exactly `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The lines that a reader would type: indented ones, and those in backticks; comments left out."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    return [re.sub(r"\s+#.*", "", line) for line in lines]
