"""What holds for every command, whichever there are: its help, the document made of it, its errors, and its completion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bentoml_detectron.cli import COMMANDS, detectron
from servers import BENTOML, environment
from support import run_python

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "tools" / "make_cli_docs.py"
commands = pytest.mark.parametrize("name", COMMANDS)


def command_of(name: str) -> click.Command:
    found = detectron.get_command(click.Context(detectron), name)
    assert found is not None
    return found


def failing(name: str) -> list[str]:
    """Arguments of which none exists: a tag, files, and paths to write to."""
    arguments = []
    for each in command_of(name).params:
        is_path = isinstance(each.type, click.Path)
        value = "no/such/path" if is_path else "nobody:latest"
        if isinstance(each, click.Option) and (each.required or is_path):
            arguments += [each.opts[0], value]
        elif isinstance(each, click.Argument) and each.required:
            arguments.append(value)
    return [name, *arguments]


RUN_ALL = """
import json, sys
from bentoml_cli.cli import cli
from click.testing import CliRunner

results = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(cli, ["detectron", *arguments], prog_name="bentoml")
    raised = None if isinstance(result.exception, SystemExit) else type(result.exception).__name__
    results.append([arguments, result.exit_code, result.stderr, raised])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[tuple[list[str], int, str, str | None]]:
    """Arguments, exit status, stderr and the exception that got out, of failures of each command.

    In one process, which imports PyTorch once; with --debug last, which holds for the rest of a process.
    """
    home = tmp_path_factory.mktemp("home")
    cases = [failing(name) for name in COMMANDS] + [[name, "--no-such-option"] for name in COMMANDS] + [["no-such-command"]]
    cases += [["--debug", *failing(name)] for name in COMMANDS]
    result = run_python(RUN_ALL, json.dumps(cases), BENTOML_HOME=str(home))
    return json.loads(result.stdout.splitlines()[-1])


def test_document_is_what_the_commands_print():
    result = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_a_stale_document_is_noticed(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "docs").mkdir()
    script = tmp_path / "tools" / SCRIPT.name
    script.write_text(SCRIPT.read_text())
    document = tmp_path / "docs" / "cli.md"
    document.write_text((ROOT / "docs" / "cli.md").read_text().replace("--help", "--hlep"))
    command = [sys.executable, str(script), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "is stale; run python tools/make_cli_docs.py" in result.stderr
    subprocess.run(command[:2], check=True, timeout=120)
    assert document.read_text() == (ROOT / "docs" / "cli.md").read_text()


@commands
def test_help_has_an_example_and_a_line_for_each_option(name):
    command = command_of(name)
    shown = command.get_help(click.Context(command, info_name=f"bentoml detectron {name}"))
    assert "Example" in shown
    assert f"  bentoml detectron {name} " in shown
    for each in command.params:
        if isinstance(each, click.Option):
            assert each.help, each.opts


@commands
def test_examples_have_only_options_that_there_are(name):
    command = command_of(name)
    known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    lines = (command.help or "").replace("\\\n", " ").splitlines()
    examples = [line.split() for line in lines if line.strip().startswith(f"bentoml detectron {name} ")]
    assert examples
    for words in examples:
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.slow
def test_errors_are_one_line_with_exit_status_1(results):
    plain = [each for each in results if each[0][0] != "--debug"]
    assert len(plain) == 2 * len(COMMANDS) + 1
    for arguments, status, said, raised in plain:
        assert (status, raised) == (1, None), (arguments, said)
        assert said.startswith("Error: "), (arguments, said)
        assert said.count("\n") == 1, (arguments, said)
        assert said.endswith("\n"), arguments


@pytest.mark.slow
def test_debug_shows_the_traceback(results, bentoml_home):
    """The exception reaches the interpreter, which prints it; one command shows that it does."""
    debugged = [each for each in results if each[0][0] == "--debug"]
    assert len(debugged) == len(COMMANDS)
    for arguments, status, _, raised in debugged:
        assert status == 1, arguments
        assert raised is not None, arguments
        assert raised.endswith("Error"), arguments
    command = [str(BENTOML), "detectron", "--debug", *failing("verify")]
    result = subprocess.run(command, env=environment(bentoml_home), capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ModelNotFoundError" in result.stderr


class Failing(type(detectron)):
    """The real group, with a command that has a fault."""

    def get_command(self, ctx, cmd_name):
        return click.Command(cmd_name, callback=lambda: {}["nothing"])


def test_an_error_that_nobody_foresaw_is_one_line_too():
    result = CliRunner().invoke(Failing("detectron"), ["verify"])
    assert result.exit_code == 1
    assert result.stderr == "Error: KeyError: 'nothing'; 'bentoml detectron --debug ...' shows where\n"


def completed(home: Path, typed: str) -> set[str]:
    """What bash offers for a line, by BentoML's own script for it."""
    words = typed.split(" ")
    script = f"""
    eval "$(_BENTOML_COMPLETE=bash_source bentoml)"
    COMP_WORDS=({" ".join(words[:-1])} "{words[-1]}")
    COMP_CWORD={len(words) - 1}
    _bentoml_completion bentoml
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{BENTOML.parent}:/usr/bin:/bin"
    result = subprocess.run(
        ["bash", "-c", script], env=environment(home, PATH=path), capture_output=True, text=True, check=True, timeout=120
    )
    return set(result.stdout.split())


@pytest.mark.slow
def test_bash_completes_commands_options_and_choices(bentoml_home):
    assert completed(bentoml_home, "bentoml detectron ") == set(COMMANDS)
    assert completed(bentoml_home, "bentoml detectron save --we") == {"--weights"}
    assert completed(bentoml_home, "bentoml detectron serve --precision ") == {"fp32", "bf16", "fp16", "int8", "auto"}


@pytest.mark.slow
def test_the_shell_completes_the_options_of_every_command(bentoml_home):
    code = (
        "import sys, json\nfrom bentoml_cli.cli import cli\nfrom click.shell_completion import BashComplete\n"
        "complete = BashComplete(cli, {}, 'bentoml', '_BENTOML_COMPLETE')\n"
        "print(json.dumps({name: [each.value for each in complete.get_completions(['detectron', name], '--')]"
        " for name in json.loads(sys.argv[1])}))"
    )
    result = run_python(code, json.dumps(COMMANDS), BENTOML_HOME=str(bentoml_home))
    offered = json.loads(result.stdout.splitlines()[-1])
    for name in COMMANDS:
        due = {each.opts[0] for each in command_of(name).params if isinstance(each, click.Option)}
        assert due <= set(offered[name]), name
