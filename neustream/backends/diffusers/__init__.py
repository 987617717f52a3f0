"""Stock diffusers pipelines, served step by step.

`PipelineEngine(pipe)` (`neustream.serve(pipe)`) takes a pipeline that the user loaded, unchanged. Each
request runs the pipeline's own `__call__`, stopped at its model calls; requests at different
timesteps, with different step counts, seeds, guidance and schedulers, share those calls.
"""

from neustream.backends.answer import Answer
from neustream.backends.diffusers.palette import PalettePipeline
from neustream.backends.diffusers.run import Progress
from neustream.backends.diffusers.service import PipelineEngine, profile

__all__ = ["Answer", "PalettePipeline", "PipelineEngine", "Progress", "profile"]
