"""What the benchmarks of servers ask with: wrk, which sends images in turn as multipart forms.

``apt-get install wrk``.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

CONNECTIONS = 8
BOUNDARY = "----------------bench"
LUA = """
bodies, turn = {{}}, 0
for number = 1, {count} do
  local file = io.open(string.format("{folder}/%d.form", number), "rb")
  bodies[number] = file:read("*a")
  file:close()
end
wrk.method = "POST"
wrk.headers["Content-Type"] = "multipart/form-data; boundary={boundary}"
function request()
  turn = turn % {count} + 1
  return wrk.format(nil, nil, nil, bodies[turn])
end
function done(summary, latency)
  local failed = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout
  print(string.format("BENCH %d %d %d %f %f", summary.requests, summary.duration, failed,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
"""


def form(image: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    return head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()


def write_script(folder: Path, images: list[bytes]) -> Path:
    """A script for wrk that sends these images in turn."""
    for number, image in enumerate(images, 1):
        (folder / f"{number}.form").write_bytes(form(image))
    script = folder / "script.lua"
    script.write_text(LUA.format(count=len(images), folder=folder, boundary=BOUNDARY))
    return script


@dataclass(frozen=True)
class Load:
    """What wrk says: answers, how many a second, and the median and 99th percentile of their latencies in milliseconds."""

    answers: int
    rate: float
    median: float
    last: float


def load(url: str, script: Path, seconds: float, connections: int = CONNECTIONS) -> Load:
    """Asks for some whole seconds."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--timeout", "30s", "-s", str(script), url]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60).stdout
    requests, microseconds, failed, median, last = (float(each) for each in re.search(r"BENCH (.*)", output)[1].split())
    if failed or not requests:
        raise SystemExit(f"{failed:.0f} of {requests:.0f} requests to {url} failed:\n{output}")
    return Load(int(requests), requests / microseconds * 1e6, median, last)
