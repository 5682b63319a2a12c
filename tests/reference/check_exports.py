"""Reads folders that `internjax convert` wrote with transformers and compares with the goldens.

    .venv-peers/bin/python -m tests.reference.check_exports DIR

DIR holds one folder a variant, named like it; InternLM's converted with family=llama.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.reference.make_goldens import GOLDENS, LENGTHS


def main(root: Path) -> None:
    """Prints the largest difference of each folder; fails above float32's rounding."""
    goldens = np.load(GOLDENS)
    for folder in sorted(root.iterdir()):
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        for length in LENGTHS:
            tokens = torch.tensor([goldens[f"tokens-{length}"].tolist()])
            with torch.no_grad():
                logits = model(tokens).logits[0].numpy()[goldens["kept"]]
            distance = np.abs(logits - goldens[f"{folder.name}-{length}"]).max()
            print(f"{folder.name} at {length} tokens: {distance:.1e}")
            if not distance <= 1e-5:
                raise SystemExit(f"{folder}: the export computes something else")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
