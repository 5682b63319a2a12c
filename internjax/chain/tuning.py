"""LoRA fine-tuning on chats: the loss falls on the answers only, the base model stays as it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internjax.adapt.lora import attach, init_adapter, merge
from internjax.chain.pretraining import check_length, median_rate, settings_of
from internjax.data.batch import Batch
from internjax.data.chat import encode_chat
from internjax.data.loader import batches
from internjax.data.pack import fill, pack
from internjax.data.templates import Message
from internjax.errors import UserError
from internjax.models.load import Model
from internjax.models.peft import LoraConfig
from internjax.models.remat import Remat
from internjax.train.gradients import make_gradients
from internjax.train.loop import RunConfig, fit
from internjax.train.losses import next_token_loss
from internjax.train.optim import OptimConfig, make_optimizer
from internjax.train.state import init_state
from internjax.train.step import make_train_step
from internjax.tree import Params, count


@dataclass(frozen=True)
class TuneConfig:
    """How an adapter is trained.

    Fields:
      batch_size: rows an update; length: tokens a row; micro_batches: parts of a batch whose
        gradients are added; remat: recompute layers instead of storing them; seed: of the order
        and of the adapter's start.
      lora, optim, run: see `LoraConfig`, `OptimConfig` and `RunConfig`.
    """

    batch_size: int = 4
    length: int = 256
    micro_batches: int = 1
    remat: Remat = Remat("dots")
    seed: int = 0
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, warmup_fraction=0.1))
    run: RunConfig = field(default_factory=lambda: RunConfig(steps=20, save_every=10))


def tune(
    model: Model, chats: Sequence[list[Message]], cfg: TuneConfig, folder: Path
) -> tuple[Params, dict[str, Any]]:
    """Trains an adapter for `model` on `chats`; returns it and what was measured.

    Args:
      folder: of checkpoints and the step log; a run that was stopped goes on there.
    """
    rows = chat_rows(model, chats, cfg.length)
    adapter = init_adapter(model.cfg, cfg.lora, jax.random.key(cfg.seed))
    tx = make_optimizer(cfg.optim, cfg.run.steps)

    def loss(adapter: Params, batch: Batch, base: Params):
        return next_token_loss(attach(base, adapter, cfg.lora), batch, model.cfg, remat=cfg.remat)

    state, records = fit(
        init_state(adapter, tx),
        make_train_step(make_gradients(loss, micro_batches=cfg.micro_batches), tx),
        batches(rows, cfg.batch_size, seed=cfg.seed),
        cfg.run,
        folder,
        frozen=model.params,
        name="tune",
        settings=settings_of(cfg),
    )
    return state.params, {
        "adapter_parameters": count(adapter),
        "rows": len(rows),
        "row_fill": fill(rows),
        "trained_tokens": cfg.run.steps * cfg.batch_size * cfg.length,
        "answer_tokens": sum(int(r["num_tokens"]) for r in records),
        "steps": len(records),
        "loss": [r["loss"] for r in records],
        "tokens_per_second": cfg.batch_size * cfg.length * _median_steps_per_second(records),
        "answer_tokens_per_second": median_rate(records),
    }


def chat_rows(model: Model, chats: Sequence[list[Message]], length: int) -> list[Batch]:
    """Renders chats with the model's template and packs them; answers alone count.

    Raises:
      UserError: no chat, or one longer than a row: cutting it would train half an answer.
    """
    check_length(length, model.cfg)
    encoded = [encode_chat(model.tokenizer, model.template, chat) for chat in chats]
    if not any(any(mask) for _, mask in encoded):
        raise UserError("the chats hold no answer to learn: give messages of role assistant.")
    longest = max(len(ids) for ids, _ in encoded)
    if longest > length:
        raise UserError(
            f"a chat has {longest} tokens and a row holds {length}: raise `length` or leave long"
            " chats out."
        )
    return list(pack(encoded, length))


def merged(model: Model, adapter: Params, lora: LoraConfig) -> Params:
    """Returns the model's parameters with the adapter folded in."""
    return jax.jit(lambda base, adapter: merge(attach(base, adapter, lora)))(model.params, adapter)


def _median_steps_per_second(records: list[dict[str, Any]]) -> float:
    seconds = [r["seconds"] for r in records[1:]] or [float("inf")]
    return 1.0 / float(np.median(seconds))
