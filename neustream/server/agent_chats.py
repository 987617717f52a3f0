"""Chats with agents: a run that ends in a language model's call, whose text is the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from neustream.core.events import Emitted
from neustream.errors import GraphError
from neustream.server.bodies import ChatBody
from neustream.server.context import Context
from neustream.server.errors import HTTPError, of_validation
from neustream.server.idle_fields import NOTHING, among
from neustream.server.likelihoods import Names
from neustream.server.models import AgentModel
from neustream.server.promises import Promised
from neustream.server.replies import Choice, Reply
from neustream.server.stops import Stops
from neustream.service.answer import Answer
from neustream.service.mount import Reader

OURS = frozenset({"model", "messages", "user", "slo", "slo_ms", "vllm_xargs", "stream", "stream_options"})
"""Fields that are read here; all others are the agent's."""


IDLE_HERE = {"n": (None, 1)}
"""Values that ask for nothing, beside those that do so in any field."""


class LastCall:
    """The answer of a run as that of its last call: its tokens alone, and how the whole run went.

    Args:
        answer: of the run.
        calls: names of the calls that a run ends in; one of them is made.
        began: told how many tokens the prompt of that has, once it has an output.
    """

    def __init__(self, answer: Answer[Any], calls: frozenset[str], began: Callable[[int], None]) -> None:
        self.id = answer.id
        self._answer = answer
        self._calls = calls
        self._began = began

    def _makes(self, output: Emitted) -> bool:
        return output.leg in self._calls and not output.branch

    @property
    def outputs(self) -> Sequence[Emitted]:
        """Those of the call, as far as they came."""
        return tuple([output for output in self._answer.outputs if self._makes(output)])

    def reader(self) -> Reader:
        """Reads all outputs of the run: a token of the call, None for any other."""
        told: Any = self._answer.reader()

        def read(output: Emitted) -> Any:
            if not self._makes(output):
                return None
            token = told(output)["output"]
            self._began(told.made.params["prompt_tokens"])
            return token

        return read

    # -- as of the run ----------------------------------------------------------------------------

    @property
    def ended(self) -> Any:
        return self._answer.ended

    @property
    def count(self) -> int:
        return self._answer.count

    def since(self, index: int) -> Sequence[Emitted]:
        return self._answer.since(index)

    def done(self) -> bool:
        return self._answer.done()

    def result(self) -> Any:
        try:
            return self._answer.result()
        except GraphError as error:  # what the graph has against the messages
            raise HTTPError(400, str(error), "invalid", "messages") from error

    def cancel(self) -> bool:
        return self._answer.cancel()

    def cancelled(self) -> bool:
        return self._answer.cancelled()

    def tell(self, listener: Callable[[], None]) -> None:
        self._answer.tell(listener)

    def tell_no_more(self, listener: Callable[[], None]) -> None:
        self._answer.tell_no_more(listener)


def params_of(body: ChatBody, model: AgentModel) -> dict[str, Any]:
    """The parameters of a run, of a chat: its `messages`, and what else the agent takes.

    Raises:
        HTTPError: for images, and fields that the agent does not know or allow.
    """
    if body.images:
        raise HTTPError(400, f"agent {model.name!r} takes no images in messages", "unsupported", "messages")
    fields = body.model_dump(include=set(type(body).model_fields) - OURS, exclude_defaults=True)
    given = {name: value for name, value in fields.items() if not among(value, IDLE_HERE.get(name, NOTHING))}
    known = set() if model.params is None else set(model.params.model_fields)
    for name in given:
        if name not in known:
            raise HTTPError(400, f"{name}: agent {model.name!r} does not take it", "unsupported", name)
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    params = {"messages": messages, **given}
    if model.params is None:
        return params
    try:
        return model.params.model_validate(params).model_dump()
    except ValidationError as error:
        raise of_validation(error) from None


def reply_of(context: Context, model: AgentModel, promise: Promised) -> Reply:
    """A reply without its choice, which `begin` adds."""
    return Reply(f"chatcmpl-{context.id}", model.name, True, 0, promise, Names(None))


def begin(context: Context, model: AgentModel, params: dict[str, Any], reply: Reply) -> None:
    """Hand the run to the engine."""
    answer = context.gateway.submit(model, params, slo=reply.promise.slo, id=context.id)
    last: Any = LastCall(answer, model.ends_in, reply.prompt_of)
    reply.choices.append(Choice(0, last, Stops([]), _nothing))


def _nothing() -> None:
    """A run that is whole has ended by itself."""
