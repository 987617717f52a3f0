"""What tests of a server share."""

from __future__ import annotations

import pytest


@pytest.fixture
def client(url):
    """A client of the server that the module's `url` is of."""
    httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
