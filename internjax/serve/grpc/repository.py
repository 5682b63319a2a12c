"""A Triton model repository: `NAME/config.pbtxt`, `NAME/1/model.py`, the weights beside it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from internjax.models.folders import whole
from internjax.serve.engine import EngineConfig
from internjax.serve.grpc.contract import VERSION, config_text

WEIGHTS = "weights"
MODEL = f'''"""A model of InternJAX for Triton's Python backend; the code is the package's.

What may be asked, and the parameters of config.pbtxt, are described in docs/en/grpc.md.
"""

from pathlib import Path

from internjax.serve.grpc.triton import EngineModel


class TritonPythonModel(EngineModel):
    folder = Path(__file__).resolve().parent / "{WEIGHTS}"
'''


def model_name(text: str) -> str:
    """Returns a name that a folder and a client may use: other signs become hyphens."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "model"


@contextmanager
def triton_model(repository: str | Path, name: str) -> Iterator[Path]:
    """Writes a model into a repository, which may hold others; whole or not at all.

    Yields the folder `weights`, to be made by the block.

    Raises:
      UserError: a model of this name is there already.
    """
    parameters = {"dtype": "float32", "default_max_tokens": "512"}
    parameters |= {key: str(value) for key, value in asdict(EngineConfig()).items()}
    with whole(Path(repository) / name) as partial:
        version = partial / VERSION
        version.mkdir(parents=True)
        (partial / "config.pbtxt").write_text(config_text(name, "python", parameters))
        (version / "model.py").write_text(MODEL)
        yield version / WEIGHTS
