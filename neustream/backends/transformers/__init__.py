"""Stock causal language models of transformers, served token by token.

`neustream.serve(model, tokenizer)` takes an `AutoModelForCausalLM` that the user loaded, unchanged; a
`TextMount` is that model ready to be scheduled. Requests of different lengths share its forward
calls, each with keys and values in a slot of its own; its tokens are those of the stock `generate`
alone.
"""

from neustream.backends.transformers.completion import Completion, Token
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.mount import TextMount
from neustream.backends.transformers.sampling import Sampling

__all__ = ["Completion", "LanguageModel", "Sampling", "TextMount", "Token"]
