"""Output that must follow a JSON schema, a regular expression, a choice or a Lark grammar.

llguidance follows the grammar on the host and says which tokens may come next; the sampler applies
that as one bit a token inside the jitted step. JSON is compact by default, so that a small model
cannot fill its budget with white space. A schema keyword that cannot be enforced is refused.

Measured at 49152 tokens: 2 ms to compile a schema, 30 us a mask; the library's thread pool makes
the masks of 16 slots slower (1.8-4.4 ms instead of 0.4-1.2 on 2 cores), so they follow one another.
"""

import functools
import json

import numpy as np

from internjax.data.tokenizer import Tokenizer
from internjax.errors import Missing, UserError
from internjax.serve.json_schema import checked_schema

KINDS = ("json_schema", "regex", "choice", "lark")
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


class GrammarFailed(RuntimeError):
    """A grammar could not be followed any further; the message says why."""


class Grammars:
    """Compiles grammars for one vocabulary; the vocabulary's index is built at the first use."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def matcher(self, grammar: dict) -> "Matcher":
        """Compiles a grammar.

        Args:
          grammar: one of {"json_schema": dict or bool}, {"regex": str}, {"choice": [str]},
            {"lark": str}.

        Raises:
          UserError: another form, a syntax error, something that cannot be enforced, or a grammar
            that no text follows.
        """
        compiled = compile_grammar(_canonical(grammar))
        from llguidance import LLMatcher

        matcher = Matcher(LLMatcher(self._index, compiled, log_level=0))
        first = np.zeros(-(-self._vocab_size // 32), np.uint32)
        try:
            matcher.fill(first)  # the engine's thread then finds the lexer warm
        except GrammarFailed as error:
            raise UserError(f"grammar: {error}") from error
        if not first.any():
            raise UserError("grammar: no text follows it.")
        return matcher

    @functools.cached_property
    def _index(self):
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = _Vocabulary(self._tokenizer, self._vocab_size)
        return LLTokenizer(
            TokenizerWrapper(vocabulary),
            n_vocab=self._vocab_size,
            eos_token=list(self._tokenizer.eos_ids),
        )


class Matcher:
    """Follows one request through its grammar."""

    def __init__(self, matcher):
        self._matcher = matcher

    def fill(self, words: np.ndarray) -> None:
        """Writes the allowed tokens as bits into a uint32 row `[W]`.

        Raises:
          GrammarFailed: following it takes more states than the library's limits allow.
        """
        assert words.flags["C_CONTIGUOUS"], "the mask is written through its address"
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            raise GrammarFailed(_first_line(self._matcher.get_error()))

    def advance(self, token: int) -> bool:
        """Takes the chosen token; returns True when the text is complete and cannot go on.

        Raises:
          GrammarFailed: as for `fill`.
        """
        if not self._matcher.consume_token(token):
            raise GrammarFailed(_first_line(self._matcher.get_error()))
        return self._matcher.is_stopped()


@functools.lru_cache(maxsize=256)
def compile_grammar(canonical: str) -> str:
    """Translates a grammar (as canonical JSON) to llguidance's own form and checks it."""
    ((kind, value),) = json.loads(canonical).items()
    matcher = _library()
    if kind == "json_schema":
        schema = checked_schema(value, "json_schema ", schema_problem)
        return matcher.grammar_from_json_schema(schema, overrides=COMPACT)
    if kind == "regex":
        compiled = matcher.grammar_from_regex(value)
    elif kind == "choice":
        options = " | ".join(json.dumps(option, ensure_ascii=False) for option in value)
        # JSON leaves DEL as it is; Lark's strings do not hold it.
        compiled = matcher.grammar_from_lark(f"start: {options}".replace("\x7f", "\\u007f"))
    else:
        compiled = matcher.grammar_from_lark(value)
    problem = matcher.validate_grammar(compiled)
    if problem:
        raise UserError(f"{kind}: {_first_line(problem)}")
    return compiled


def schema_problem(schema: dict) -> str:
    """Returns why a schema cannot be enforced, or "" if it can."""
    matcher = _library()
    compiled = matcher.grammar_from_json_schema(schema, overrides=COMPACT)
    return _first_line(matcher.validate_grammar(compiled))


def _library() -> type:
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise Missing("Grammars need llguidance: pip install 'internjax[serve]'") from error
    return LLMatcher


def _canonical(grammar: dict) -> str:
    """Checks the outer form and returns it as text, so that compilations can be cached."""
    if not isinstance(grammar, dict) or len(grammar) != 1 or next(iter(grammar)) not in KINDS:
        raise UserError(f"grammar={grammar!r}: give exactly one of {', '.join(KINDS)}.")
    ((kind, value),) = grammar.items()
    legal = {
        "json_schema": isinstance(value, (dict, bool)),
        "regex": isinstance(value, str) and bool(value),
        "lark": isinstance(value, str) and bool(value),
        "choice": isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(x, str) and x for x in value),
    }[kind]
    if not legal:
        expected = {"json_schema": "an object", "choice": "a list of non-empty strings"}
        raise UserError(f"grammar: {kind} takes {expected.get(kind, 'a non-empty string')}.")
    try:
        return json.dumps(grammar)
    except RecursionError as error:
        raise UserError(f"grammar: this {kind} is nested too deeply.") from error


def _first_line(text: str) -> str:
    """The library's message without the echo of the grammar; a regex error's reason comes last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("error: ")), "")
    return " ".join(filter(None, [lines[0], reason])) if lines else ""


class _Vocabulary:
    """Our tokenizer in the shape that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        ids = range(tokenizer.vocab_size)
        self.special_token_ids = [i for i in ids if tokenizer.is_special(i)]
        self.eos_token_id = tokenizer.eos_ids[0]
        self.bos_token_id = tokenizer.bos_id
        # Rows of the model's table beyond the vocabulary have no bytes: no grammar allows them.
        holes = [b""] * (vocab_size - tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(i) for i in ids] + holes
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._tokenizer.encode(text, specials=False)
