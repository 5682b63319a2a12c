"""The gate before deployment: a tuned model goes online only when measured to be good enough."""

from dataclasses import dataclass

from internjax.evals.core import Results
from internjax.evals.run import compare

IDENTITY, TEXT, CHOICES = "identity", "retention_text", "retention_choices"


@dataclass(frozen=True)
class GateConfig:
    """What must hold, against the model before tuning.

    Fields:
      identity: least share of identity questions answered with the right identity.
      bits_per_byte_rise: most relative rise on the retention texts.
      choice_drop, choice_p: the accuracy on the paired choices may not drop by more than
        `choice_drop` (a share) with a McNemar p below `choice_p`; one of the two alone passes.
    """

    identity: float = 0.9
    bits_per_byte_rise: float = 0.02
    choice_drop: float = 0.02
    choice_p: float = 0.05


@dataclass(frozen=True)
class Check:
    """One condition of the gate: its name, whether it held, and the figures in words."""

    name: str
    ok: bool
    told: str


def knows_itself(results: Results, cfg: GateConfig) -> Check:
    """Tells whether the identity is known well enough."""
    score = results.score(IDENTITY)
    told = f"{score.value:.1%} of {score.n} questions, at least {cfg.identity:.0%} asked"
    return Check("identity", score.value >= cfg.identity, told)


def gate(before: Results, after: Results, cfg: GateConfig) -> list[Check]:
    """Compares a model with the one before it on the same samples."""
    paired = {(c.task, c.metric): c for c in compare(before, after)}
    text, choices = paired[TEXT, "bits_per_byte"], paired[CHOICES, "acc"]
    rise, drop = text.relative, -choices.change
    return [
        knows_itself(after, cfg),
        Check(
            "retention text",
            rise <= cfg.bits_per_byte_rise,
            f"{text.before:.3f} -> {text.after:.3f} bits a byte, {rise:+.1%},"
            f" at most {cfg.bits_per_byte_rise:+.0%} allowed",
        ),
        Check(
            "retention choices",
            not (drop > cfg.choice_drop and choices.p_value < cfg.choice_p),
            f"{choices.before:.1%} -> {choices.after:.1%} of {choices.n} pairs, +{choices.wins}"
            f" -{choices.losses}, McNemar p {choices.p_value:.2f}; a drop above"
            f" {100 * cfg.choice_drop:.0f} points with p < {cfg.choice_p} fails",
        ),
    ]


def passed(checks: list[Check]) -> bool:
    """Whether every condition held."""
    return all(check.ok for check in checks)


def reasons(checks: list[Check]) -> str:
    """The conditions that did not hold, in one line."""
    return "; ".join(f"{check.name}: {check.told}" for check in checks if not check.ok)
