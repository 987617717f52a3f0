"""When requests come, what they ask for and what they are promised; all from one seed, or from a trace."""

from neustream.workload.arrivals import constant_arrivals, gamma_arrivals, with_burst
from neustream.workload.formats import FORMATS
from neustream.workload.formats.normal import write_trace
from neustream.workload.row import Notes, Row
from neustream.workload.trace import Taken, Trace, Window, take

__all__ = [
    "FORMATS",
    "Notes",
    "Row",
    "Taken",
    "Trace",
    "Window",
    "constant_arrivals",
    "gamma_arrivals",
    "take",
    "with_burst",
    "write_trace",
]
