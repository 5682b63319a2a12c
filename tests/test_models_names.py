"""A model is named by a path or by a name of the catalogue; what is near is told otherwise."""

import pytest

from internjax.errors import Missing
from internjax.models.load import resolve


@pytest.mark.parametrize(
    "name, says",
    [
        ("smolm2-135m-instruct", "did you mean smollm2-135m-instruct?"),
        ("SmolLM2", "did you mean smollm2-135m-instruct?"),
        ("gpt-4", "`internjax catalog ls kind=model` lists all"),
        ("./nothing", "./nothing: no such file or folder"),
        ("nothing.gguf", "nothing.gguf: no such file or folder"),
    ],
)
def test_an_unknown_model_is_told_what_is_near(name, says):
    with pytest.raises(Missing) as caught:
        resolve(name)
    assert says in str(caught.value)
