"""When requests come, what they ask for and what they are promised; all from one seed."""

from neustream.workload.arrivals import constant_arrivals, gamma_arrivals, with_burst
from neustream.workload.trace import Row, load_trace

__all__ = ["Row", "constant_arrivals", "gamma_arrivals", "load_trace", "with_burst"]
