"""llm-d's Benchmark Report 0.2.1: what it says of a run, of what was measured, and how.

Sections know no other keys than these, but where `Open` says so. The sections about the stack and
the load are in `scenario.py`, those about servers in `observability.py`.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Final, Literal

from neustream.bench.reports import units
from neustream.bench.reports.units import Units
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

VERSION: Final = "0.2.1"
Whole = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of a report: an unknown key in it is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Open(Section):
    """A part that may have keys of anybody's own."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Spread(Section):
    """Percentiles by the names that reports have for them, and further figures."""

    mode: float | None = None
    stddev: float | None = Field(default=None, ge=0)
    min: float | None = None
    p0p1: float | None = None
    p1: float | None = None
    p5: float | None = None
    p10: float | None = None
    p25: float | None = None
    p50: float | None = None
    p75: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p99p9: float | None = None
    max: float | None = None


class Statistics(Spread):
    """Of a figure over requests. Other percentiles are no error, but readers drop them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    units: Units
    mean: float


def _in(*allowed: Units) -> AfterValidator:
    """Units that a figure, or a series of it, may have."""

    def check(found: Any) -> Any:
        if found is not None and found.units not in allowed:
            raise ValueError(f"units {found.units!r}; allowed: {', '.join(allowed)}")
        return found

    return AfterValidator(check)


QUANTITY = _in(*units.QUANTITY)
TIME = _in(*units.TIME)
TOKEN_TIME = _in(*units.TOKEN_TIME)
TOKEN_RATE = _in(*units.TOKEN_RATE)
REQUEST_RATE = _in(*units.REQUEST_RATE)
MEMORY = _in(*units.MEMORY)
PORTION = _in(*units.PORTION)
POWER = _in(*units.POWER)

Counted = Annotated[Statistics | None, QUANTITY]
Timed = Annotated[Statistics | None, TIME]
TokenTimed = Annotated[Statistics | None, TOKEN_TIME]
TokenRate = Annotated[Statistics | None, TOKEN_RATE]
RequestRate = Annotated[Statistics | None, REQUEST_RATE]
MediaRate = Annotated[Statistics | None, _in(*units.MEDIA_RATE)]
Memory = Annotated[Statistics | None, MEMORY]
Portion = Annotated[Statistics | None, PORTION]
Ratio = Annotated[Statistics | None, _in(*units.RATIO)]
Power = Annotated[Statistics | None, POWER]


class Point(Spread):
    """Of a figure at an instant."""

    ts: datetime.datetime
    value: str | float | int | bool | None = None
    mean: float | None = None


class Series(Section):
    units: Units
    series: list[Point]


# -- requests --------------------------------------------------------------------------------------


class Media(Section):
    """Of pictures or sounds that clients sent."""

    count: Counted = None
    filesize: Memory = None


class Pictures(Media):
    pixels: Counted = None
    aspect_ratio: Ratio = None


class Films(Pictures):
    frames: Counted = None


class Sounds(Media):
    duration: Timed = None


class Multimodal(Section):
    image: Pictures | None = None
    video: Films | None = None
    audio: Sounds | None = None


class Requests(Section):
    total: Whole
    failures: Whole | None = None
    incomplete: Whole | None = None
    input_length: Counted = None
    output_length: Counted = None
    request_size: Memory = None
    multimodal: Multimodal | None = None


class Latency(Section):
    """TTFT, NTPOT (all of it by output token), TPOT (without the first), ITL, and all of it."""

    time_to_first_token: Timed = None
    normalized_time_per_output_token: TokenTimed = None
    time_per_output_token: TokenTimed = None
    inter_token_latency: TokenTimed = None
    request_latency: Timed = None


class Throughput(Section):
    input_token_rate: TokenRate = None
    output_token_rate: TokenRate = None
    total_token_rate: TokenRate = None
    request_rate: RequestRate = None
    image_rate: MediaRate = None
    video_rate: MediaRate = None
    audio_rate: MediaRate = None


class Aggregate(Section):
    requests: Requests | None = None
    latency: Latency | None = None
    throughput: Throughput | None = None


TimeSeries = Annotated[Series | None, TIME]
TokenTimeSeries = Annotated[Series | None, TOKEN_TIME]
TokenRateSeries = Annotated[Series | None, TOKEN_RATE]
RequestRateSeries = Annotated[Series | None, REQUEST_RATE]


class LatencySeries(Section):
    time_to_first_token: TimeSeries = None
    normalized_time_per_output_token: TokenTimeSeries = None
    time_per_output_token: TokenTimeSeries = None
    inter_token_latency: TokenTimeSeries = None
    request_latency: TimeSeries = None


class ThroughputSeries(Section):
    units: Units = "tokens/s"
    input_token_rate: TokenRateSeries = None
    output_token_rate: TokenRateSeries = None
    total_token_rate: TokenRateSeries = None
    request_rate: RequestRateSeries = None


class AllSeries(Section):
    latency: LatencySeries | None = None
    throughput: ThroughputSeries | None = None


class RequestPerformance(Section):
    aggregate: Aggregate | None = None
    time_series: AllSeries | None = None


class Sessions(Section):
    total: Whole
    succeeded: Whole | None = None
    failed: Whole | None = None
    total_events: Whole | None = None
    total_events_completed: Whole | None = None
    total_events_cancelled: Whole | None = None
    session_rate: RequestRate = None
    session_duration: Timed = None
    events_per_session: Counted = None
    events_cancelled_per_session: Counted = None
    input_tokens_per_session: Counted = None
    output_tokens_per_session: Counted = None


class SessionPerformance(Section):
    sessions: Sessions | None = None


class RunTime(Section):
    """When it was; the duration as ISO 8601 has it: PT12.5S."""

    start: datetime.datetime | None = None
    end: datetime.datetime | None = None
    duration: str | None = None


class RunSection(Section):
    """Names: `uid` of this report, `eid` of all reports of an experiment."""

    uid: str
    eid: str | None = None
    cid: str | None = None
    pid: str | None = None
    time: RunTime | None = None
    user: str | None = None
    description: str | None = None
    keywords: list[str] | None = None


Version = Literal["0.2.1"]
