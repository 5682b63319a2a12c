"""Scores the byte-bigram model with lm-evaluation-harness on our task files: the goldens of
`tests/test_evals_harness.py`.

Run in an environment of its own that holds lm-eval 0.4.13 and jaxtyping, from the repository's top:
`INTERNJAX_MIRROR=<folder> python -m tests.reference.harness_scores`.
"""

import json
import os
import tempfile
from pathlib import Path

import yaml
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from internjax.evals.tasks import FOLDER, task_names
from tests.ngram_lm import BigramLM

METRICS = ("acc", "acc_norm", "bits_per_byte")


class HarnessLM(LM):
    """The bigram model behind the harness's own interface."""

    model = BigramLM()

    def loglikelihood(self, requests):
        scores = self.model.loglikelihood([request.args for request in requests])
        return [(score.sum, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests):
        return self.model.loglikelihood_rolling([request.args[0] for request in requests])

    def generate_until(self, requests):
        raise NotImplementedError("generation is judged by scorers of our own")


def point_at_data(name: str, folder: Path) -> None:
    """Writes the task file with the absolute path of its rows; nothing else is changed."""
    raw = yaml.safe_load((FOLDER / "tasks" / f"{name}.yaml").read_text(encoding="utf-8"))
    (file,) = raw["dataset_kwargs"]["data_files"].values()
    shipped = raw["metadata"]["source"] == "package"
    path = FOLDER / "data" / file if shipped else Path(os.environ["INTERNJAX_MIRROR"]) / file
    path = path if path.is_file() else path.with_name(path.name + ".gz")
    raw["dataset_kwargs"]["data_files"] = {"test": str(path)}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")


def main() -> None:
    """Prints {task: {metric: [value, stderr]}}."""
    kinds = {n: (FOLDER / "tasks" / f"{n}.yaml").read_text(encoding="utf-8") for n in task_names()}
    names = [name for name, text in kinds.items() if "generate_until" not in text]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            point_at_data(name, Path(folder))
        manager = TaskManager(include_path=folder, include_defaults=False)
        found = simple_evaluate(HarnessLM(), tasks=names, task_manager=manager, bootstrap_iters=2)
    scores = {
        name: {
            metric: [row[f"{metric},none"], row[f"{metric}_stderr,none"]]
            for metric in METRICS
            if f"{metric},none" in row
        }
        for name, row in found["results"].items()
    }
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
