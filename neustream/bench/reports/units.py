"""Units of a report's figures, and which of them each kind of figure may have."""

from __future__ import annotations

from typing import Literal, get_args

Units = Literal[
    "count",
    "pixels",
    "percent",
    "fraction",
    "ratio",
    "ms",
    "s",
    "bytes",
    "MB",
    "GB",
    "TB",
    "MiB",
    "GiB",
    "TiB",
    "Mbit/s",
    "Gbit/s",
    "Tbit/s",
    "GiB/s",
    "MB/s",
    "GB/s",
    "TB/s",
    "ms/token",
    "s/token",
    "tokens/s",
    "queries/s",
    "images/s",
    "videos/s",
    "audios/s",
    "Watts",
]
Kind = tuple[Units, ...]

ALL: Kind = get_args(Units)
QUANTITY: Kind = ("count", "pixels")
PORTION: Kind = ("percent", "fraction")
RATIO: Kind = ("ratio",)
TIME: Kind = ("ms", "s")
MEMORY: Kind = ("bytes", "MB", "GB", "TB", "MiB", "GiB", "TiB")
TOKEN_TIME: Kind = ("ms/token", "s/token")
TOKEN_RATE: Kind = ("tokens/s",)
REQUEST_RATE: Kind = ("queries/s",)
MEDIA_RATE: Kind = ("images/s", "videos/s", "audios/s")
POWER: Kind = ("Watts",)
SECONDS = {"ms": 1e-3, "s": 1.0, "ms/token": 1e-3, "s/token": 1.0}
"""What units of time are in seconds."""
