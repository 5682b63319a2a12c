"""What a request must be to be run at all, whatever the load; the refusals say what is legal."""

from collections.abc import Iterable, Sequence

from internjax.errors import UserError
from internjax.models.lm import SamplingParams
from internjax.serve.sampling import TOP_LOGPROBS


def check_prompt(prompt: Sequence[int], context: int, vocab_size: int) -> None:
    """Raises `UserError` for a prompt that is empty, too long or not of this vocabulary."""
    if not prompt:
        raise UserError("the prompt is empty: give at least one token.")
    if len(prompt) > context:
        raise UserError(f"the prompt has {len(prompt)} tokens but the context holds {context}.")
    _check_ids("prompt", prompt, vocab_size)


def check_request(
    prompt: Sequence[int], params: SamplingParams, context: int, vocab_size: int
) -> None:
    """Raises `UserError` for a prompt and parameters that cannot be run together."""
    check_prompt(prompt, context, vocab_size)
    if len(prompt) + params.max_tokens > context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and max_tokens={params.max_tokens}, together "
            f"{len(prompt) + params.max_tokens}, but the context holds {context}: shorten "
            "the prompt or ask for fewer tokens."
        )
    _check_ids("logit_bias", params.logit_bias or (), vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    if params.logprobs is not None and not 0 <= params.logprobs <= TOP_LOGPROBS:
        raise UserError(f"logprobs={params.logprobs}: it must lie in 0..{TOP_LOGPROBS}.")


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise UserError(f"{name}: token id {wrong} is outside 0..{vocab_size - 1}.")
