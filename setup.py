"""Builds the CPU kernels beside the package; everything else stands in pyproject.toml.

Without a C++ compiler or XLA's headers the package installs without them and says so at first use
(kernels/cpu/library.py).
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup

FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",  # a product and a sum stay two roundings on every path
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",  # GCC 12 warns of its own AVX-512 header
]


def kernels() -> list[Extension]:
    """Lists the extension, if XLA's headers (part of jaxlib) are here."""
    jaxlib = importlib.util.find_spec("jaxlib")
    if jaxlib is None or not sys.platform.startswith("linux"):
        return []
    headers = Path(jaxlib.origin).parent / "include"
    folder = Path("kernels", "cpu")
    return [
        Extension(
            "internjax.kernels.cpu._native",
            [str(path) for path in sorted(folder.glob("*.cc"))],
            depends=[str(path) for path in sorted(folder.glob("*.h"))],
            include_dirs=[str(headers)],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=kernels())
