"""What callers say to services of all kinds, checked in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real

from neustream.core.types import SLO
from neustream.errors import BackendError, RequestError, nearest, shown


def slo_of(slo: SLO | float | None) -> SLO:
    """A promise; a number is `SLO(total=...)`, None promises nothing. RequestError for others."""
    if isinstance(slo, SLO):
        return slo
    if slo is None:
        return SLO()
    if isinstance(slo, bool) or not isinstance(slo, Real):
        raise RequestError(f"slo must be an SLO or seconds, got {shown(slo)}")
    return SLO(total=float(slo))


def places_of(
    homes: Mapping[str, str],
    devices: Sequence[str] | None,
    placement: Mapping[str, Sequence[str]] | None,
) -> tuple[list[str], dict[str, list[int]]]:
    """The devices of a service, and which of them each model goes to, by their numbers.

    Args:
        homes: where each model is.
        devices: of the service; a place that is named twice is two. None: those in `homes`.
        placement: the devices of some models; the others go to all of them. Without `devices`, each
            stays where it is.

    Raises:
        BackendError: a model or a device that is not there.
    """
    if devices is None:
        wanted = {**{name: [home] for name, home in homes.items()}, **_checked(placement, homes)}
        known = list(dict.fromkeys(place for some in wanted.values() for place in some))
    else:
        known = _names(devices, "devices")
        wanted = {**dict.fromkeys(homes, known), **_checked(placement, homes)}
    found: dict[str, list[int]] = {}
    for name, some in wanted.items():
        for place in some:
            if place not in known:
                raise BackendError(f"placement: {name!r} on {place!r}: {nearest(place, known)}")
        found[name] = [number for number, place in enumerate(known) if place in some]
    return known, found


def _checked(placement: Mapping[str, Sequence[str]] | None, homes: Mapping[str, str]) -> dict[str, list[str]]:
    found = {}
    for name, some in (placement or {}).items():
        if name not in homes:
            raise BackendError(f"placement: no model {name!r}; {nearest(str(name), homes)}")
        found[name] = _names(some, f"placement of {name!r}")
    return found


def _names(devices: Sequence[str], what: str) -> list[str]:
    """A list of device names; BackendError for what is none."""
    if isinstance(devices, str) or not isinstance(devices, Sequence) or not devices:
        raise BackendError(f"{what} must be a list of device names, as ['cpu', 'cpu'], got {shown(devices)}")
    for name in devices:
        if not isinstance(name, str):
            raise BackendError(f"{what}: a device is a name, as 'cpu', got {shown(name)}")
    return list(devices)


def names_of(places: Sequence[str]) -> list[str]:
    """A name for each device: its place, numbered where there are several; none for a single one."""
    if len(places) == 1:
        return [""]
    names = []
    for number, place in enumerate(places):
        nth = places[:number].count(place)
        names.append(f"{place}#{nth}" if places.count(place) > 1 else place)
    return names
