"""Run by test_dataset_crash.py: imports everything once, then forks a child for each run that the test wants to disturb.

Reads JSON objects, a line each, from standard input: the arguments of `write` ("source", "outputs" and "resume"), and "kill",
the number of the change to the file system at which the child is killed with SIGKILL, or "limit", the size in bytes at which
files are full. Prints the child's exit status, and what it said: its report, or its error and how many changes there were.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from bentoml_detectron import errors, save_model
from bentoml_detectron.dataset import Progress, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import built, tiny_cfg

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "tempfile.mkdtemp")


class Counted(Progress):
    images = 0

    def advance(self, images: int) -> None:
        self.images += images


def kill_at(number: int | None) -> list[int]:
    """Counts the process's changes to the file system, and kills it at one of them; gives the counter."""
    count, lock = [0], threading.Lock()

    def hook(event: str, arguments: tuple) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE):
            with lock:
                count[0] += 1
                if count[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def run(command: dict, said: int) -> None:
    progress = Counted()
    count = kill_at(command.get("kill"))
    if command.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["limit"], command["limit"]))
    try:
        report = write("crash", command["source"], command["outputs"], errors=command.get("errors"), chunk=2,
                       resume=command.get("resume", False), parquet_rows="image", progress=progress)  # fmt: skip
        answer = {"status": 0, **asdict(report), "run": progress.images, "changes": count[0]}
    except errors.DetectronError as exc:
        answer = {"status": 3, "kind": type(exc).__name__, "error": str(exc), "run": progress.images}
    except BaseException:
        answer = {"status": 4, "error": traceback.format_exc()}
    os.write(said, json.dumps(answer).encode())
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    cfg = tiny_cfg()
    save_model("crash", built(cfg), cfg)
    import pyarrow.parquet  # noqa: F401
    import supervision  # noqa: F401

    from bentoml_detectron import drawing, engines, predictor  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        read, said = os.pipe()
        pid = os.fork()
        if pid == 0:
            run(json.loads(line), said)
        os.close(said)
        with os.fdopen(read, "rb") as file:
            answer = file.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(answer.decode() if status == 0 else json.dumps({"status": status}), flush=True)


main()
