"""What clients may send: request bodies as strict pydantic models, with limits on everything."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from neustream.server.idle_fields import IDLE, NOTHING, among, asking

MOST_CHOICES = 16
MOST_LOGPROBS = 20
LONGEST_STOP = 64
DAY_MS = 86_400_000.0


class Body(BaseModel):
    """Unknown fields are kept apart: real clients send some, and are told of them in a header."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    @property
    def unknown(self) -> list[str]:
        return sorted(self.model_extra or {})


Milliseconds = Annotated[float, Field(ge=0.001, le=DAY_MS)]
Text = Annotated[str, Field(max_length=4_000_000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9]\d{0,8})$")]
"""A token id as JSON has keys."""


class Promise(BaseModel):
    """`slo` in a body: relative budgets in milliseconds."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    e2e_ms: Milliseconds | None = None
    class_: str | None = Field(default=None, alias="class", max_length=64)
    weight: Annotated[float, Field(gt=0, le=1e6)] | None = None
    report: bool = False


Switch = Annotated[bool, BeforeValidator(lambda given: False if given is None else given)]
"""Off where it is null, as where it is left out: clients' types allow both."""


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: Switch = False
    continuous_usage_stats: Switch = False
    include_slo: Switch = False


class Asked(Body):
    """Fields of other servers for which nothing is done are known: they are refused if they ask for something."""

    @property
    def unknown(self) -> list[str]:
        return [name for name in super().unknown if name not in IDLE]


class AnyAsk(Asked):
    """What all kinds of requests have."""

    model: Annotated[str, Field(max_length=200)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    slo: Promise | None = None
    slo_ms: Milliseconds | None = None
    stream: Switch = False


class TextBody(AnyAsk):
    """What completions and chats have in common."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: Switch = False
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: Switch = False
    vllm_xargs: dict[str, Any] | None = None

    @field_validator("stop")
    @classmethod
    def _few_and_short(cls, stop: str | list[str] | None) -> list[str] | None:
        if stop is None:
            return None
        strings = [stop] if isinstance(stop, str) else stop
        if len(strings) > 4:
            raise ValueError("at most 4 stop strings")
        for string in strings:
            if not 1 <= len(string) <= LONGEST_STOP:
                raise ValueError(f"a stop string has 1 to {LONGEST_STOP} characters")
        return strings

    @property
    def stops(self) -> list[str]:
        return list(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def told(self) -> int | None:
        """Tokens whose log-probabilities are told beside each output's; None: not even that one's."""
        return None


def _kind_of_prompt(value: Any) -> str:
    """Which of the four forms a prompt has, by its first element."""
    if not isinstance(value, list) or not value:
        return "text"
    first = value[0]
    if isinstance(first, str):
        return "texts"
    return "many" if isinstance(first, list) else "ids"


Ids = Annotated[list[TokenId], Field(min_length=1)]
Prompt = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Field(max_length=MOST_CHOICES), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(max_length=MOST_CHOICES), Tag("many")],
    Discriminator(_kind_of_prompt),
]


class CompletionBody(TextBody):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: Switch = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def told(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        prompt: Any = self.prompt
        return [prompt] if _kind_of_prompt(prompt) in ("text", "ids") else list(prompt)


Picture = Annotated[str, Field(max_length=2**27)]
"""A `data:` URL."""


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ImageURL(Body):
    """Where an image is: in the `data:` URL itself. Nothing is fetched."""

    url: Picture
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Body):
    """An image in a message's content."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    """One message of a chat. What it says beside its content is not told to the template, and so refused."""

    role: Annotated[str, Field(min_length=1, max_length=32)]
    content: Text | Annotated[list[Part], Field(max_length=1024)] | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None

    @field_validator("tool_calls", "function_call", "audio")
    @classmethod
    def _none(cls, given: Any) -> Any:
        if not among(given, NOTHING):
            raise ValueError("not supported by this server")
        return None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """Its content as parts."""
        if self.content is None or isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)] if self.content else []
        return list(self.content)

    @property
    def text(self) -> str:
        """Its texts in one: templates would print a list as Python does."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


Messages = Annotated[list[Message], Field(min_length=1, max_length=1024)]
NOT_OF_TEMPLATES = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "load_audio_from_video"),
    *("max_length", "messages", "padding", "processor_kwargs", "return_assistant_tokens_mask", "return_dict"),
    *("return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
}
"""Arguments of transformers' `apply_chat_template` that no request may give: a template is a program."""


class ForTemplate(Asked):
    """What the chat template reads beside messages."""

    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _for_the_template(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is None:
            return None
        named = {name: given[name] for name in sorted(NOT_OF_TEMPLATES.intersection(given))}
        for name, value in named.items():
            if not among(value, IDLE.get(name, NOTHING)):
                raise ValueError(f"{name} is not for the template; only what it reads may be given")
        return {name: value for name, value in given.items() if name not in named}


class ChatBody(TextBody, ForTemplate):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def told(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def images(self) -> list[str]:
        """URLs of its images, in order."""
        parts = [part for message in self.messages for part in message.parts]
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class ImageBody(AnyAsk):
    """POST /v1/images/generations."""

    prompt: Text
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    negative_prompt: Text | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=200)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Seed | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height; None: the model's own."""
        if self.size in (None, "auto"):
            return None
        assert self.size is not None
        width, _, height = self.size.partition("x")
        return int(width), int(height)


class PictureURL(Body):
    """A picture as OpenAI's JSON has it; only `data:` URLs are taken."""

    image_url: Picture


class EditBody(ImageBody):
    """POST /v1/images/edits. In a form, pictures are files."""

    image: Picture | Annotated[list[Picture], Field(max_length=16)] | None = None
    images: Annotated[list[PictureURL], Field(max_length=16)] | None = None
    mask: Picture | PictureURL | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def pictures(self) -> list[str]:
        """Those to be edited, in whichever field."""
        some = [self.image] if isinstance(self.image, str) else self.image or []
        return [*some, *[each.image_url for each in self.images or []]]


class AgentBody(AnyAsk):
    """POST /v1/agents/{name}. `params`: of the run, as the agent's graph reads them."""

    params: dict[str, Any]


class TokenizeBody(ForTemplate):
    """POST /tokenize: of a text, or of a chat in its template."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: Annotated[str, Field(max_length=200)] | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages is needed")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens is for prompt: a chat template has its own")
        return self

    @property
    def special(self) -> bool:
        """Whether a prompt's tokens begin as the tokenizer has it."""
        return self.add_special_tokens is not False


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=200)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]


class InferenceBody(Body):
    """POST /inference, of effective-batching."""

    prompt: Text
    num_tokens: Annotated[int, Field(ge=1, lt=2**31)]


def unsupported(body: Asked) -> str | None:
    """The first field that asks for what cannot be done; None if there is none."""
    return asking(body.model_extra or {})
