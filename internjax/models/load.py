"""`load`: a published name or a path becomes config, parameters, tokenizer and chat template."""

import ctypes
import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from internjax import catalog
from internjax.data.chat import ChatTemplate, template_for
from internjax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from internjax.errors import Missing
from internjax.kernels.cpu.library import available
from internjax.models.config import ModelConfig
from internjax.models.convert import model_path, read_model
from internjax.models.decoder import init_params
from internjax.models.init import InitConfig
from internjax.tree import Params


@dataclass(frozen=True)
class Model:
    """What `load` gives and every stage takes.

    Fields:
      cfg: the shape; params: the tree on device; tokenizer and template: text in and out;
      path: the file or folder it came from.
    """

    cfg: ModelConfig
    params: Params
    tokenizer: Tokenizer
    template: ChatTemplate
    path: Path


def resolve(name_or_path: str | Path) -> Path:
    """Finds a model: an existing path as it is, else a catalogue name, fetched when needed."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    models = [e.name for e in catalog.search("", kind="model")]
    if name in models:
        return catalog.get(name)
    raise Missing(_no_model(name, models))


def _no_model(name: str, models: list[str]) -> str:
    """Says what may be meant: a file that is not there, or names of the catalogue like this one."""
    if name.endswith((".gguf", ".safetensors")) or name.startswith((".", "/", "~")):
        return f"{name}: no such file or folder (relative paths start at {Path.cwd()})."
    begun = [model for model in models if model.startswith(name.lower())]
    near = begun or difflib.get_close_matches(name.lower(), models, n=1)
    hint = f"did you mean {' or '.join(near[:3])}? " if near else ""
    return (
        f"no model {name!r}: neither a file or folder here nor a name of the catalogue: {hint}"
        "`internjax catalog ls kind=model` lists all."
    )


def load(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    packed: bool = False,
    on_host: bool = False,
) -> Model:
    """Loads a model of any format: Hugging Face folder, GGUF file or our own folder.

    A model of the catalogue carries its published name, others what their files call them.

    Args:
      dtype: of the stored floating-point weights and of the computation.
      on_host: the weights stay NumPy arrays, for who sends each device a part of them only.
      packed: where the CPU kernels run, weights of a Q4_0, Q4_1 or Q8_0 file stay the integers that
        they are: for answering only, they cannot be trained or converted.
    """
    path = model_path(resolve(name_or_path))
    cfg, host = read_model(path, dtype=dtype, packed=packed and available())
    name = cfg.name if Path(name_or_path).expanduser().exists() else str(name_or_path)
    cfg = dataclasses.replace(cfg, name=name, dtype=dtype)
    tokenizer = load_tokenizer(path)
    check_vocab(tokenizer, cfg.vocab_size)
    params = host if on_host else jax.tree.map(jnp.asarray, host)
    del host
    _return_memory()
    return Model(cfg, params, tokenizer, template_for(path, tokenizer), path)


def _return_memory() -> None:
    """Gives freed memory back to the system: glibc keeps what reading the tensors took (100 MB)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def random_model(
    cfg: ModelConfig, tokenizer_path: Path, seed: int, init: InitConfig = InitConfig()
) -> Model:
    """Draws a model of shape `cfg`, with the tokenizer and the chat template found at a path.

    Raises: UserError when the tokenizer has more ids than the model rows.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    check_vocab(tokenizer, cfg.vocab_size)
    params = init_params(cfg, jax.random.key(seed), jnp.dtype(cfg.dtype), init=init)
    template = template_for(tokenizer_path, tokenizer)
    return Model(cfg, params, tokenizer, template, tokenizer_path)
