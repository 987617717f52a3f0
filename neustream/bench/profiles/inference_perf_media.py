"""Pictures, films and sounds in inference-perf's profiles: known by every key, and refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from neustream.bench.profiles.inference_perf_lengths import Distribution
from neustream.bench.profiles.marks import Count, Positive, Section

Preset = Literal["4k", "1080p", "720p", "360p"]
Share = Annotated[float, Field(ge=0, le=1)]


class Resolution(Section):
    height: Count
    width: Count


class WeightedResolution(Section):
    resolution: Preset | Resolution
    weight: Positive = 1.0


class Film(Section):
    resolution: Preset | Resolution
    frames: Count


class WeightedFilm(Section):
    profile: Film
    weight: Positive = 1.0


class WeightedDuration(Section):
    duration: Positive
    weight: Positive = 1.0


class Media(Section):
    count: Distribution | None = None
    insertion_point: Share | Distribution | None = None


class Images(Media):
    resolutions: Preset | Resolution | list[WeightedResolution] | None = None
    representation: Literal["png", "jpeg"] = "png"


class Films(Media):
    profiles: Film | list[WeightedFilm] | None = None
    representation: Literal["mp4", "png_frames", "jpeg_frames"] = "mp4"


class Sounds(Media):
    durations: Positive | list[WeightedDuration] | None = None


class Multimodal(Section):
    """What is put beside a text."""

    image: Images | None = None
    video: Films | None = None
    audio: Sounds | None = None
