"""What a request may hold, field by field. A field that is unknown, or known and not supported, is refused by its name:
one that would change the answer is never ignored.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Fields of OpenAI's and vLLM's interfaces that change nothing with these values; with others they are not supported.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "early_stopping": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0, 1),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
# Fields that never change an answer, whatever they say.
_HARMLESS = frozenset({"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user"})


class Strict(BaseModel):
    """Types as they are written: no text for a number, no number for a yes."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StructuredOutputs(Strict):
    """vLLM's field for constraints; one of them at a time."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Body(BaseModel):
    """What chat and text completions share."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    default_new_tokens: ClassVar[int | None] = None  # as many as there is room for

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    response_format: ResponseFormat | None = None
    # Beyond OpenAI's: sampling as vLLM names it
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    # Ours
    draft: bool | None = Field(None, description="Whether to speculate for this request; the answer is the same.")
    speculation: bool | None = Field(None, description="Add to each chunk the tree that was drafted and what was kept.")

    @model_validator(mode="after")
    def _refuse_what_is_not_supported(self) -> Body:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _HARMLESS:
                continue
            if name not in _NEUTRAL:
                raise FieldError(name, "is not a field that this server knows")
            if not any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[name]):
                raise FieldError(name, "is not supported by this server; leave it out")
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "needs stream: true")
        if self.speculation and not self.stream:
            raise FieldError("speculation", "needs stream: true")
        if any(not text for text in self.stop_strings):
            raise FieldError("stop", "holds an empty string, which would end every text")
        if len(self.stop_strings) > 16 or any(len(text) > 1024 for text in self.stop_strings):
            raise FieldError("stop", "may hold at most 16 strings of at most 1024 characters")
        return self

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def new_tokens(self) -> tuple[str, int | None]:
        """The name of the field that limits the answer, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to tell with each token; None: no log-probabilities at all."""
        return None

    @property
    def is_usage_streamed(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(Body):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Passed on to the model's chat template.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise FieldError("max_tokens", "and max_completion_tokens say different things; give one of them")
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError("continue_final_message", "and add_generation_prompt exclude each other")
        return self

    @property
    def new_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TextBody(Body):
    """POST /v1/completions"""

    default_new_tokens: ClassVar[int | None] = 16  # as OpenAI's

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each of them, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [each for each in self.prompt if isinstance(each, int)]
        return [ids] if ids else [each for each in self.prompt if not isinstance(each, int)]

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class FieldError(ValueError):
    """A field's value cannot be used together with the others."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field
