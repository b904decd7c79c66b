"""A whole dataset on a Ray cluster: images a second with one and with two workers, against the local engine.

The cluster is one node with two cores on this machine, which this script starts, on 127.0.0.1 alone, and ends. One worker has
two threads, two have one each; the local engine is measured with one and with all. "In all" is from the call of `write` to its
end, with the connection, the start of the workers and the loading of their models; "between chunks" is from the first finished
chunk to the last: what long runs come to. The dataset is the demo's images, linked again and again.

Usage::

    python benchmarks/bench_ray.py [--images 2000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_dataset import dataset
from bentoml_detectron.threads import environment
from serving import free_port

ENVIRONMENT = {
    "BENTOML_DO_NOT_TRACK": "True",
    "PYTHONWARNINGS": "ignore",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # then Ray takes 127.0.0.1 for what it is
    "RAY_USAGE_STATS_ENABLED": "0",
    **environment(),  # as in the command's process
}
CHUNK = 50


def child(engine: str, workers: int, threads: int, images: str, address: str) -> None:
    """One run in a process of its own; prints its seconds in all, and images a second between its chunks."""
    import torch

    from bentoml_detectron.dataset import Progress, write

    class Chunks(Progress):
        images = 0
        first: tuple[int, float] | None = None
        last = (0, 0.0)

        def advance(self, images: int) -> None:
            self.images += images
            if self.images % CHUNK == 0:
                self.last = (self.images, time.perf_counter())
                self.first = self.first or self.last

    if threads:
        torch.set_num_threads(threads)
    more = {"engine": "ray", "ray_address": address, "ray_workers": workers} if engine == "ray" else {}
    told = Chunks()
    with tempfile.TemporaryDirectory(prefix="bench-ray-") as folder:
        start = time.perf_counter()
        report = write("digits", images, Path(folder) / "found.json", chunk=CHUNK, progress=told, **more)
        seconds = time.perf_counter() - start
    steady = (told.last[0] - told.first[0]) / (told.last[1] - told.first[1])
    print(json.dumps({"seconds": seconds, "steady": steady, "images": report.images}))


@contextmanager
def cluster() -> Iterator[str]:
    """A node with two cores, for as long as it is needed; its address."""
    folder, port = tempfile.mkdtemp(prefix="ray-", dir="/tmp"), free_port()  # short, for its sockets
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--include-dashboard=false",
         "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2", "--object-store-memory=100000000",
         f"--temp-dir={folder}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(Path(folder).glob("session_2*/sockets/raylet")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the cluster does not start")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        for each in psutil.pids():
            try:
                if os.getsid(each) == process.pid:
                    os.kill(each, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait(30)
        subprocess.run(["rm", "-rf", folder], check=False)


def measured(*arguments: object) -> dict[str, float]:
    result = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, arguments)], capture_output=True, text=True, timeout=600
    )
    if result.returncode:
        raise SystemExit(f"ended with {result.returncode}: {result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        engine, workers, threads, images, address = arguments.child
        child(engine, int(workers), int(threads), images, address)
        return
    os.environ.update(ENVIRONMENT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and the cluster with it
    with tempfile.TemporaryDirectory(prefix="bench-ray-") as home:
        os.environ["BENTOML_HOME"] = home
        save = "import bentoml\nfrom bentoml_detectron import demo\nbentoml.detectron.save_model('digits', demo.predictor())"
        subprocess.run([sys.executable, "-c", save], check=True, timeout=300)
        images = dataset(Path(home) / "images", arguments.images)
        compare(images, arguments.images, arguments.rounds)


def compare(images: Path, count: int, rounds: int) -> None:
    one, local = "local, 1 thread", f"local, {os.cpu_count()} threads"
    ways = {local: ("local", 0, 0), one: ("local", 0, 1), "ray, 1 worker": ("ray", 1, 0), "ray, 2 workers": ("ray", 2, 0)}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with cluster() as address:
        for _ in range(rounds):
            for way, (engine, workers, threads) in ways.items():
                found[way].append(measured(engine, workers, threads, images, address))
    print(f"{count:,} images of 192x192, chunks of {CHUNK}, {os.cpu_count()} cores, median of {rounds} rounds, in turn")
    print(f"| engine | images a second, in all | between chunks | times {local} | times {one} |\n|---|---|---|---|---|")
    for way, each in found.items():
        whole, steady = (
            statistics.median(f(run) for run in each) for f in (lambda run: count / run["seconds"], lambda run: run["steady"])
        )
        ratios = [
            f"{statistics.median(run['steady'] / other['steady'] for run, other in zip(each, found[base], strict=True)):.2f}"
            for base in (local, one)
        ]
        print(f"| {way} | {whole:.1f} | {steady:.1f} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
