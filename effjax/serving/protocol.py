"""What the server takes: the fields of OpenAI's API that it honours, and no others.

A field that would be ignored is refused, so that nobody believes it had an effect. `top_k`, `min_p` and
`repetition_penalty` are beyond OpenAI's; vLLM has them by the same names.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from effjax.serving.sampling import Sampling

_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
# One text or several, each as a string or as token ids.
Texts = (
    str
    | _Ids
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[_Ids], Field(min_length=1)]
)
_Stop = Annotated[str, Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    """Whether a stream ends with the token counts."""

    include_usage: bool = False


class _Generation(_Body):
    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=0, lt=2**32)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # a name for the caller's own records

    def sampling(self) -> Sampling:
        """How the tokens are drawn."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    def stops(self) -> tuple[str, ...]:
        """Texts that end a completion; they are not part of it."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether the last event of a stream counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: Texts
    max_tokens: int | None = Field(16, ge=1)
    logprobs: Literal[0] | None = None  # of the tokens drawn; alternatives are not kept


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def text(self) -> str:
        """What was said."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False


class EmbeddingRequest(_Body):
    """POST /v1/embeddings."""

    input: Texts
    model: str | None = None
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
