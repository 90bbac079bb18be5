"""Compiled programs kept between runs, so that only the first start of a model waits for the compiler."""

import logging
import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)


def enable_cache() -> Path | None:
    """Turns on JAX's persistent compilation cache, unless the user has chosen one.

    It lies in `$XDG_CACHE_HOME/effjax/xla`, by default `~/.cache/effjax/xla`. It keeps small programs too: JAX keeps by
    itself only what took a second to compile, and a start waits for dozens that take less.

    Returns:
      The folder in use, or None if none can be written (which is logged, and only costs time).
    """
    chosen = jax.config.jax_compilation_cache_dir
    if chosen:
        return Path(chosen)
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "effjax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.info("compiling without a cache: %s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # JAX looks for the setting only before its first compilation
    return folder
