"""Makes, lists and removes the API keys of a server.

`internjax keys new alice` prints a key, once: only its salted hash is kept.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig

from internjax.errors import UserError
from internjax.experiments.config import build
from internjax.serve.keys import new_key, read_keys, remove_key


@dataclass(frozen=True)
class KeysConfig:
    """What to do; each key is explained in configs/keys.yaml."""

    action: Literal["new", "ls", "remove"] = "ls"
    name: str = ""
    file: Path = Path("keys.txt")


@hydra.main(config_path="../configs", config_name="keys", version_base=None)
def main(raw: DictConfig) -> None:
    """Runs one action."""
    cfg = build(KeysConfig, raw)
    if cfg.action == "ls":
        for key in read_keys(cfg.file):
            print(key.name)
        return
    if not cfg.name:
        raise UserError(f"keys {cfg.action} needs a NAME: whose key?")
    if cfg.action == "new":
        print(new_key(cfg.file, cfg.name))  # the key alone: KEY=$(internjax keys new alice)
    else:
        remove_key(cfg.file, cfg.name)


if __name__ == "__main__":  # the same program as `internjax keys`
    from internjax.cli import run

    sys.exit(run(["keys", *sys.argv[1:]]))
