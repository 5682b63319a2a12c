"""Files by path or by address, read alike: a local folder, `file://`, `s3://`, `gs://`, `memory://`.

Everything that is not a plain path goes through TensorStore, which reads byte ranges, so that a row
of a shard in a bucket costs one small request and no copy on the disk.
"""

import functools
import os
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import tensorstore as ts

from internjax.errors import Corrupt, Missing, UserError

SCHEMES = ("file", "s3", "gs", "memory")


def is_address(path: str | Path) -> bool:
    """Whether this is `scheme://...` and not a plain path."""
    return "://" in str(path)


@functools.cache
def open_store(address: str) -> ts.KvStore:
    """Opens the folder at an address.

    For s3, the usual variables AWS_ENDPOINT_URL (another server than Amazon's), AWS_REGION and the
    AWS credentials count; for gs, Google's application default credentials.

    Raises:
      UserError: a scheme that is not read.
    """
    parts = urlsplit(address)
    if parts.scheme not in SCHEMES:
        raise UserError(
            f"{address}: {parts.scheme}:// is not read; legal are a plain path and "
            f"{', '.join(f'{scheme}://' for scheme in SCHEMES)}."
        )
    folder = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
    spec = {
        "file": {"driver": "file", "path": f"/{folder}"},
        "memory": {"driver": "memory", "path": f"{parts.netloc}/{folder}"},
        "gs": {"driver": "gcs", "bucket": parts.netloc, "path": folder},
        "s3": {"driver": "s3", "bucket": parts.netloc, "path": folder, **_s3_options()},
    }[parts.scheme]
    try:
        return ts.KvStore.open(spec, context=_context()).result()
    except ValueError as error:
        raise UserError(f"{address} is no address: {str(error).splitlines()[0]}") from error


def read_file(path: str | Path, name: str) -> bytes:
    """Returns the bytes of file `name` in the folder `path`, a path or an address.

    Raises:
      Missing: it is not there, or the server does not give it.
    """
    if is_address(path):
        return _read(str(path), name, slice(None))
    file = Path(path) / name
    if not file.is_file():
        raise Missing(f"{file} is missing.")
    return file.read_bytes()


def open_array(path: str | Path, name: str, dtype: np.dtype) -> "np.ndarray | RemoteArray":
    """Opens a file of numbers for reading by slices: mapped where it is local."""
    if is_address(path):
        return RemoteArray(str(path), name, dtype)
    return np.asarray(np.memmap(Path(path) / name, dtype=dtype, mode="r"))  # slices faster


def check_size(path: str | Path, name: str, size: int) -> None:
    """Raises `Corrupt` where a file is not there or has not exactly `size` bytes."""
    if not is_address(path):
        file = Path(path) / name
        if not file.is_file():
            raise Corrupt(f"{file} is missing: make the shards again.")
        if (found := file.stat().st_size) != size:
            raise Corrupt(f"{file} has {found:,} bytes, its header says {size:,}: make it again.")
        return
    # A store has no call for the size: of the right one, exactly the last byte is left.
    first = max(size - 1, 0)
    if (left := len(_read(str(path), name, slice(first, None)))) != size - first:
        raise Corrupt(
            f"{path}/{name} has {first + left:,} bytes, its header says {size:,}: make it again."
        )


class RemoteArray:
    """A file of numbers behind an address; `array[a:b]` reads just these bytes."""

    def __init__(self, address: str, name: str, dtype: np.dtype):
        self.address, self.name, self.dtype = address, name, np.dtype(dtype)

    def __getitem__(self, part: slice) -> np.ndarray:
        size = self.dtype.itemsize
        begin = (part.start or 0) * size
        end = None if part.stop is None else part.stop * size
        if end == begin:
            return np.zeros(0, self.dtype)
        return np.frombuffer(_read(self.address, self.name, slice(begin, end)), self.dtype)


def _read(address: str, name: str, part: slice) -> bytes:
    try:
        found = open_store(address).read(name, byte_range=part).result()
    except (ValueError, OSError) as error:  # what TensorStore raises for every refusal of a server
        if str(error).startswith("OUT_OF_RANGE"):
            raise Corrupt(f"{address}/{name} is shorter than its header says.") from error
        raise Missing(f"{address}/{name} cannot be read: {str(error).splitlines()[0]}") from error
    if found.state != "value":
        raise Missing(f"{address}/{name} is missing.")
    return found.value


@functools.cache
def _context() -> ts.Context:
    """One for the process: connections are shared, and so is what lies in memory://.

    A server that does not answer is given up after about 20 seconds; TensorStore's own 32 tries
    would hang for a quarter of an hour.
    """
    tries = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}
    return ts.Context({"s3_request_retries": tries, "gcs_request_retries": tries})


def _s3_options() -> dict:
    options = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        options["endpoint"] = endpoint
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        options["aws_region"] = region
    return options
