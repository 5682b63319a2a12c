"""The bodies of LMDeploy's own calls; what cannot be obeyed is refused like everywhere."""

from typing import Any, Literal

from pydantic import Field

from internjax.models.lm import SamplingParams
from internjax.serve.schema import (
    Body,
    MinP,
    Repetition,
    SamplingBody,
    StopIds,
    Temperature,
    Text,
    TokenIds,
    TopK,
    TopP,
)


class LmdeployBody(Body):
    """What both calls share: sampling, and fields whose other values are not served."""

    stream: bool = False
    stop: Text | list[Text] | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    repetition_penalty: Repetition | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: Literal[True] | None = True

    def _sampling(self, max_tokens: int, logprobs: int | None = None) -> SamplingParams:
        names = ("stop", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
                 "ignore_eos", "seed", "skip_special_tokens")  # fmt: skip
        given = {name: getattr(self, name) for name in names}
        given |= {name: getattr(self, name, None) for name in ("stop_token_ids", "min_new_tokens")}
        return SamplingBody(model="", **given).sampling(max_tokens, logprobs=logprobs, grammar=None)


class GenerateBody(LmdeployBody):
    """`/generate`: a raw prompt or ids."""

    session_id: Literal[-1] | None = -1
    prompt: Text | None = None
    input_ids: TokenIds | None = None
    image_data: None = None
    return_logprob: bool | None = None
    max_tokens: int = Field(default=128, ge=1)
    stop_token_ids: StopIds | None = None
    include_stop_str_in_output: Literal[False] | None = False

    def sampling(self) -> SamplingParams:
        """Returns what the engine is asked."""
        return self._sampling(self.max_tokens, 0 if self.return_logprob else None)


class InteractiveBody(LmdeployBody):
    """`/v1/chat/interactive`: the next turn of a session."""

    prompt: Text | list[dict[str, Any]]
    image_url: None = None
    session_id: int = Field(default=-1, ge=-1)
    interactive_mode: bool = False
    request_output_len: int | None = Field(default=None, ge=0)
    cancel: bool | None = False
    adapter_name: str | None = None
    min_new_tokens: int | None = Field(default=None, ge=0)
    temperature: Temperature = 0.8
    top_p: TopP = 0.8
    top_k: TopK = 40

    def messages(self) -> list[dict[str, Any]]:
        """Returns the turn as messages."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return self.prompt

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Returns what the engine is asked."""
        return self._sampling(max_tokens)
