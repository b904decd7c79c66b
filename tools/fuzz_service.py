"""Sends thousands of generated requests to a service of the demo model, and counts what it answers.

Three kinds, each from a process of its own: what schemathesis makes of the service's OpenAPI document; raw bytes over sockets,
from almost-HTTP to almost-multipart; and damaged JPEG, PNG, WebP and BMP files. It fails on any status of 500 or above, on a
refusal that does not say why, on a worker that ended and on a traceback in the log.

    .venv/bin/python tools/fuzz_service.py --requests 20000
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

BENTOML = Path(sys.executable).with_name("bentoml")
SHARES = {"schemathesis": 0.3, "raw": 0.4, "images": 0.3}
SERVICE = """
import bentoml
from bentoml_detectron.service import Settings

service = bentoml.detectron.get_service("digits:latest", settings=Settings(max_queue=1000, body_seconds=5.0))
"""
TRACEBACK = "Traceback (most recent call last)"
NO_ANSWER = 0
"""Counted as a status where the server closed the connection without one, which it may do to what is no whole request."""


class Tally:
    """Statuses, and examples of what should not be."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.faults: list[str] = []
        self.unanswered = 0

    def take(self, sent: str, status: int, content_type: str, body: bytes) -> None:
        self.statuses[status] += 1
        if status >= 500:
            self.fault(f"{status} for {sent}: {body[:200]!r}")
        elif status >= 400 and "json" in content_type:
            try:
                if not json.loads(body)["error"]:
                    raise ValueError("empty")
            except (ValueError, KeyError, TypeError) as exc:
                self.fault(f"{status} without a reason for {sent}: {body[:200]!r} ({exc})")
        elif status >= 400 and not body:
            self.fault(f"{status} without a body for {sent}")

    def fault(self, text: str) -> None:
        if len(self.faults) < 20:
            self.faults.append(text[:600])


def tried(count: int, number: int) -> Any:
    """Hypothesis as a generator alone: nothing is stored, shrunk or timed."""
    chosen = settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    return lambda test: seed(number)(chosen(test))


def by_schemathesis(port: int, count: int, number: int) -> Tally:
    """Requests that fit the OpenAPI document, and requests that nearly do; answers are held against it."""
    import requests
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    warnings.simplefilter("ignore")
    pictures = [encoded("JPEG", 96), encoded("PNG", 64)]
    bodies = st.one_of(st.binary(max_size=200), st.sampled_from([*pictures, pictures[0][:300], pictures[1][:60]]))
    for kind in ("image/jpeg", "image/png", "image/webp", "image/bmp", "application/octet-stream"):
        schemathesis.openapi.media_type(kind, bodies)
    held = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.allow_header_conformance,
        checks.response_schema_conformance,
        checks.negative_data_rejection,
        checks.unsupported_method,
    ]
    tally, session = Tally(), requests.Session()
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/docs.json")
    operations = [each.ok() for each in schema.get_all_operations() if each.ok().method == "post"]
    rounds = 0
    while sum(tally.statuses.values()) < count:
        rounds += 1
        for operation in operations:
            for mode, share in ((schemathesis.GenerationMode.POSITIVE, 0.15), (schemathesis.GenerationMode.NEGATIVE, 0.35)):

                @tried(max(10, min(1000, int(count * share))), number + rounds)
                @given(case=operation.as_strategy(mode))
                def send(case: Any) -> None:
                    answer = case.call(session=session)
                    sent = f"{case.method} {case.path} {case.query!r:.150} {case.media_type} {case.body!r:.100}"
                    tally.take(sent, answer.status_code, answer.headers.get("content-type", [""])[0], answer.content)
                    try:
                        case.validate_response(answer, checks=held)
                    except BaseExceptionGroup as exc:
                        tally.fault(f"{answer.status_code} breaks the document for {sent}: {exc.exceptions[0]!s:.300}")

                send()
    return tally


def encoded(kind: str, size: int) -> bytes:
    from PIL import Image

    noise = Image.frombytes("RGB", (8, 8), random.Random(size).randbytes(192))
    file = io.BytesIO()
    noise.resize((size, size), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def mutated(rng: random.Random, file: bytes) -> bytes:
    """A file with bytes changed, cut, doubled or put in, mostly where its structure is."""
    content = bytearray(file)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(min(len(content), rng.choice((16, 64, 700, len(content))))) if content else 0
        action = rng.randrange(6)
        if action == 0:
            content[at : at + 1] = rng.randbytes(1)
        elif action == 1:
            content[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
        elif action == 2:
            del content[at : at + rng.randrange(1, 200)]
        elif action == 3:
            del content[at + 1 :]
        elif action == 4:
            content[at:at] = content[at : at + rng.randrange(1, 200)]
        else:
            content[at:at] = rng.randbytes(rng.randrange(1, 50))
    return bytes(content)


def by_images(port: int, count: int, number: int) -> Tally:
    """Damaged files, as a form's part or as the body, under any name and type."""
    rng, tally = random.Random(number), Tally()
    files = [encoded(kind, size) for kind in ("JPEG", "PNG", "WEBP", "BMP") for size in (8, 48)]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for index in range(count):
        content = mutated(rng, rng.choice(files))
        path = "/render" if index % 20 == 0 else "/predict?masks=none"
        kind = rng.choice(("image/jpeg", "image/png", "image/x", "application/octet-stream"))
        if index % 2:
            head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.gif"\r\nContent-Type: text/html\r\n\r\n'
            content, kind = head + content + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"
        connection.request("POST", path, content, {"content-type": kind})
        answer = connection.getresponse()
        tally.take(f"image {index} of seed {number}", answer.status, answer.headers.get("content-type", ""), answer.read())
    return tally


def raw_requests() -> st.SearchStrategy[tuple[bytes, bool]]:
    """From noise to requests that are wrong in one place; and whether they end, so that an answer is due."""
    junk = st.one_of(st.binary(max_size=40), st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace")))
    url = st.sampled_from(
        [b"http://127.0.0.1:9/a.jpg", b"file:///etc/passwd", b'{"url":"http://127.0.0.1:9/"}', b"\x80\x04K\x01."]
    )
    methods = st.one_of(st.just(b"POST"), st.sampled_from([b"GET", b"HEAD", b"PUT", b"OPTIONS", b"post", b"DELETE", b"X-Y"]))
    known = st.sampled_from([b"/predict", b"/render", b"/info", b"/schema.json", b"/livez", b"/", b"/ui", b"/docs.json"])
    tails = st.sampled_from([b"", b"/", b"%0a", b"%00", b"%2f", b"/..", b"//", b";a", b"%ff", b"/submit", b"/%2e%2e/livez"])
    asciis = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20).map(str.encode)
    targets = st.one_of(st.tuples(known, tails).map(b"".join), known, asciis.map(lambda text: b"/" + text), junk)
    name = st.sampled_from([b"score_threshold", b"top_k", b"classes", b"masks", b"image", b"x"])
    value = st.sampled_from(
        [b"0.5", b"-1", b"nan", b"NaN", b"1e9", b"[1]", b"null", b"8", b"%ff", b"%00", b"9" * 400, b"{}", b"rle"]
    )
    fields = st.lists(st.tuples(name, st.just(b"="), value).map(b"".join), max_size=3).map(b"&".join)
    queries = st.one_of(st.just(b""), fields.map(lambda text: b"?" + text), asciis.map(lambda text: b"?" + text))
    parts = st.builds(
        lambda name, extra, body: b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name, extra, body),
        name, st.sampled_from([b"", b'; filename="a.jpg"', b"; filename", b"; filename*=x"]), st.one_of(value, url, junk),
    )  # fmt: skip
    forms = st.tuples(st.lists(parts, max_size=4).map(b"".join), st.sampled_from([b"--b--\r\n", b"--b--", b"", b"--b"])).map(
        b"".join
    )
    bodies = st.one_of(forms, junk, url)
    types = b"application/json application/vnd.bentoml+pickle multipart/form-data image/jpeg text/plain"
    kinds = st.one_of(st.just(b"multipart/form-data; boundary=b"), st.sampled_from(types.split()), junk)
    other = st.sampled_from(
        b"user-agent traceparent content-encoding authorization expect upgrade range transfer-encoding x-forwarded-for cookie "
        b"bentoml-payload-meta args-number".split()
    )
    others = st.lists(st.tuples(other, st.just(b": "), junk, st.just(b"\r\n")).map(b"".join), max_size=2).map(b"".join)

    def spelled(
        method: bytes, target: bytes, query: bytes, kind: bytes, more: bytes, body: bytes, lie: int
    ) -> tuple[bytes, bool]:
        length = b"" if lie == 1 else b"content-length: %d\r\n" % (len(body) + (lie == 2) * 7)
        if lie == 3:
            length, body = b"transfer-encoding: chunked\r\n", b"%x\r\n%s\r\n" % (len(body), body) * bool(body) + b"0\r\n\r\n"
        head = b"%s %s%s HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: %s\r\n" % (method, target, query, kind)
        return head + more + length + b"\r\n" + body, lie != 2

    lies = st.sampled_from([0, 0, 0, 0, 1, 2, 3, 3])
    noise = st.tuples(st.binary(max_size=100), st.just(False))
    whole = st.builds(spelled, methods, targets, queries, kinds, others, bodies, lies)
    return st.one_of(whole, whole, whole, whole, noise)


def exchanged(port: int, content: bytes, ends: bool) -> bytes:
    """What comes back until the server closes the connection; the client leaves it half-closed where no answer is due."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            connection.sendall(content)
            if not ends:
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                answer += chunk
        except (ConnectionError, TimeoutError):  # it closed before it had read all, or waits for more
            pass
    return answer


def by_raw_bytes(port: int, count: int, number: int) -> Tally:
    """Anything at all over a socket."""
    tally = Tally()

    @tried(count, number)
    @given(request=raw_requests())
    def send(request: tuple[bytes, bool]) -> None:
        content, ends = request
        head, _, body = exchanged(port, content, ends).partition(b"\r\n\r\n")
        status = int(head[9:12]) if head.startswith(b"HTTP/1.1 ") else NO_ANSWER
        kind = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-type:")), b"").decode("latin-1")
        if content.startswith(b"HEAD") or status == 403:  # a refused upgrade has no body
            kind, body = "", body or b"-"
        tally.take(repr(content)[:400], status, kind, body)
        if ends and status == NO_ANSWER:
            tally.unanswered += 1

    while sum(tally.statuses.values()) < count:
        send()
    return tally


@contextmanager
def served(folder: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Port and process of a server of the demo model."""
    environment = {**os.environ, "BENTOML_HOME": str(folder / "home"), "BENTOML_DO_NOT_TRACK": "True", "OMP_NUM_THREADS": "1"}
    (folder / "home").mkdir()
    save = "import bentoml\nfrom bentoml_detectron import demo\nbentoml.detectron.save_model('digits', demo.predictor())"
    subprocess.run([sys.executable, "-W", "ignore", "-c", save], env=environment, check=True, capture_output=True)
    (folder / "service.py").write_text(SERVICE)
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        port = each.getsockname()[1]
    with (folder / "server.log").open("w") as log:
        command = [str(BENTOML), "serve", "service:service", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_until_ready(port, folder / "server.log")
        yield port, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_ready(port: int, log: Path) -> None:
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"the server is not ready after two minutes: {log.read_text()[-2000:]}")


def workers(process: psutil.Process) -> set[tuple[int, float]]:
    return {(each.pid, each.create_time()) for each in process.children(recursive=True)}


def print_table(tallies: dict[str, Tally]) -> None:
    statuses = sorted({status for tally in tallies.values() for status in tally.statuses})
    names = ["closed" if status == NO_ANSWER else str(status) for status in statuses]
    print("| kind | requests |", " | ".join(names), "|")
    print("|" + "---|" * (len(names) + 2))
    for kind, tally in tallies.items():
        counts = " | ".join(str(tally.statuses[status]) for status in statuses)
        print(f"| {kind} | {sum(tally.statuses.values()):,} | {counts} |")
    print(f"whole requests without an answer: {sum(tally.unanswered for tally in tallies.values())}")
    print(f"total {sum(sum(tally.statuses.values()) for tally in tallies.values()):,}")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is ended too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    functions = {"schemathesis": by_schemathesis, "raw": by_raw_bytes, "images": by_images}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with served(folder) as (port, process):
            before, start = workers(process), time.monotonic()
            with ProcessPoolExecutor(len(functions)) as pool:
                running = {
                    kind: pool.submit(function, port, int(arguments.requests * SHARES[kind]), arguments.seed)
                    for kind, function in functions.items()
                }
                tallies = {kind: each.result() for kind, each in running.items()}
            ended, seconds = before - workers(process), time.monotonic() - start
        log = (folder / "server.log").read_text(errors="replace")
    print_table(tallies)
    tracebacks = log.count(TRACEBACK)
    print(f"seed {arguments.seed}, {seconds:.0f} seconds; processes ended: {len(ended)}; tracebacks in the log: {tracebacks}")
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    print("\n".join(faults))
    if tracebacks:
        print(log[max(0, log.index(TRACEBACK) - 500) :][:3000])
    sys.exit(bool(faults or ended or tracebacks))


if __name__ == "__main__":
    main()
