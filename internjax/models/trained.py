"""The model inside a training's checkpoints, so that any of them can be converted and served."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from internjax.checkpoint import Checkpoints
from internjax.errors import Missing, UserError
from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.models.native import config_from_json
from internjax.tree import Params, unflatten

TREE = "tree"  # the folder of a step that Orbax writes the state into


def holds_checkpoints(path: str | Path) -> bool:
    """Tells a folder of checkpoints: an address, or a local one with a step inside."""
    if "://" in str(path):
        return True
    return any(step.parent.name.isdigit() for step in Path(path).glob(f"[0-9]*/{TREE}"))


def load_trained(
    path: str | Path, dtype: Any = None, *, step: int | None = None
) -> tuple[ModelConfig, Params]:
    """Reads the parameters of one step, the newest for None, and nothing of the optimizer.

    Args:
      path: a folder of checkpoints, or an address (gs://, s3://); a run may be writing there.
      dtype: None keeps what is stored: the master weights of the training.

    Raises: Missing: no such step, with the ones there are. Corrupt. UserError: the checkpoints are
      not of a pretraining, which notes the shape of its model in them.
    """
    with Checkpoints(path, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            asked = "no whole checkpoint" if step is None else f"no checkpoint of step {step}"
            there = f"; there are {', '.join(map(str, steps))}" if steps else ""
            raise Missing(f"{path}: {asked}{there}.")
        step = steps[-1] if step is None else step
        noted = checkpoints.settings(step).get("model")
        if noted is None:
            raise UserError(f"{path}: step {step} is of no pretraining: it notes no model.")
        cfg = config_from_json(noted, where=f"{path}/{step}")
        stored = checkpoints.stored(step)
        one = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        like = {
            name: jax.ShapeDtypeStruct(
                spec.shape, dtype or stored[f"params/{name}"].dtype, sharding=one
            )
            for name, spec in param_table(cfg).items()
        }
        params = checkpoints.restore_part("params", unflatten(like), step=step)
    return cfg, jax.tree.map(np.asarray, params)
