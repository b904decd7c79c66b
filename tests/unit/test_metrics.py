"""A worker's metrics: they are Prometheus's own, in one process and where several are read, and forget who is dead."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from support import run_python

CODE = """
import numpy as np
from prometheus_client import REGISTRY, CollectorRegistry, Histogram, generate_latest, multiprocess
from bentoml_detectron.service.metrics import _Histogram

bounds = [0.1, 0.5, 1.0]
plain, ours = Histogram("plain", "Scores", buckets=bounds), _Histogram("ours", "Scores", bounds)
for values in ([], [0.0, 0.1, 0.11, 0.5, 2.0], [1.0] * 7):
    given = np.array(values, np.float32)
    ours.observe(given)
    for value in given.tolist():
        plain.observe(value)
registry = REGISTRY
if several:
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
text = generate_latest(registry).decode()
lines = [line for line in text.splitlines() if "_created" not in line]
mine = sorted(line.replace("ours", "plain") for line in lines if "ours" in line)
theirs = sorted(line for line in lines if "plain" in line)
print(mine == theirs, len(mine))
"""


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_it_shows_what_prometheus_own_shows(several, tmp_path):
    shared = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)} if several else {}
    assert run_python(f"several = {several}\n{CODE}", **shared).stdout.split() == ["True", "8"]


@pytest.mark.slow
def test_workers_that_begin_together_all_forget_the_dead(tmp_path):
    """Each finds the same files, most of which another has removed when it comes to them."""
    dead = [tmp_path / f"gauge_livesum_{2**22 + number}.db" for number in range(3000)]  # beyond all that Linux gives
    for file in dead:
        file.touch()
    begin = "from bentoml_detectron.service.metrics import Metrics\nMetrics()"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run_python(begin, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)), range(4)))
    assert not any(file.exists() for file in dead)
