"""Whole datasets through the demo model: what is written is what `Predictor` finds, in order, and nothing is lost."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
from pathlib import Path

import bentoml
import numpy as np
import orjson
import pytest
import torch
from PIL import Image

import bentoml_detectron
from bentoml_detectron import Limits, Prediction, Predictor, demo, draw, errors, load_predictor, predict, save_model
from bentoml_detectron.dataset import Failure, Progress, formats, write

CHUNK = 4


@pytest.fixture(scope="module", autouse=True)
def saved(store):
    return save_model("dataset-digits", demo.predictor())


@pytest.fixture(scope="module")
def predictor(saved):
    # Small batches, so that few images fill some.
    return load_predictor(saved, max_batch_pixels=2 * 192 * 192)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Ten images of three shapes in turn, in three formats."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, path in enumerate(demo.images()[:10]):
        image = Image.open(path).crop([(0, 0, 192, 192), (0, 0, 192, 120), (10, 0, 140, 192)][number % 3])
        image.save(folder / f"{number}.{['jpg', 'png', 'webp'][number % 3]}")
    return folder


@pytest.fixture(scope="module")
def due(mixed, predictor) -> list[Prediction]:
    """What `Predictor` finds on them, a chunk of images a call."""
    paths = sorted(map(str, mixed.iterdir()))
    found = [each for start in range(0, len(paths), CHUNK) for each in predictor(paths[start : start + CHUNK])]
    return [Prediction(path, position, each) for position, (path, each) in enumerate(zip(paths, found, strict=True), 1)]


def test_predict_gives_what_the_predictor_finds_in_order(mixed, predictor, due):
    assert sum(len(each.detections) for each in due) > 20
    assert list(predict(predictor, mixed, chunk=CHUNK)) == due
    assert bentoml_detectron.predict is predict


def test_options_are_those_of_the_predictor(mixed, predictor):
    options = {"score_threshold": 0.5, "classes": ["4", 7], "top_k": 2}
    found = [each.detections for each in predict(predictor, mixed, chunk=CHUNK, **options)]
    paths = sorted(map(str, mixed.iterdir()))
    assert found == [each for start in range(0, 10, CHUNK) for each in predictor(paths[start : start + CHUNK], **options)]
    with pytest.raises(errors.InvalidArgumentError, match="no class 'nine'"):
        predict(predictor, mixed, classes=["nine"])
    with pytest.raises(errors.InvalidArgumentError, match="chunk is 0"):
        predict(predictor, mixed, chunk=0)
    with pytest.raises(errors.InvalidArgumentError, match="already has a device, a precision and limits"):
        predict(predictor, mixed, precision="bf16")
    with pytest.raises(errors.InvalidArgumentError, match="its code is loaded"):
        predict(predictor, mixed, trusted=["my_package"])


def test_annotations_of_images_elsewhere_are_an_error_and_no_empty_result(tmp_path, saved, predictor):
    truth = demo.ground_truth()
    (tmp_path / "truth.json").write_bytes(orjson.dumps(truth))
    due = (
        r"none of the first 20 images of '\S+' is there, as '\S+'; give the folder that their names start from by --image-root"
    )
    with pytest.raises(errors.InvalidArgumentError, match=due):
        next(predict(predictor, tmp_path / "truth.json"))
    with pytest.raises(errors.InvalidArgumentError, match=due):
        write(saved, tmp_path / "truth.json", tmp_path / "found.json")
    assert [each.name for each in tmp_path.iterdir()] == ["truth.json"]


@pytest.mark.parametrize("model", [None, 7])
def test_what_is_no_model_is_refused(model, tmp_path, mixed):
    with pytest.raises(errors.InvalidArgumentError, match=str(model)):
        write(model, mixed, tmp_path / "found.json")


def test_predict_is_lazy_over_an_endless_source(predictor):
    taken = []

    def endless():
        for path in itertools.cycle(demo.images()):
            taken.append(path)
            yield path

    results = predict(predictor, endless(), chunk=2)
    assert taken == []
    found = list(itertools.islice(results, 3))
    assert [each.image_id for each in found] == [1, 2, 3]
    assert len(taken) < 40  # and not all
    results.close()


def test_error_is_raised_or_handed_over_in_order(tmp_path, predictor):
    good = demo.images()[0]
    (tmp_path / "bad.jpg").write_bytes(good.read_bytes()[:3000])
    source = [good, tmp_path / "bad.jpg", good]
    results = predict(predictor, source)
    assert next(results).image_id == 1
    with pytest.raises(errors.DamagedImageError, match=rf"^{tmp_path}/bad\.jpg: it is cut short") as caught:
        next(results)
    assert caught.value.value == str(tmp_path / "bad.jpg")
    failures: list[Failure] = []
    assert [each.image_id for each in predict(predictor, source, on_error=failures.append)] == [1, 3]
    assert [(each.file_name, each.image_id) for each in failures] == [(str(tmp_path / "bad.jpg"), 2)]
    assert failures[0].reason.startswith("it is cut short or damaged")


def test_image_on_which_the_model_fails_takes_no_other_along(tmp_path, predictor):
    model = demo.predictor().model

    def fail_on_black(module, inputs):
        if (inputs[0].flatten(1).std(1) < 1e-6).any():
            raise RuntimeError("not\nthis one")

    model.backbone.register_forward_pre_hook(fail_on_black)
    failing = Predictor(model, predictor.input, predictor.dataset)
    Image.new("L", (192, 192)).save(tmp_path / "black.png")
    failures: list[Failure] = []
    source = [demo.images()[0], tmp_path / "black.png", demo.images()[1]]
    assert [each.image_id for each in predict(failing, source, on_error=failures.append)] == [1, 3]
    assert [each.reason for each in failures] == ["the model failed: RuntimeError: not this one"]


class Breaking(Predictor):
    """Fails on all images from some on, as where its GPU has met an error."""

    def __init__(self, predictor: Predictor, good: int) -> None:
        super().__init__(predictor.model, predictor.input, predictor.dataset)
        self.left = good

    def run(self, group, *arguments):
        if self.left < len(group):
            self.left = 0
            raise RuntimeError("CUDA error:\nunspecified launch failure")
        self.left -= len(group)
        return super().run(group, *arguments)


@pytest.mark.parametrize(("good", "due"), [(7, 7), (0, 0)])
def test_model_that_works_no_more_ends_the_run_and_is_no_fault_of_the_images(predictor, good, due):
    failures: list[Failure] = []
    found = []
    with pytest.raises(
        errors.DetectronError, match=r"^the model stopped working \(RuntimeError: CUDA error: unspecified launch"
    ):
        found += predict(Breaking(predictor, good), itertools.cycle(demo.images()), chunk=1, on_error=failures.append)
    assert len(found) == due
    assert len(failures) == (0 if due else 19)


def test_machine_that_can_read_no_file_any_more_ends_the_run(tmp_path, predictor):
    failures: list[Failure] = []
    results = predict(predictor, itertools.cycle(demo.images()), chunk=1, on_error=failures.append)
    next(results)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        with pytest.raises(
            errors.DetectronError, match=r"cannot open '.*\.jpg' \(Too many open files\); finished work is kept"
        ):
            list(results)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert failures == []


@pytest.mark.parametrize("kind", ["annotations", "parquet"])
def test_run_whose_storage_is_gone_goes_on_when_it_is_back(tmp_path, saved, kind):
    mounted = tmp_path / "mounted"
    names = [f"{number}/{image.name}" for number in range(25) for image in demo.images()[:4]]
    for name, image in zip(names, itertools.cycle(demo.images()[:4])):
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, mounted / name)
    if kind == "parquet":
        source = [parquet_of(mounted / str(number), mounted / f"{number}.parquet") for number in range(25)]
    else:
        source = tmp_path / "annotations.json"
        source.write_bytes(orjson.dumps({"images": [{"id": each, "file_name": each} for each in ["never.jpg", *names]]}))

    class Unmounts(Progress):
        def advance(self, images: int) -> None:
            if mounted.exists():
                mounted.rename(tmp_path / "unmounted")

    run = (saved, source, tmp_path / "found.jsonl")
    with pytest.raises(errors.DetectronError, match=rf"'{mounted}/\S+', which was read before, is gone; finished work is kept"):
        write(*run, image_root=mounted, chunk=2, progress=Unmounts())
    (tmp_path / "unmounted").rename(mounted)
    report = write(*run, image_root=mounted, chunk=2, resume=True)
    assert report.resumed >= 1
    assert report.failures == (25 if kind == "parquet" else 1)  # rows without an image, and what was never there


def test_run_whose_model_works_no_more_goes_on_where_it_was(tmp_path, saved, mixed, monkeypatch):
    load = bentoml_detectron.store.load_predictor
    with monkeypatch.context() as patch:
        patch.setattr("bentoml_detectron.store.load_predictor", lambda *given, **named: Breaking(load(*given, **named), 5))
        with pytest.raises(errors.DetectronError, match=r"the model stopped working.*continue with --resume"):
            write(saved, mixed, tmp_path / "found.jsonl", chunk=2)
    assert write(saved, mixed, tmp_path / "found.jsonl", chunk=2, resume=True).resumed >= 2
    write(saved, mixed, tmp_path / "whole.jsonl", chunk=2)
    assert (tmp_path / "found.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def parquet_of(folder: Path, path: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"file_name": each.name, "image": each.read_bytes()} for each in sorted(folder.iterdir())]
    parquet.write_table(pa.Table.from_pylist([*rows, {"file_name": "none", "image": None}]), path, row_group_size=3)
    return path


def test_parquet_gives_what_its_images_give(tmp_path, mixed, predictor, due):
    path = parquet_of(mixed, tmp_path / "images.parquet")
    failures: list[Failure] = []
    found = list(predict(predictor, path, chunk=CHUNK, on_error=failures.append))
    assert [each.detections for each in found] == [each.detections for each in due]
    assert [each.file_name for each in found] == [Path(each.file_name).name for each in due]
    assert [(each.file_name, each.reason) for each in failures] == [("none", "its row holds no image")]


class Told(Progress):
    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []
        self.images = 0
        self.failures: list[str] = []

    def start(self, total: int, done: int) -> None:
        self.started.append((total, done))

    def advance(self, images: int) -> None:
        self.images += images

    def failed(self, message: str) -> None:
        self.failures.append(message)


def test_all_formats_at_once_hold_what_predict_gives(tmp_path, mixed, saved):
    from pyarrow import parquet

    source = [mixed, tmp_path / "bad.jpg"]
    (tmp_path / "bad.jpg").write_text("no picture")
    failures: list[Failure] = []
    due = list(predict(saved, source, chunk=CHUNK, on_error=failures.append))
    outputs = [tmp_path / each for each in ("found.json", "found.jsonl", "found.parquet", "pictures")]
    told = Told()
    report = write(saved.tag, source, outputs, errors=tmp_path / "bad.jsonl", chunk=CHUNK, progress=told)
    assert (report.images, report.failures, report.resumed) == (11, 1, 0)
    assert 0 < report.busy <= 1
    assert (told.started, told.images) == ([(11, 0)], 11)
    assert told.failures == [f"{tmp_path / 'bad.jpg'}: it is text; only JPEG, PNG, WebP and BMP are supported"]
    rows = [row for each in due for row in each.detections.to_coco(each.image_id)]
    assert orjson.loads(outputs[0].read_bytes()) == rows
    assert [Prediction.from_json(line) for line in outputs[1].read_bytes().splitlines()] == due
    table = parquet.read_table(outputs[2])
    assert table["score"].to_pylist() == [score for each in due for score in each.detections.scores.tolist()]
    pictures = sorted(outputs[3].iterdir())
    assert [each.name for each in pictures] == [formats.picture_name(each, each.image_id) for each in due]
    drawn = draw(due[1].file_name, due[1].detections)[:, :, ::-1]
    assert np.abs(np.asarray(Image.open(pictures[1])).astype(int) - drawn).mean() < 5
    (failure,) = map(orjson.loads, (tmp_path / "bad.jsonl").read_bytes().splitlines())
    assert failure == {"file_name": str(tmp_path / "bad.jpg"), "image_id": 11, "reason": failures[0].reason}
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        ["bad.jpg", "bad.jsonl", "found.json", "found.jsonl", "found.parquet", "pictures"]
    )


def test_coco_results_of_an_annotation_file_have_its_ids_and_load(tmp_path, saved):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = demo.ground_truth()
    for category in truth["categories"]:
        category["id"] += 100
    for each in truth["annotations"]:
        each["category_id"] += 100
    for image in truth["images"]:
        image["id"] = 1000 - image["id"]
    for each in truth["annotations"]:
        each["image_id"] = 1000 - each["image_id"]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    write(saved, tmp_path / "truth.json", tmp_path / "found.json", image_root=demo.images()[0].parent)
    read = COCO(tmp_path / "truth.json")
    evaluation = COCOeval(read, read.loadRes(str(tmp_path / "found.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] > 0.6


def test_classes_without_a_category_are_told(tmp_path, saved):
    truth = {**demo.ground_truth(), "annotations": []}
    root = demo.images()[0].parent
    truth["categories"] = [{"id": 7, "name": "0"}, {"id": 3, "name": "1"}]
    (tmp_path / "truth.json").write_text(json.dumps({**truth, "images": truth["images"][:2]}))
    with pytest.raises(
        errors.InvalidArgumentError, match=r"no category for [^;]*, and uses the ids of these classes for others"
    ):
        write(saved, tmp_path / "truth.json", tmp_path / "found.json", image_root=root)
    assert not (tmp_path / "found.json.parts").exists()
    write(saved, tmp_path / "truth.json", tmp_path / "found.json", image_root=root, classes=["0", "1"])
    assert {row["category_id"] for row in orjson.loads((tmp_path / "found.json").read_bytes())} <= {7, 3}


class Ended(BaseException):
    """As Ctrl-C."""


class Ending(Told):
    def __init__(self, images: int) -> None:
        super().__init__()
        self.left = images

    def advance(self, images: int) -> None:
        super().advance(images)
        self.left -= images
        if self.left < 0:
            raise Ended


def test_model_without_names_keeps_its_ids_and_that_is_said(tmp_path, saved, caplog):
    predictor = demo.predictor()
    predictor.cfg.DATASETS.TEST = ("no_such_dataset",)
    nameless = save_model("dataset-nameless", predictor.model, predictor.cfg)
    (tmp_path / "truth.json").write_text(json.dumps(demo.ground_truth()))
    write(nameless, tmp_path / "truth.json", tmp_path / "found.json", image_root=demo.images()[0].parent)
    assert min(row["category_id"] for row in orjson.loads((tmp_path / "found.json").read_bytes())) == 0
    assert "has no class names, so its own ids are kept" in caplog.text


def test_run_that_writes_below_its_source_goes_on(tmp_path, saved, mixed):
    source = tmp_path / "source"
    shutil.copytree(mixed, source)
    outputs = [source / "annotated", source / "found.jsonl"]
    with pytest.raises(Ended):
        write(saved, source, outputs, chunk=2, progress=Ending(7))
    assert any((source / "annotated.parts/chunks").rglob("*.jpg"))
    assert write(saved, source, outputs, chunk=2, resume=True).images == 10
    assert len(list((source / "annotated").iterdir())) == 10


def test_picture_that_goes_before_it_is_drawn_on_is_left_out_of_all_outputs(tmp_path, saved, mixed):
    source = tmp_path / "source"
    shutil.copytree(mixed, source)
    taken = sorted(source.iterdir())[5]
    real = formats._Pictures.piece

    def piece(self, outcome, *rest):
        if outcome.file_name == str(taken):
            taken.unlink(missing_ok=True)
        return real(self, outcome, *rest)

    told = Told()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats._Pictures, "piece", piece)
        outputs = [tmp_path / "found.jsonl", tmp_path / "pictures"]
        report = write(saved, source, outputs, errors=tmp_path / "bad.jsonl", progress=told)
    assert (report.images, report.failures) == (10, 1)
    assert told.failures == [f"{taken}: cannot open '{taken}' (No such file or directory)"]
    assert orjson.loads((tmp_path / "bad.jsonl").read_bytes())["file_name"] == str(taken)
    assert len((tmp_path / "found.jsonl").read_bytes().splitlines()) == len(list((tmp_path / "pictures").iterdir())) == 9


def test_precision_that_auto_chose_stays_when_a_run_goes_on(tmp_path, saved, mixed, monkeypatch):
    """Which is the fastest may change from hour to hour, and results with it."""
    output = tmp_path / "found.jsonl"
    with pytest.raises(Ended):
        write(saved, mixed, output, chunk=2, precision="auto", progress=Ending(7))
    plan = orjson.loads((tmp_path / "found.jsonl.parts/plan.json").read_bytes())
    assert (plan["precision"], plan["chosen_precision"]) == ("auto", "fp32")

    def choose_again(*_):
        raise AssertionError

    monkeypatch.setattr("bentoml_detectron.fastest.fastest", choose_again)
    assert write(saved, mixed, output, chunk=2, precision="auto", resume=True).images == 10


def test_limits_are_the_callers(tmp_path, saved, mixed):
    few = Limits(max_pixels=192 * 150)
    report = write(saved, mixed, tmp_path / "found.jsonl", limits=few)
    assert report.failures == sum(np.prod(Image.open(path).size) > few.max_pixels for path in mixed.iterdir()) > 0
    with pytest.raises(errors.ImageTooLargeError, match="28,800"):
        list(predict(saved, mixed, limits=few))
    with pytest.raises(errors.InvalidArgumentError, match="already has a device, a precision and limits"):
        predict(load_predictor(saved), mixed, limits=few)


def test_pictures_have_the_callers_limits_too(tmp_path, saved):
    """A picture is drawn on an image that is read again."""
    Image.new("RGB", (4300, 4300)).save(tmp_path / "large.bmp")
    assert (tmp_path / "large.bmp").stat().st_size > Limits().max_bytes
    outputs = [tmp_path / "found.jsonl", tmp_path / "pictures"]
    assert write(saved, tmp_path / "large.bmp", outputs, limits=Limits(max_bytes=60_000_000)).failures == 0
    assert len(list((tmp_path / "pictures").iterdir())) == 1


def test_run_does_not_go_on_with_another_model_of_the_same_tag(tmp_path, mixed):
    predictor = demo.predictor()
    tag = save_model("dataset-again:1", predictor).tag
    with pytest.raises(Ended):
        write(tag, mixed, tmp_path / "found.jsonl", chunk=2, progress=Ending(5))
    bentoml.models.delete(tag)
    with torch.no_grad():
        next(predictor.model.parameters()).mul_(1.01)
    save_model("dataset-again:1", predictor)
    with pytest.raises(errors.OutputError, match=r"the unfinished run in .* is a different one: fingerprint was"):
        write(tag, mixed, tmp_path / "found.jsonl", chunk=2, resume=True)


def test_numbers_may_be_numpys_and_lists_are_no_texts(tmp_path, saved, mixed):
    options = {"score_threshold": np.float32(0.5), "top_k": np.int64(1), "classes": [np.int64(4), "7"]}
    write(saved, mixed, tmp_path / "found.jsonl", **options)
    due = [each.to_json() for each in predict(saved, mixed, score_threshold=0.5, top_k=1, classes=[4, 7])]
    assert (tmp_path / "found.jsonl").read_text().splitlines() == due
    for wrong in ({"classes": "47"}, {"classes": 4}, {"trusted": "my_package"}):
        with pytest.raises(errors.InvalidArgumentError, match="give a list"):
            write(saved, mixed, tmp_path / "other.jsonl", **wrong)


def test_outputs_may_have_names_that_are_no_utf_8(tmp_path, saved, mixed):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    with pytest.raises(Ended):
        write(saved, mixed, folder / "found.jsonl", chunk=2, progress=Ending(7))
    assert write(saved, mixed, folder / "found.jsonl", chunk=2, resume=True).images == 10
    assert [each.name for each in folder.iterdir()] == ["found.jsonl"]


def test_what_is_there_is_not_overwritten(tmp_path, saved, mixed):
    output = tmp_path / "found.jsonl"
    output.write_text("precious")
    with pytest.raises(errors.OutputError, match="already exists"):
        write(saved, mixed, output)
    with pytest.raises(errors.OutputError, match="already exists"):
        write(saved, mixed, [output, tmp_path / "more.json"], resume=True)
    assert write(saved, mixed, output, resume=True).images == 0
    assert output.read_text() == "precious"
    with pytest.raises(
        errors.OutputError, match="/dev/null: not a regular file or folder, so it cannot be replaced; give another name"
    ):
        write(saved, mixed, tmp_path / "new.jsonl", errors="/dev/null")
    assert [each.name for each in tmp_path.iterdir()] == ["found.jsonl"]


def test_run_that_fails_before_it_begins_leaves_nothing(tmp_path, saved, mixed):
    (tmp_path / "empty.txt").write_text("")
    for source, options in [(mixed, {"classes": ["nine"]}), (tmp_path / "nowhere", {}), ([], {})]:
        with pytest.raises(errors.InvalidArgumentError):
            write(saved, source, tmp_path / "found.json", **options)
    with pytest.raises(errors.ModelNotFoundError):
        write("nobody", mixed, tmp_path / "found.json")
    assert [each.name for each in tmp_path.iterdir()] == ["empty.txt"]


def test_unfinished_run_goes_on_only_with_the_same_arguments(tmp_path, saved, mixed):
    output = tmp_path / "found.jsonl"
    with pytest.raises(Ended):
        write(saved, mixed, output, chunk=2, progress=Ending(7))
    assert not output.exists()
    with pytest.raises(errors.OutputError, match="holds an unfinished run; continue it"):
        write(saved, mixed, output, chunk=2)
    for change, match in [
        ({"top_k": 3}, "top_k was None, but is now 3"),
        ({"chunk": 3}, "chunk was 2, but is now 3"),
        ({"source": sorted(mixed.iterdir())[1:]}, "sources was"),
        ({"outputs": [output, tmp_path / "more.json"]}, "outputs was"),
    ]:
        arguments = {"source": mixed, "outputs": output, "chunk": 2, **change}
        with pytest.raises(errors.OutputError, match=match):
            write(saved, resume=True, **arguments)
    with pytest.raises(errors.OutputError, match="holds an unfinished run; continue it"):
        write(saved, mixed, output, chunk=2, top_k=1)
    told = Told()
    report = write(saved, mixed, output, chunk=2, resume=True, progress=told)
    assert report.resumed >= 6  # of seven images before the end, at most a chunk is done again
    assert told.images == 10 - report.resumed
    write(saved, mixed, tmp_path / "whole.jsonl", chunk=2)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
