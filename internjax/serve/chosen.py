"""What a step chose, read back to the host."""

from dataclasses import dataclass

import jax
import numpy as np

from internjax.serve.sampling import Sampled
from internjax.serve.scheduler import IdLogprob


@dataclass(frozen=True)
class Chosen:
    """The fields of `Sampled` as arrays of the host, R rows.

    Fields:
      logprobs: log-probability `[R]`, ids and log-probabilities of the rivals `[R, 20]`; None where
        nobody asked, since reading them takes time.
    """

    token: np.ndarray
    finite: np.ndarray
    allowed: np.ndarray
    logprobs: tuple[np.ndarray, np.ndarray, np.ndarray] | None

    @classmethod
    def read(cls, out: Sampled, *, logprobs: bool) -> "Chosen":
        """Waits for a step and reads it."""
        token, finite, allowed = map(np.asarray, (out.token, out.finite, out.allowed))
        rivals = (out.logprob, out.top_ids, out.top_logprobs)
        return cls(token, finite, allowed, jax.device_get(rivals) if logprobs else None)

    def scored(self, row: int, wanted: int | None) -> IdLogprob | None:
        """Returns a row's log-probability with so many rivals; None for None."""
        if wanted is None:
            return None
        logprob, top_ids, top_logprobs = self.logprobs
        pairs = zip(top_ids[row, :wanted], top_logprobs[row, :wanted], strict=True)
        top = tuple((int(i), float(x)) for i, x in pairs)
        return IdLogprob(int(self.token[row]), float(logprob[row]), top)
