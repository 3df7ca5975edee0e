"""What a client asks for, and what it is told where it cannot have that: OpenAI's API, read.

A field that is not served is refused by name, unless it asks for what is done anyway; so nobody
takes a text for what it is not.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dmc_jax.errors import UserError
from dmc_jax.inference.requests import Prompt
from dmc_jax.inference.sampling import SamplingParams

_MOST_STOPS, _LONGEST_STOP = 16, 256  # strings, and characters of one: each token is searched
_MOST_OF_COMPLETION = 5  # log-probabilities beside each token's, as OpenAI has it
_COMPLETION_TOKENS = 16  # that follow where a completion does not say, likewise

# Fields of SamplingParams that have the same meaning under the same name, OpenAI's or not.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop_token_ids")
_SAMPLING += ("ignore_eos", "ratio", "threshold")
_OURS = {*_SAMPLING, "model", "n", "stop", "seed", "stream", "stream_options", "logprobs"}
_OURS |= {"max_tokens"}
_OF_CHAT = {"messages", "max_completion_tokens", "top_logprobs"}
# What may be said since it is done anyway.
_NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "best_of": 1,
    "echo": False,
    "store": False,
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "service_tier": "auto",
}
_ABOUT_THE_CLIENT = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
# Beyond these float32 has no room, or no model a use.
_RANGES = {
    "temperature": (0.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "threshold": (-1e4, 1e4),
    "ratio": (1.0, 1e4),
}
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
_TYPES |= {408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        """Keep what to say.

        Args:
            status: of HTTP.
            message: what was wrong, what was expected and what to do.
            param: the field that it is about.
            code: for programs, as OpenAI calls it.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the object that OpenAI's clients read."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else _TYPES[400])
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": about}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    length: int  # tokens of a prompt and what follows
    prompt_tokens: int
    new_tokens: int
    choices: int  # texts
    body: int  # bytes


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, checked as far as it can be without its tokens."""

    chat: bool
    prompts: list[Prompt]  # none of a chat
    messages: list[dict[str, Any]]  # none of a completion
    choices: int  # of each prompt
    params: SamplingParams
    new_tokens: int | None  # None: as many as there is room for, `usual` at most
    usual: int
    stream: bool
    include_usage: bool

    def params_for(self, prompt: Sequence[int], limits: Limits) -> list[SamplingParams]:
        """Say how each choice of a prompt goes on: they differ by their seeds.

        Args:
            prompt: its ids.
            limits: of the request.

        Raises:
            ApiError: there is no room for it.
        """
        if len(prompt) > limits.prompt_tokens or len(prompt) >= limits.length:
            most = min(limits.prompt_tokens, limits.length - 1)
            message = f"a prompt has {len(prompt)} tokens, here it may have {most}: shorten it"
            raise ApiError(400, message, param=self.source, code="context_length_exceeded")
        room, new = limits.length - len(prompt), self.new_tokens
        if new is None:
            new = min(self.usual, limits.new_tokens, room)
        if new > room:
            message = f"a prompt of {len(prompt)} tokens and {new} new ones exceed the "
            message += f"{limits.length} that there is room for: shorten it or lower max_tokens"
            raise ApiError(400, message, param=self.source, code="context_length_exceeded")
        return [
            dataclasses.replace(
                self.params, max_new_tokens=new, seed=(self.params.seed + choice) % 2**32
            )
            for choice in range(self.choices)
        ]

    @property
    def source(self) -> str:
        """The field that prompts come from."""
        return "messages" if self.chat else "prompt"


def read_request(body: bytes, *, chat: bool, model: str, limits: Limits) -> Asked:
    """Read the body of a request.

    Args:
        body: JSON.
        chat: whether it is one for /v1/chat/completions.
        model: the name of the only one that there is.
        limits: that it must keep to.

    Raises:
        ApiError: it cannot be answered.
    """
    fields = _fields(body, chat)
    named = _field(fields, "model", str, "the name of a model")
    if named != model:
        message = f"there is no model {named[:80]!r} here, only {model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    prompts = [] if chat else _prompts(_field(fields, "prompt", (str, list), "a text, or ids"))
    choices = _whole(fields, "n", 1, 1, limits.choices)
    if choices * max(len(prompts), 1) > limits.choices:
        _refuse("prompt", f"{len(prompts)} prompts with n={choices} are more than {limits.choices}")
    new_name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    new = _whole(fields, new_name, None, 1, limits.new_tokens)
    stream = _field(fields, "stream", bool, "true or false", False)
    options = _field(fields, "stream_options", dict, "an object", {})
    if options and not stream:
        _refuse("stream_options", "only for streams: set stream to true")
    include_usage = _field(options, "include_usage", bool, "true or false", False)
    return Asked(
        chat=chat,
        prompts=prompts,
        messages=_messages(_field(fields, "messages", list, "a list")) if chat else [],
        choices=choices,
        params=_params(fields, chat),
        new_tokens=new,
        usual=limits.new_tokens if chat else _COMPLETION_TOKENS,
        stream=stream,
        include_usage=include_usage,
    )


def _refuse(name: str, message: str) -> NoReturn:
    raise ApiError(400, f"{name}: {message}", param=name, code="invalid_value")


def _fields(body: bytes, chat: bool) -> dict[str, Any]:
    def no_number(name):
        raise ValueError(f"{name} is no number of JSON")

    try:
        fields = json.loads(body, parse_constant=no_number)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        reason = getattr(error, "msg", None) or type(error).__name__  # none of the text
        raise ApiError(400, f"the body is not JSON in UTF-8: {reason}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is no JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    known = _OURS | (_OF_CHAT if chat else {"prompt"})
    for name, value in fields.items():
        if name in known or name in _ABOUT_THE_CLIENT:
            continue
        if name not in _NEUTRAL:
            message = f"unknown field {name[:80]!r}; there are {', '.join(sorted(known))}"
            raise ApiError(400, message, param=name[:80], code="unknown_parameter")
        if value != _NEUTRAL[name]:
            expected = json.dumps(_NEUTRAL[name])
            raise ApiError(
                400, f"{name}: only {expected} here", param=name, code="unsupported_value"
            )
    return fields


_NO_DEFAULT = object()


def _field(
    fields: Mapping[str, Any], name: str, kinds: Any, expected: str, default: Any = _NO_DEFAULT
) -> Any:
    value = fields.get(name, default)
    if value is _NO_DEFAULT:
        message = f"{name} is missing: expected {expected}"
        raise ApiError(400, message, param=name, code="missing_required_parameter")
    if not isinstance(value, kinds):
        _refuse(name, f"expected {expected}")
    return value


def _whole(
    fields: Mapping[str, Any], name: str, default: int | None, least: int, most: int
) -> int | None:
    value = fields.get(name, default)
    if value is default:
        return value
    if type(value) is not int or not least <= value <= most:
        _refuse(name, f"expected a whole number from {least} to {most}")
    return value


def _prompts(value: str | list[Any]) -> list[Prompt]:
    """A text, its ids, or lists of those."""
    if isinstance(value, str):
        return [value]
    if value and all(type(token) is int for token in value):
        return [value]
    of_ids = all(isinstance(x, list) and x and all(type(t) is int for t in x) for x in value)
    if value and (of_ids or all(isinstance(text, str) for text in value)):
        return value
    _refuse("prompt", "expected a text, token ids, or a list of either, none of them empty")


def _messages(value: list[Any]) -> list[dict[str, Any]]:
    """Messages whose contents are texts; parts of a text are joined."""
    messages = []
    for number, message in enumerate(value):
        name = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            _refuse(name, "expected an object with role and content")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if not isinstance(content, str):
            _refuse(name, "expected a text as content, or a list of parts of type text")
        messages.append({**message, "content": content})
    if not messages:
        _refuse("messages", "expected one or more")
    return messages


def _params(fields: Mapping[str, Any], chat: bool) -> SamplingParams:
    values = {name: fields[name] for name in _SAMPLING if name in fields}
    for name, (least, most) in _RANGES.items():
        value = values.get(name, least)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            _refuse(name, f"expected a number from {least:g} to {most:g}")
    stop = fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    short = isinstance(stop, list) and all(
        isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in stop
    )
    if not short or len(stop) > _MOST_STOPS:
        _refuse("stop", f"expected {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters at most")
    seed = fields.get("seed", secrets.randbits(32))
    if type(seed) is not int:
        _refuse("seed", "expected a whole number")
    values |= {"stop": tuple(stop), "seed": seed % 2**32, "logprobs": _logprobs(fields, chat)}
    try:
        return SamplingParams(**{"temperature": 1.0} | values)
    except UserError as error:
        name, _, message = str(error).partition(": ")
        _refuse(name, message)


def _logprobs(fields: Mapping[str, Any], chat: bool) -> int | None:
    """How many likely tokens are reported beside each; None: not even that one's."""
    if not chat:
        return _whole(fields, "logprobs", None, 0, _MOST_OF_COMPLETION)
    wanted = _field(fields, "logprobs", bool, "true or false", False)
    beside = _whole(fields, "top_logprobs", 0, 0, 20)
    if beside and not wanted:
        _refuse("top_logprobs", "only with logprobs")
    return beside if wanted else None
