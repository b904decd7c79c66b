"""What control groups leave to a process: the files of both versions, and a real group where one can be made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bentoml_detectron import control_groups


@pytest.fixture
def tree(tmp_path):
    """A function that writes groups' files, and gives the file of memberships and the folder."""

    def write(memberships: str, groups: dict[str, dict[str, object]]) -> tuple[Path, Path]:
        root = tmp_path / "root"
        for name, files in groups.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            for file, content in files.items():
                (root / name / file).write_text(f"{content}\n")
        (tmp_path / "memberships").write_text(memberships)
        return tmp_path / "memberships", root

    return write


# Memory: the least that one of them leaves counts; pages that the system can take back are free.


def test_memory_of_version_2_has_the_limits_of_groups_above(tree):
    where = tree("0::/a.slice/b.service\n", {
        "": {"memory.stat": "inactive_file 3"},  # the top has no limit
        "a.slice": {"memory.max": 100, "memory.current": 60, "memory.stat": "anon 50\ninactive_file 10"},
        "a.slice/b.service": {"memory.max": "max", "memory.current": 20, "memory.stat": "inactive_file 1"},
    })  # fmt: skip
    assert [*control_groups.free_memory(*where)] == [50]


def test_memory_of_version_1_has_its_own_groups(tree):
    files = {"memory.limit_in_bytes": 70, "memory.usage_in_bytes": 40, "memory.stat": "total_inactive_file 5"}
    where = tree("5:cpu:/x\n4:memory:/docker/1\n", {"memory": files, "cpu/x": files})  # as in a container: not the host's path
    assert [*control_groups.free_memory(*where)] == [35]


# Cores


def test_cores_of_version_2_are_those_of_each_group_that_limits_them(tree):
    groups = {"a": {"cpu.max": "400000 100000"}, "a/b": {"cpu.max": "max 100000"}, "a/b/c": {"cpu.max": "150000 100000"}}
    assert sorted(control_groups.cores(*tree("0::/a/b/c\n", groups))) == [1.5, 4.0]


def test_cores_of_version_1_are_those_of_its_groups(tree):
    groups = {
        "cpu": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100_000},
        "cpu/x": {"cpu.cfs_quota_us": 250_000, "cpu.cfs_period_us": 100_000},
        "cpuset/x": {"cpu.cfs_quota_us": 100_000, "cpu.cfs_period_us": 100_000},
    }
    assert [*control_groups.cores(*tree("3:cpuset:/x\n2:cpu,cpuacct:/x\n", groups))] == [2.5]


@pytest.mark.parametrize("content", ["", "max", "1", "a b", "1 2 3", "0 100000", "100000 0"])
def test_what_is_no_limit_of_cores_limits_nothing(tree, content):
    assert [*control_groups.cores(*tree("0::/\n", {"": {"cpu.max": content}}))] == []


def test_without_groups_nothing_is_limited(tmp_path):
    assert [*control_groups.free_memory(tmp_path / "none", tmp_path)] == []
    assert [*control_groups.cores(tmp_path / "none", tmp_path)] == []


# A real group


@pytest.mark.slow
@pytest.mark.parametrize(("given", "due"), [({}, "1"), ({"OMP_NUM_THREADS": "2"}, "2")])
def test_a_command_has_as_many_threads_as_its_group_has_cores(one_core, given, due, tmp_path):
    code = (
        f"import os, pathlib; pathlib.Path({str(one_core / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
        "from bentoml_detectron.cli import detectron\n"
        "try:\n    detectron(['verify', 'nothing:here'])\n"
        "except SystemExit:\n    import torch; print(torch.get_num_threads())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"BENTOML_HOME": str(tmp_path), **given}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == [due], done.stderr
