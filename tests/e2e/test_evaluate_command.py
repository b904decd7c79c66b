"""``bentoml detectron evaluate``, as a user calls it: a model in this process and behind HTTP, and two against each other."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import termios
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from bentoml_detectron import Detections, demo, evaluate, load_predictor, save_model
from bentoml_detectron.errors import ImageError, InvalidArgumentError
from bentoml_detectron.evaluation.average_precision import KINDS
from bentoml_detectron.remote import Remote
from coco import by_faster
from servers import BENTOML, environment, free_port, served
from support import run_python

pytestmark = pytest.mark.slow
IMAGES = demo.images()[0].parent
ANNOTATIONS = IMAGES.parent / "annotations.json"
ON_DEMO = ("--annotations", str(ANNOTATIONS), "--images", str(IMAGES))
# Few requests wait, so that clients with several connections are refused now and then.
SMALL_QUEUE = ("detectron", "serve", "digits", "--max-queue", "2")


def ran(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BENTOML), "detectron", "evaluate", *arguments],
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def report(home: Path, *arguments: str, **more: str) -> dict:
    result = ran(home, *arguments, "--json", "-", **more)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def failed(home: Path, *arguments: str, **more: str) -> str:
    """The last line of what the command says where it measures nothing; PyTorch may warn before."""
    result = ran(home, *arguments, **more)
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def server(digits_home, tmp_path_factory):
    with served(tmp_path_factory.mktemp("server"), digits_home, *SMALL_QUEUE, BENTOML_DETECTRON_TOKEN="secret") as each:
        yield each


@pytest.fixture(scope="module")
def in_process(digits_home):
    return report(digits_home, "digits", *ON_DEMO)


@pytest.fixture(scope="module")
def exact(store):
    """The demo model in this process, each image on its own: what it finds on the sample images, by id."""
    saved = save_model("digits-evaluated", demo.predictor())
    ids = {each["file_name"]: each["id"] for each in demo.ground_truth()["images"]}
    found = load_predictor(saved, batch="exact")(demo.images())
    return {ids[path.name]: each for path, each in zip(demo.images(), found, strict=True)}


def test_average_precision_on_the_demos_images_is_that_of_both_of_cocos_tools(exact):
    truth = demo.ground_truth()
    names = {each["name"]: each["id"] for each in truth["categories"]}
    for name, task in evaluate(exact, truth, thing_classes=demo.CLASSES).tasks.items():
        stats, of_classes = by_faster(truth, exact, KINDS[name], names)
        assert 0.6 < task.metrics["AP"] < 0.8
        due = np.where(stats[:12] < 0, np.nan, stats[:12])
        assert list(task.metrics.values()) == pytest.approx(due, abs=1e-12, nan_ok=True)
        assert task.per_class[:, 0] == pytest.approx(of_classes, abs=1e-12)


def test_over_http_the_same_is_found_to_the_last_bit_one_by_one(server, exact):
    with Remote(server.url, token="secret", connections=1) as service:
        found = list(service.predict(demo.images()))
    assert found == list(exact.values())


def test_over_http_average_precision_is_the_same_to_the_fourth_decimal(server, digits_home, in_process):
    served_now = report(digits_home, "digits", "--url", server.url, *ON_DEMO, BENTOML_DETECTRON_TOKEN="secret")
    assert served_now["model"] == f"{in_process['model']} at {server.url}"
    for task, due in in_process["tasks"].items():
        for metric, value in due["metrics"].items():
            assert served_now["tasks"][task]["metrics"][metric] == pytest.approx(value, abs=5e-5, nan_ok=True), (task, metric)
    assert set(in_process["tasks"]) == {"box", "mask"}


def test_refusals_are_waited_for_and_the_order_is_kept(server, exact):
    before = server.metrics()
    with Remote(server.url, token="secret", connections=8) as service:
        found = list(service.predict(demo.images()))
    assert [len(each) for each in found] == [len(each) for each in exact.values()]
    for one, due in zip(found, exact.values(), strict=True):
        assert one.boxes == pytest.approx(due.boxes, abs=0.05)
        assert one.scores == pytest.approx(due.scores, abs=1e-3)
    refused = [value - before.get(name, 0) for name, value in server.metrics().items() if "refus" in name and "_total" in name]
    assert sum(refused) > 0


def test_a_report_has_classes_and_counts(in_process):
    assert in_process["images"] == 20
    assert in_process["annotations"] == str(ANNOTATIONS)
    box = in_process["tasks"]["box"]
    assert list(box["classes"]) == list(demo.CLASSES)
    assert list(box["classes"]["0"]) == ["AP", "AP50", "AP75", "AR", "instances"]
    assert sum(each["instances"] for each in box["classes"].values()) == len(demo.ground_truth()["annotations"])
    assert np.mean([each["AP"] for each in box["classes"].values()]) == pytest.approx(box["metrics"]["AP"])


def test_without_json_there_are_tables_of_plain_text(digits_home, tmp_path, in_process):
    result = ran(digits_home, "digits", *ON_DEMO, "--json", str(tmp_path / "report.json"), "--classes", "4")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{in_process['model']} on {ANNOTATIONS}"
    four = in_process["tasks"]["box"]["classes"]["4"]
    at = lines.index("box, by class")
    assert lines[at + 1].split() == ["class", "AP", "AP50", "AP75", "AR", "instances"]
    assert lines[at + 2].split() == ["4", *(f"{four[name]:.4f}" for name in ("AP", "AP50", "AP75", "AR")), "9"]
    assert "\x1b" not in result.stdout
    written = json.loads((tmp_path / "report.json").read_text())["tasks"]["box"]["classes"]
    assert list(written) == ["4"]
    assert written["4"] == pytest.approx(four)


def test_two_models_are_compared_on_the_same_images(digits_home, in_process):
    same = report(digits_home, "digits", "--compare", "digits", *ON_DEMO, "--resamples", "50")["comparison"]
    assert same["with"]["tasks"] == in_process["tasks"]
    assert (same["resamples"], same["seed"], same["confidence"]) == (50, 0, 0.95)
    for task in same["tasks"].values():
        assert {number for each in task["metrics"].values() for number in each.values()} == {0.0}


def test_a_precision_is_said_where_it_is_not_fp32(digits_home, in_process):
    result = ran(digits_home, "digits", "--precision", "auto", "--compare", "digits", *ON_DEMO, "--resamples", "1")
    assert result.returncode == 0, result.stderr
    tag = in_process["model"]
    assert result.stdout.splitlines()[0] == f"{tag} in auto against {tag} on {ANNOTATIONS}"


def test_a_worse_model_is_told_apart(digits_home, tmp_path, bentoml_home):
    run_python(
        "import bentoml, torch\n"
        "from bentoml_detectron import demo\n"
        "predictor = demo.predictor()\n"
        "bentoml.detectron.save_model('good', predictor)\n"
        "torch.manual_seed(0)\n"
        "weights = predictor.model.roi_heads.box_predictor.bbox_pred.weight\n"
        "weights.data += 0.02 * torch.randn_like(weights)\n"
        "bentoml.detectron.save_model('worse', predictor)\n",
        BENTOML_HOME=str(bentoml_home),
    )
    result = ran(bentoml_home, "good", "--compare", "worse", *ON_DEMO, "--json", str(tmp_path / "both.json"))
    assert result.returncode == 0, result.stderr
    box = json.loads((tmp_path / "both.json").read_text())["comparison"]["tasks"]["box"]["metrics"]["AP"]
    assert 0 < box["low"] < box["value"] < box["high"]
    (line,) = [each for each in result.stdout.splitlines() if each.startswith("all AP ")][:1]
    assert line.split() == ["all", "AP", *(f"{box[name]:+.4f}" for name in ("value", "low", "high")), "yes"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (ON_DEMO, "Error: there is nothing to evaluate; give the TAG of a saved model, or the --url of a service"),
        (("nobody", *ON_DEMO), "Error: no Models with name 'nobody'"),
        (("digits", "--annotations", "none.json", "--images", str(IMAGES)), "Error: cannot read none.json (No such file"),
        (("digits", "--annotations", str(ANNOTATIONS), "--images", "none"), "Error: none is not a folder; give the folder"),
        (("digits", *ON_DEMO, "--json", "/none/a.json"), "Error: there is no folder /none; give another --json"),
        (("digits", *ON_DEMO, "--json", "/dev"), "Error: /dev is a folder; give another --json"),
        (("digits", *ON_DEMO, "--compare", "none"), "Error: no Models with name 'none' exist"),
        (("digits", *ON_DEMO, "--classes", "ten"), "Error: annotations.json has no class 'ten'; it has 0, 1, 2 and 7 more"),
        (("digits", *ON_DEMO, "--keypoint-sigmas", "a"), "Error: --keypoint-sigmas is 'a'; give numbers separated by commas"),
        (("--url", "here", *ON_DEMO), "Error: 'here' is not the URL of a service; give one, as http://127.0.0.1:3000"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_with_the_cure(arguments, said, digits_home):
    result = ran(digits_home, *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


def test_what_was_measured_is_shown_also_where_the_report_cannot_be_written(digits_home, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")  # no UTF-8
    folder.mkdir()
    (folder / "annotations.json").write_bytes(ANNOTATIONS.read_bytes())
    where = ("--annotations", str(folder / "annotations.json"), "--images", str(IMAGES), "--classes", "4")
    result = ran(digits_home, "digits", *where, "--json", "/dev/full")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "Error: cannot write /dev/full (No space left on device); give another --json"
    assert "AP50" in result.stdout
    assert "caf\ufffd" in result.stdout


def on_terminal(home: Path, columns: int, *arguments: str) -> str:
    """What the command shows on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [str(BENTOML), "detectron", "evaluate", *arguments]
    process = subprocess.Popen(command, env=environment(home, TERM="xterm"), stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the other end is closed
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait(300) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())


def save_named(home: Path, tag: str, names: list[str]) -> None:
    """Saves the demo model with other names of its classes."""
    run_python(
        "import bentoml, json, sys\n"
        "from bentoml_detectron import demo\n"
        "from detectron2.data import MetadataCatalog\n"
        "predictor = demo.predictor()\n"
        "MetadataCatalog.pop(demo.DATASET)\n"
        "MetadataCatalog.get(demo.DATASET).set(thing_classes=json.loads(sys.argv[2]))\n"
        "bentoml.detectron.save_model(sys.argv[1], predictor)\n",
        tag,
        json.dumps(names),
        BENTOML_HOME=str(home),
    )


def renamed(folder: Path, name: str) -> str:
    """The demo's annotations with another name of its 4."""
    truth = copy.deepcopy(demo.ground_truth())
    truth["categories"][4]["name"] = name
    (folder / "renamed.json").write_text(json.dumps(truth))
    return str(folder / "renamed.json")


def test_on_a_narrow_terminal_no_number_is_cut_and_no_name_is_taken_for_a_style(bentoml_home, tmp_path):
    name = "nut [/M8] of some taxonomic database, [red] as those of biologists are, [big]"
    save_named(bentoml_home, "named", [*demo.CLASSES[:4], name, *demo.CLASSES[5:]])
    where = ("--annotations", renamed(tmp_path, name), "--images", str(IMAGES), "--json", str(tmp_path / "report.json"))
    shown = on_terminal(bentoml_home, 60, "named", *where)
    found = json.loads((tmp_path / "report.json").read_text())["tasks"]["box"]
    for value in (*found["metrics"].values(), *found["classes"][name].values()):
        assert (f"{value:.4f}" if isinstance(value, float) else str(value or "-")) in shown
    assert name.replace(" ", "") in "".join(line[:30].strip().replace(" ", "") for line in shown.splitlines())
    assert "\u2026" not in shown


def test_a_report_is_written_also_where_nobody_reads_the_tables(digits_home, tmp_path):
    command = [str(BENTOML), "detectron", "evaluate", "digits", *ON_DEMO, "--json", str(tmp_path / "report.json")]
    ours, theirs = os.pipe()
    os.close(ours)
    result = subprocess.run(
        command, env=environment(digits_home), stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=300, check=False
    )
    os.close(theirs)
    assert result.returncode == 1
    assert "BrokenPipe" not in result.stderr
    assert json.loads((tmp_path / "report.json").read_text())["images"] == 20


def test_both_models_names_are_looked_at_before_one_of_them_runs(digits_home, tmp_path, bentoml_home):
    shutil.copytree(digits_home, bentoml_home, dirs_exist_ok=True)
    save_named(bentoml_home, "letters:1", list("abcdefghij"))
    for path in demo.images():
        (tmp_path / path.name).write_bytes(b"no image, as whoever looks at it finds")
    where = ("--annotations", str(ANNOTATIONS), "--images", str(tmp_path))
    said = failed(bentoml_home, "digits", "--compare", "letters:1", *where)
    assert said.startswith("Error: letters:1: the model has no class '0', '1', '2' and 7 more of annotations.json")


def test_what_only_one_of_two_models_finds_is_noted(digits_home, tmp_path, bentoml_home):
    shutil.copytree(digits_home, bentoml_home, dirs_exist_ok=True)
    run_python(
        "import bentoml\n"
        "from bentoml_detectron import demo\n"
        "from detectron2.engine import DefaultPredictor\n"
        "cfg = demo.config()\n"
        "cfg.MODEL.MASK_ON = False\n"
        "bentoml.detectron.save_model('boxes', DefaultPredictor(cfg))\n",
        BENTOML_HOME=str(bentoml_home),
    )
    for tag, other in (("digits", "boxes"), ("boxes", "digits")):
        result = ran(bentoml_home, tag, "--compare", other, *ON_DEMO, "--resamples", "20")
        assert result.returncode == 0, result.stderr
        assert "note: mask is not compared: only one of the two models has it" in result.stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--trust-remote-code"], "--trust-remote-code"),
        (["--device", "cpu", "--precision", "bf16", "--compare", "digits"], "--precision"),
    ],
)
def test_what_says_how_a_model_runs_here_is_not_for_a_service(options, refused, digits_home, server):
    said = failed(digits_home, "--url", server.url, *ON_DEMO, *options, BENTOML_DETECTRON_TOKEN="secret")
    assert said == f"Error: {refused} has no effect on a service that is already running; remove it"


def test_an_image_that_cannot_be_read_is_named(digits_home, tmp_path, server):
    for path in demo.images():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "digits_07.jpg").write_bytes(demo.images()[7].read_bytes()[:900])
    arguments = ("--annotations", str(ANNOTATIONS), "--images", str(tmp_path))
    assert failed(digits_home, "digits", *arguments).startswith(f"Error: {tmp_path}/digits_07.jpg: it is cut short or damaged")
    remote = failed(digits_home, "--url", server.url, *arguments, BENTOML_DETECTRON_TOKEN="secret")
    assert remote.startswith(f"Error: {tmp_path}/digits_07.jpg: the service answered 400, it is cut short or damaged")
    (tmp_path / "digits_07.jpg").unlink()
    (tmp_path / "digits_08.jpg").unlink()
    missing = failed(digits_home, "digits", *arguments)
    assert missing.startswith("Error: digits_07.jpg, digits_08.jpg of annotations.json are not in ")


def test_names_that_the_model_lacks_are_an_error(digits_home, tmp_path):
    truth = copy.deepcopy(demo.ground_truth())
    truth["categories"][3]["name"] = "three"
    (tmp_path / "renamed.json").write_text(json.dumps(truth))
    said = failed(digits_home, "digits", "--annotations", str(tmp_path / "renamed.json"), "--images", str(IMAGES))
    tag = "digits:" + said.partition("digits:")[2].partition(":")[0]
    message = f"Error: {tag}: the model has no class 'three' of renamed.json; it has 0, 1, 2 and 7 more. Use the same names"
    assert said.startswith(message)


def test_a_service_that_is_not_there_or_wants_a_token_is_one_line(digits_home, server):
    url = f"http://127.0.0.1:{free_port()}"
    result = ran(digits_home, "--url", url, *ON_DEMO)
    assert result.stderr.startswith(f"Error: nothing answers at {url} (")
    assert result.stderr.count("\n") == 1
    wrong = ran(digits_home, "--url", server.url, *ON_DEMO, BENTOML_DETECTRON_TOKEN="another")
    assert wrong.stderr == f"Error: {server.url} requires a different token: set BENTOML_DETECTRON_TOKEN, or pass token=\n"
    assert "another" not in ran(digits_home, "--url", server.url, *ON_DEMO, BENTOML_DETECTRON_TOKEN="anoth\u00e9r").stdout


def test_the_token_of_a_client_is_the_services():
    from bentoml_detectron import remote, service

    assert remote.TOKEN_VARIABLE == service.TOKEN_VARIABLE


def test_a_remote_says_what_its_service_is_and_names_files(server, tmp_path):
    assert httpx.get(f"{server.url}/info").status_code == 401
    with Remote(server.url, token="secret") as service:
        assert service.info()["thing_classes"] == list(demo.CLASSES)
        with pytest.raises(ImageError, match=r"cannot read .*none\.jpg \(No such file or directory\)"):
            list(service.predict([demo.images()[0], tmp_path / "none.jpg"]))
    with Remote(f"{server.url}/elsewhere", token="secret") as service, pytest.raises(InvalidArgumentError, match="status 404"):
        service.info()
    with Remote(server.url, token="secret") as service:
        assert len(next(service.predict([str(demo.images()[0])]))) > 0
    for unsendable in ("secret\n", "sec\tret", "secr\u00e9t", " secret"):
        with pytest.raises(InvalidArgumentError, match="cannot be sent in a header") as error:
            Remote(server.url, token=unsendable)
        assert "sec" not in str(error.value)
    for wrong in ({"url": "ftp://x"}, {"url": server.url, "connections": 0}, {"url": server.url, "patience": 0}):
        with pytest.raises(InvalidArgumentError, match=r"give one, as|must be at least"):
            Remote(**wrong)


def test_a_picture_with_nothing_on_it_has_no_detections(server, tmp_path):
    Image.fromarray(np.full((192, 192, 3), 127, np.uint8)).save(tmp_path / "grey.png")
    with Remote(server.url, token="secret") as service:
        (found,) = service.predict([tmp_path / "grey.png"])
    assert isinstance(found, Detections)
    assert found.image_size == (192, 192)
