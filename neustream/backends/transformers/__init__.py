"""Stock causal language models of transformers, served token by token.

`TextEngine(model, tokenizer)` (`neustream.serve(model, tokenizer)`) takes an `AutoModelForCausalLM` that the
user loaded, unchanged. Requests of different lengths share its forward calls, each with keys and
values in a slot of its own; its tokens are those of the stock `generate` alone.
"""

from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.service import TextEngine, serve
from neustream.backends.transformers.stream import Answer, Completion, Token

__all__ = ["Answer", "Completion", "LanguageModel", "Sampling", "TextEngine", "Token", "serve"]
