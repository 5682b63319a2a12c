"""Compiled programs are kept on disk, so that a second start of any verb does not compile."""

import os
from pathlib import Path

from internjax.catalog import cache_dir
from internjax.errors import UserError


def enable_compilation_cache() -> Path:
    """Turns on JAX's persistent compilation cache in the user's cache folder; returns the folder.

    `JAX_COMPILATION_CACHE_DIR`, where set, is left alone.
    """
    import jax

    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(given)
    folder = cache_dir() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {folder} ({error.strerror}): set INTERNJAX_CACHE to a folder of yours."
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder
