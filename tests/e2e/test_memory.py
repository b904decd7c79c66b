"""What a worker's memory does over mixed requests, beside that of a service that leaks."""

from __future__ import annotations

import io
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from servers import Server, served, write_service
from support import picture

pytestmark = pytest.mark.slow
WHOLE = "BENTOML_DETECTRON_WHOLE" in os.environ
"""Whether 5,000 requests shall be measured, which takes minutes; otherwise as many as take about half a minute."""
WARM, MEASURED = (2500, 5000) if WHOLE else (500, 700)
MOST = 30  # megabytes
LEAK = """
from bentoml_detectron.service import front

kept, read = [], front.read


async def leak(*arguments):
    call = await read(*arguments)
    kept.append(call.image)
    return call


front.read = leak
"""


def bodies(random: random.Random) -> list[bytes]:
    """Images of all formats and of many sizes, every fourth damaged, and what is none."""
    found = []
    for number in range(120):
        height, width = (int(2 ** random.uniform(5, 10.55)) for _ in range(2))  # 32 to 1500 pixels
        file = io.BytesIO()
        Image.fromarray(picture(height, width, number)).save(file, ("JPEG", "PNG", "WEBP", "BMP")[number % 4])
        content = bytearray(file.getvalue())
        if random.random() < 0.25:
            content[random.randrange(len(content))] ^= 0xFF
            del content[random.randrange(len(content) // 2, len(content)) :]
        found.append(bytes(content))
    return [*found, b"", b"no image", b"GIF89a"]


def requests(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Arguments of httpx.Client.post, the same for the same seed."""
    chance = random.Random(seed)
    contents = bodies(random.Random(1))
    for _ in range(count):
        fields = {
            "score_threshold": chance.choice(["0", "0.05", "0.3", "0.9", "1", "2"]),
            "masks": chance.choice(["rle", "polygon", "none"]),
        }
        if chance.random() < 0.3:
            fields["classes"] = chance.choice(["8", "1,2,3", "nobody"])
        path, content = chance.choice(["/predict", "/predict", "/predict", "/render"]), chance.choice(contents)
        if chance.random() < 0.5:
            yield {"url": path, "files": {"image": ("a", content)}, "data": fields}
        else:
            kind = chance.choice(["image/jpeg", "application/octet-stream", "image/png", "text/plain"])
            yield {"url": path, "content": content, "params": fields, "headers": {"content-type": kind}}


def memory(server: Server) -> float:
    """Of the one worker, in megabytes."""
    (worker,) = server.workers()
    return psutil.Process(worker).memory_info().rss / 1e6


def growth(server: Server) -> float:
    """Megabytes that the worker has more after the measured requests than after the warming ones; prints those between."""
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(4) as pool:

        def send(count: int, seed: int) -> float:
            statuses.update(pool.map(lambda each: client.post(**each).status_code, requests(count, seed)))
            return memory(server)

        send(WARM, 0)
        found = [memory(server)]
        for seed in range(1, 11):
            found.append(send(MEASURED // 10, seed))
    print(f"\n{WARM} + {MEASURED} requests, {dict(statuses)}")
    print(f"MB: {[round(each) for each in found]}; {(found[-1] - found[0]) / MEASURED * 1000:+.1f} a 1,000 requests")
    assert {200, 400, 415} <= statuses.keys() <= {200, 400, 415, 503}
    assert statuses[200] > 0.3 * (WARM + MEASURED)
    return found[-1] - found[0]


def leaking(folder: Path) -> None:
    """Makes the service keep each body."""
    with (folder / "service.py").open("a") as file:
        file.write(LEAK)


@pytest.mark.skipif(not WHOLE, reason="takes minutes; set BENTOML_DETECTRON_WHOLE")
def test_thousands_of_mixed_requests_leave_the_memory_as_it_is(tmp_path, digits_home):
    write_service(tmp_path)
    with served(tmp_path, digits_home) as server:
        assert growth(server) < MOST


def test_service_that_keeps_bodies_grows_much_faster(tmp_path, digits_home):
    """Hundreds of requests do not yet tell a slow leak from a process that warms up; a leak of bodies they do tell."""
    write_service(tmp_path)
    with served(tmp_path, digits_home) as server:
        found = growth(server)
    leaking(tmp_path)
    with served(tmp_path, digits_home) as server:
        assert growth(server) > max(MOST, 2 * found)
