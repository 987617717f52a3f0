"""Load on a server (or a service, or a simulator), and what came of each request.

A `Plan` is one load: requests with their scheduled arrivals, and how they are put to whoever
serves. Playing it gives a `Run`: the plan's name, a `Record` for each request, and how it was made.
"""

from neustream.bench.plan import Plan, Target
from neustream.bench.records import FAILURES, Record
from neustream.bench.runs import Run, read_runs, write_runs

__all__ = ["FAILURES", "Plan", "Record", "Run", "Target", "read_runs", "write_runs"]
