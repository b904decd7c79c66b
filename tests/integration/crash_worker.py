"""Run by test_crash.py: imports everything once, then forks a child for each save that the test wants to disturb.

Reads lines from standard input: ``paused NAME`` forks a child that stops itself before it saves; ``storm P N`` forks P children
that save N times each, at once. Prints a child's process id, and its exit status once it ended: 0 saved, 3 refused with one of
this package's errors, 4 anything else.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import bentoml
from detectron2.modeling import build_model

from bentoml_detectron import errors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import small_cfg


def save(module, cfg, name: str = "crash") -> None:
    bentoml.detectron.save_model(name, module, cfg)


def child(module, cfg, count: int, pause: bool, name: str) -> None:
    if pause:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        for _ in range(count):
            save(module, cfg, name)
    except errors.DetectronError:
        traceback.print_exc()
        os._exit(3)
    except BaseException:
        traceback.print_exc()
        os._exit(4)
    os._exit(0)


def fork(*arguments) -> int:
    pid = os.fork()
    if pid == 0:
        child(*arguments)
    return pid


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    cfg = small_cfg()
    module = build_model(cfg).eval()
    save(module, cfg)  # whatever is imported late is imported now
    print("ready", flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "paused":
            pid = fork(module, cfg, 1, True, *numbers)
            os.waitpid(pid, os.WUNTRACED)
            print(pid, flush=True)
            print(status(pid), flush=True)
        else:
            processes, saves = map(int, numbers)
            pids = [fork(module, cfg, saves, False, "crash") for _ in range(processes)]
            print(" ".join(str(status(pid)) for pid in pids), flush=True)


main()
