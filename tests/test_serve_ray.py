"""Ray Serve with the real thing, where the extra `ray` is installed; the keys everywhere."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from internjax.errors import Missing
from internjax.models.native import save_native
from tests.test_serve_engine import make_model

HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(HAS_RAY, reason="the extra `ray` is installed")
def test_without_the_extra_it_says_what_to_install():
    from internjax.experiments.serve_ray import application

    with pytest.raises(Missing, match=r"internjax\[serve,ray\]"):
        application({"model": "x"})


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="needs the extra `ray`")
def test_two_replicas_of_a_ray_cluster(tmp_path):
    model = make_model(context=512, num_layers=1)
    save_native(tmp_path / "smollm2-tiny", model.cfg, model.params, model.tokenizer)
    command = [sys.executable, "-m", "tests.ray_serving", str(tmp_path / "smollm2-tiny")]
    environ = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))
    assert found == {
        "models": "tiny",
        "no_key": 401,
        "streams": ["data: [DONE]"] * 8,
        "session": [400, "no_sessions"],
        "replicas": [2, 2],
        "after": "data: [DONE]",
    }
