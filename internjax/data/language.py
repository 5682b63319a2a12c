"""Which language a text is in: py3langid's model (carried in its wheel), and the Han script."""

import functools
import re

# Characters that exist in one of the two scripts only, pairwise; frequent in any text.
SIMPLIFIED = (
    "们这说时国会来对学过动经开个为产与东车长门问间马风飞书电话语词还进远运达选边让认识请谢"
)
TRADITIONAL = (
    "們這說時國會來對學過動經開個為產與東車長門問間馬風飛書電話語詞還進遠運達選邊讓認識請謝"
)
SAMPLE_CHARACTERS = 20_000  # more text does not change the answer


def identify(text: str) -> tuple[str, float]:
    """Returns (BCP 47 language, probability in 0..1); `und` when the text has no letters."""
    sample = text[:SAMPLE_CHARACTERS]
    if not re.search(r"[^\W\d_]", sample):
        return "und", 0.0
    code, probability = _identifier().classify(sample)
    return (f"zh-{han_script(sample)}" if code == "zh" else code), round(float(probability), 4)


def han_script(text: str) -> str:
    """Returns Hans or Hant, whichever has more characters that the other lacks."""
    simplified = sum(map(text.count, SIMPLIFIED))
    return "Hans" if simplified >= sum(map(text.count, TRADITIONAL)) else "Hant"


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
