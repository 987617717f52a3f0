"""What the tests of load have in common."""

from __future__ import annotations

import pytest


@pytest.fixture
def unhurried(monkeypatch):
    """A client that is late, as on a busy machine, is not told of: that is tested by itself."""
    monkeypatch.setattr("neustream.bench.summary.LATE_S", 1e9)
    monkeypatch.setattr("neustream.bench.summary.TOO_LATE_S", 1e9)
    monkeypatch.setattr("neustream.bench.summary.LATE_SHARE", 1e9)
