"""What a worker's memory does over mixed requests, beside that of a service that leaks.

It is measured at rest, when the worker has given back what the C library kept: between requests it is more, by what the largest
images that came together needed.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from bentoml_detectron.service.life import REST_SECONDS
from servers import Server, two_instances, write_service
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
    """Of the one worker and its model's processes, in megabytes."""
    (worker,) = server.workers()
    processes = [psutil.Process(worker), *psutil.Process(worker).children()]
    return sum(each.memory_info().rss for each in processes) / 1e6


def memory_at_rest(server: Server) -> float:
    """The same when the worker has had time to give memory back."""
    time.sleep(2 * REST_SECONDS + 2)
    return memory(server)


def growth(server: Server, warm: int = WARM, measured: int = MEASURED) -> float:
    """Megabytes that the worker has more at rest after the measured requests than before them; prints those between, too."""
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(4) as pool:

        def send(count: int, seed: int) -> float:
            statuses.update(pool.map(lambda each: client.post(**each).status_code, requests(count, seed)))
            return memory(server)

        send(warm, 0)
        before = memory_at_rest(server)
        found = [send(measured // 10, seed) for seed in range(1, 11)]
        after = memory_at_rest(server)
    print(f"\n{warm} + {measured} requests, {dict(statuses)}")
    print(f"MB at rest: {before:.0f} before, {after:.0f} after; at work: {[round(each) for each in found]}")
    assert {200, 400, 415} <= statuses.keys() <= {200, 400, 415, 503}
    assert statuses[200] > 0.3 * (warm + measured)
    return after - before


def leaking(folder: Path) -> None:
    """Makes the service keep each body."""
    with (folder / "service.py").open("a") as file:
        file.write(LEAK)


def test_mixed_requests_leave_the_memory_as_it_is(tmp_path, digits_home):
    """5,000 where BENTOML_DETECTRON_WHOLE is set, otherwise some hundreds."""
    write_service(tmp_path)
    with two_instances(tmp_path, digits_home) as server:
        assert growth(server) < MOST


def test_service_that_keeps_bodies_grows_more(tmp_path, digits_home):
    """Over a third of the requests already."""
    write_service(tmp_path)
    leaking(tmp_path)
    with two_instances(tmp_path, digits_home) as server:
        assert growth(server, WARM // 3, MEASURED // 3) > MOST
