"""One process of a tiny pretraining that several may share.

    python -m tests.processes FOLDER STEPS

Who it is stands in the environment (JAX_COORDINATOR_ADDRESS...); four devices in all, float64.
"""

import json
import os
import sys
from pathlib import Path


def main(folder: Path, steps: int) -> None:
    from internjax.train.launch import detect, joined

    with joined(detect(os.environ)):
        import jax
        import numpy as np

        from internjax.chain.pretraining import pretrain
        from internjax.mesh import MeshConfig
        from internjax.tree import flatten
        from tests.test_chain_pretraining import settings, setup

        process = jax.process_index()
        model, train, heldout = setup(folder / f"given{process}", "float64")
        cfg = settings(steps)
        mesh = MeshConfig(data=2, tensor=2, zero=1)
        trained, metrics = pretrain(model, train, heldout, cfg, folder / "run", mesh=mesh)
        if process == 0:
            np.savez(folder / "params.npz", **flatten(jax.tree.map(np.asarray, trained.params)))
            (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
