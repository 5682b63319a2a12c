"""One of several processes that train together, as the command line runs them.

python -m tests.launching FOLDER STEPS RESTARTS   with JAX_PROCESS_ID and the like set
"""

import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from internjax.train.launch import detect, is_worker, joined, supervise

SCHEDULE = 1000  # steps of the learning rate's schedule, however long the run


def train_together(folder: Path, steps: int, *, pause_seconds: float = 0.0):
    """Trains the bigram model over two devices, of one process or one each of two."""
    from internjax.data.loader import batches  # here: a supervisor needs none of these
    from internjax.train.gradients import make_gradients
    from internjax.train.loop import RunConfig, fit
    from internjax.train.optim import OptimConfig, make_optimizer
    from internjax.train.state import init_state
    from internjax.train.step import make_train_step
    from tests.training import bigram_loss, init_bigram, rows

    devices = np.array(jax.devices()[:2])
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    tx = make_optimizer(OptimConfig(lr=1e-2), SCHEDULE)
    state = init_state(init_bigram(), tx)
    state = jax.tree.map(lambda x: jax.device_put(np.asarray(x), NamedSharding(mesh, P())), state)
    whole = batches(rows(24), 4, seed=1)
    mine = slice(*(4 * (jax.process_index() + i) // jax.process_count() for i in (0, 1)))

    def batch_at(step: int):
        time.sleep(pause_seconds)
        sharding = NamedSharding(mesh, P("data"))
        put = jax.make_array_from_process_local_data
        return jax.tree.map(lambda x: put(sharding, np.asarray(x)[mine]), whole(step))

    cfg = RunConfig(steps=steps, save_every=5, progress=False)
    return fit(state, make_train_step(make_gradients(bigram_loss), tx), batch_at, cfg, folder)


def main(folder: Path, steps: int, restarts: int) -> int:
    """Runs below a supervisor; returns 3 when it was asked to stop."""
    info = detect(os.environ)
    if info is not None and not is_worker():
        return supervise(sys.orig_argv, restarts=restarts)
    from internjax.train.stop import Stopped

    with joined(info, timeout_seconds=60):
        (folder / f"worker{jax.process_index()}").write_text(str(os.getpid()))
        try:
            train_together(folder, steps, pause_seconds=0.05)
        except Stopped as error:
            print(error, file=sys.stderr)
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
