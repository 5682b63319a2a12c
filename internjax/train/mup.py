"""Width scaling (muP, arXiv:2203.03466): rates and starts chosen at one width hold at others.

For Adam-like optimizers, with m = width / base width (Table 3 there):
  embedding, norms, biases   rate 1      start as it is (their fan-in does not grow)
  matrices of the layers     rate 1/m    start x 1/sqrt(m): variance 1 / fan-in
  head                       rate 1/m    start x 1/m: deviation 1 / fan-in
The table of weights draws all of them with one deviation, so at the base width nothing changes.
Feed-forward size is taken to grow with the width; attention scores stay at 1/sqrt(head_dim):
widen a model by its heads, not by their size. A head tied to the embedding cannot follow the
table and is refused.
"""

import re

from internjax.errors import UserError
from internjax.tree import Leaf, Params, map_with_path

_VECTORS = re.compile(r"(.*/)?(embed|\w*norm|b[qkvo])")


def lr_multiplier(path: str, width: int, base_width: int) -> float:
    """Returns the factor on the learning rate of the weight at `path`."""
    return 1.0 if _VECTORS.fullmatch(path) else base_width / width


def rescale_start(params: Params, width: int, base_width: int) -> Params:
    """Returns freshly drawn parameters as muP starts them at `width`."""
    if "head" not in params:
        raise UserError(
            "base_width needs tie_embeddings=false: the head's rate and start must fall with the"
            " width, the embedding's must not."
        )
    shrink = base_width / width

    def start(path: str, weight: Leaf) -> Leaf:
        if _VECTORS.fullmatch(path):
            return weight
        return weight * (shrink if path == "head" else shrink**0.5)

    return map_with_path(start, params)
