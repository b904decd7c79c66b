"""How long PyTorch's threads wait for each other."""

import os
import subprocess
import sys

import pytest

from bentoml_detectron import get_service, threads

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def of_service(**config) -> dict[str, str]:
    return {each.name: each.value for each in get_service("digits:latest", **config).envs}


def test_service_has_it_in_the_environment_of_its_workers():
    assert of_service() == {"GOMP_SPINCOUNT": threads.environment()["GOMP_SPINCOUNT"]}


def test_service_keeps_variables_that_are_given_for_it():
    given = [{"name": "GOMP_SPINCOUNT", "value": "7"}, {"name": "A", "value": "b"}]
    assert of_service(envs=given) == {"GOMP_SPINCOUNT": "7", "A": "b"}
    assert given == [{"name": "GOMP_SPINCOUNT", "value": "7"}, {"name": "A", "value": "b"}]
    assert of_service(envs=[{"name": "A", "value": "b"}]) == {"A": "b", **threads.environment()}


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_has_decided_stays(monkeypatch, name):
    monkeypatch.setenv(name, "active")
    assert threads.environment() == {}
    assert of_service() == {}


@pytest.mark.slow
def test_commands_have_it_before_pytorch_is_there():
    code = (
        "import os, sys\n"
        "from bentoml_detectron.cli import detectron\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    detectron(['verify', 'nothing:here'])\n"
        "except SystemExit:\n    print(os.environ['GOMP_SPINCOUNT'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert done.stdout.split() == [threads.environment()["GOMP_SPINCOUNT"]], done.stderr
