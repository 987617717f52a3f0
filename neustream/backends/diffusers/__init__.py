"""Stock diffusers pipelines, served step by step.

`neustream.serve(pipe)` takes a pipeline that the user loaded, unchanged; a `PipelineMount` is that
pipeline ready to be scheduled. Each request runs the pipeline's own `__call__`, stopped at its
model calls; requests at different timesteps, with different step counts, seeds, guidance and
schedulers, share those calls.
"""

from neustream.backends.diffusers.mount import PipelineMount
from neustream.backends.diffusers.palette import PalettePipeline
from neustream.backends.diffusers.partly import keep_only, load_part
from neustream.backends.diffusers.profiling import profile
from neustream.backends.diffusers.run import Progress

__all__ = ["PalettePipeline", "PipelineMount", "Progress", "keep_only", "load_part", "profile"]
