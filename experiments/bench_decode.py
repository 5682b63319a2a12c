"""`internjax bench decode`: the engine by itself, without threads and HTTP; times in seconds."""

import time
from collections.abc import Iterator

import numpy as np

from internjax.errors import UserError
from internjax.experiments.bench_rows import Row, peak_memory, percentiles


def decode_rows(cfg) -> Iterator[Row]:
    """Yields a row for each batch and pair of lengths: all requests arrive together."""
    from internjax.models.load import load
    from internjax.serve.engine import Engine, EngineConfig

    model = load(cfg.model, dtype=cfg.dtype, packed=True)
    longest = max(prompt + new for prompt, new in cfg.lengths)
    if longest > model.cfg.max_context:
        raise UserError(
            f"lengths={cfg.lengths}: {longest} tokens are more than the {model.cfg.max_context} of"
            f" {cfg.model}."
        )
    context = min(-(-longest // 128) * 128, model.cfg.max_context)
    for batch in cfg.batch:
        # The whole batch is prefilled before it decodes: first tokens wait, but for no one's turn.
        prefill = batch * max(prompt for prompt, _ in cfg.lengths)
        engine = Engine(
            model,
            EngineConfig(batch, context, cfg.kv_dtype, max_waiting=batch, prefill_tokens=prefill),
        )
        for prompt, new in cfg.lengths:
            for _ in range(cfg.warmup):
                decode_round(engine, batch, prompt, new)
            rounds = [decode_round(engine, batch, prompt, new) for _ in range(cfg.rounds)]
            yield {"batch": batch, "prompt": prompt, "new": new} | decode_row(rounds)


def decode_round(engine, batch: int, prompt: int, new: int) -> np.ndarray:
    """Runs one batch to its end; returns when each token came, [batch, new] seconds."""
    from internjax.models.lm import SamplingParams

    params = SamplingParams(max_tokens=new, ignore_eos=True)
    ids = np.random.default_rng(0).integers(0, engine.cfg.vocab_size, (batch, prompt)).tolist()
    times: list[list[float]] = [[] for _ in range(batch)]
    begin = time.perf_counter()
    for row, came in zip(ids, times, strict=True):

        def emit(news, came=came) -> None:
            came.extend([time.perf_counter() - begin] * len(news.tokens))

        engine.submit(row, params, emit)
    while engine.step():
        pass
    return np.array(times)


def decode_row(rounds: list[np.ndarray]) -> Row:
    """Sums up rounds: rate of all tokens, seconds to the first one and between the others."""
    firsts = np.concatenate([times[:, 0] for times in rounds])
    gaps = np.concatenate([np.diff(times, axis=1).ravel() for times in rounds])
    row = {
        "tokens_per_second": sum(t.size for t in rounds) / sum(t.max() for t in rounds),
        "first_token_mean_seconds": firsts.mean(),
        "first_token_min_seconds": firsts.min(),
        "first_token_max_seconds": firsts.max(),
    }
    row |= percentiles("token", gaps)
    return row | {"peak_memory_bytes": peak_memory()}
