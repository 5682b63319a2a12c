"""InternJAX: one tree of arrays through the whole InternLM chain.

`load` gives a model by name or path, `pipeline` a function that answers. Importing this package
imports neither JAX nor anything else that is slow.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from internjax.version import __version__

if TYPE_CHECKING:
    from internjax.models.load import Model

__all__ = ["__version__", "async_pipeline", "load", "pipeline"]


def load(name_or_path: str, **options: Any) -> "Model":
    """Loads a model by its published name or from a path; see `internjax.models.load.load`."""
    from internjax.models.load import load

    return load(name_or_path, **options)


def pipeline(name_or_path: Any, **options: Any) -> Callable[..., Any]:
    """Returns a function that answers a prompt or a chat; see `internjax.serve.pipeline`."""
    from internjax.serve.pipeline import pipeline

    return pipeline(name_or_path, **options)


def async_pipeline(name_or_path: Any, **options: Any) -> Any:
    """Returns a coroutine function that answers; see `internjax.serve.pipeline.AsyncPipeline`."""
    from internjax.serve.pipeline import async_pipeline

    return async_pipeline(name_or_path, **options)
