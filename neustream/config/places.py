"""Which models are on which devices, as a `placement` says it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from neustream.errors import nearest

Placement = Mapping[str, Sequence[str]]
"""The devices of models by name; a model that is not named is on all of them."""


def placed(models: Collection[str], devices: Sequence[str], placement: Placement) -> dict[str, list[str]]:
    """The models on each device."""
    return {device: [name for name in models if device in placement.get(name, devices)] for device in devices}


def check_places(models: Collection[str], devices: Sequence[str], placement: Placement) -> None:
    """ValueError, which names the key, if a placement is not of these models and devices, or leaves one out."""
    if twice := [device for device in devices if devices.count(device) > 1]:
        raise ValueError(f"devices: {twice[0]!r} is named twice; a device has all its models")
    for name, places in placement.items():
        if name not in models:
            raise ValueError(f"placement: no model {name!r}; {nearest(name, models)}")
        if not places:
            raise ValueError(f"placement.{name}: on no device; allowed: {', '.join(devices)}")
        if unknown := [place for place in places if place not in devices]:
            raise ValueError(f"placement.{name}: no device {unknown[0]!r}; {nearest(unknown[0], devices)}")
    if idle := [device for device, some in placed(models, devices, placement).items() if not some]:
        raise ValueError(f"devices: no model is on {idle[0]!r}")
