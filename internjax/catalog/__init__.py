"""Models, tokenizers and datasets by name: `search`, `info`, `ls`, `get`.

`index.yaml` and `files.txt` are the data, `index` reads them, `sources` brings bytes here, `cache`
keeps whole files. Nothing here knows what a model or a dataset is used for.
"""

from internjax.catalog.cache import cache_dir, fetch, get
from internjax.catalog.index import DIMENSIONS, KINDS, Entry, File, entries, info, ls, search

__all__ = [
    "DIMENSIONS",
    "KINDS",
    "Entry",
    "File",
    "cache_dir",
    "entries",
    "fetch",
    "get",
    "info",
    "ls",
    "search",
]
