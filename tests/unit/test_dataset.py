"""What the images of a dataset are, how they are listed, and how results are written: all that needs no model."""

from __future__ import annotations

import glob
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentoml_detectron import Detections, Prediction, demo, errors, masks
from bentoml_detectron.dataset import Failure, formats, parquet_source, parts
from bentoml_detectron.dataset.sources import Columns, Dataset, Item
from bentoml_detectron.images import DEFAULT_LIMITS

JPEG = demo.images()[0].read_bytes()


def names(source, **arguments) -> list[str]:
    return [item.file_name for item in Dataset(source, **arguments)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images with all endings, in two folders, among other files."""
    (tmp_path / "photos" / "b").mkdir(parents=True)
    for name in ("2.JPG", "10.jpeg", "1.png", "b/0.webp", "b/3.bmp", "notes.txt", "b/data.parquet", "x.jpg.part"):
        (tmp_path / "photos" / name).write_bytes(JPEG)
    return tmp_path / "photos"


def test_folder_gives_its_images_by_name_and_those_below_after_them(folder):
    due = ["1.png", "10.jpeg", "2.JPG", "b/0.webp", "b/3.bmp"]
    assert names(folder) == names(str(folder)) == [str(folder / each) for each in due]
    assert [item.image_id for item in Dataset(folder)] == [1, 2, 3, 4, 5]


def test_glob_gives_what_matches_by_name_whatever_its_ending(folder):
    assert names(f"{folder}/*.j*g*") == [str(folder / each) for each in ("10.jpeg", "x.jpg.part")]
    assert names(f"{folder}/**/0*") == [str(folder / "b/0.webp")]
    assert names(f"{folder}/b*") == [str(folder / "b/0.webp"), str(folder / "b/3.bmp")]


def test_glob_of_folders_and_what_is_in_them_gives_each_image_once(folder):
    (folder / "empty").mkdir()
    due = ["1.png", "10.jpeg", "2.JPG", "b/0.webp", "b/3.bmp", "b/data.parquet", "notes.txt", "x.jpg.part"]
    for each in ("b/data.parquet", "notes.txt"):
        (folder / each).write_bytes(JPEG)
    assert names(f"{folder}/**") == [str(folder / each) for each in due]
    assert names(f"{folder}/[be]*") == [str(folder / "b/0.webp"), str(folder / "b/3.bmp")]


@pytest.mark.parametrize("source", ["", "*", "**", "b*"])
def test_what_is_left_out_is_in_no_folder_and_no_glob(folder, source, monkeypatch, tmp_path):
    """As what a run writes, which may be below a folder that it reads."""
    (folder / "b.parts/chunks").mkdir(parents=True)
    (folder / "b.parts/chunks/9.jpg").write_bytes(JPEG)
    (folder / "notes.txt").unlink()
    (folder / "link").symlink_to(folder / "b.parts")
    monkeypatch.chdir(tmp_path)
    before = names(f"{folder}/{source}")
    found = [each.file_name for each in Dataset(f"{folder}/{source}", left_out=["photos/b.parts"])]
    assert any("9.jpg" in each for each in before)
    assert found == [each for each in before if "9.jpg" not in each]


@pytest.mark.parametrize(("source", "due"), [("", 5), ("**/*.png", 1), ("b/**", 2)])
def test_links_to_folders_are_not_followed_in_circles(folder, source, due):
    (folder / "b" / "data.parquet").unlink()
    (folder / "b" / "again").symlink_to(folder)
    (folder / "b" / "once_more").symlink_to(folder / "b")
    found = names(folder / source)
    assert len(found) == due
    assert not any("again" in each or "once_more" in each for each in found)


@pytest.mark.parametrize("pattern", ["**/*.jpg", "**", "a/**", "*/**/*.jpg", "**/b/**/*.jpg", "a/**/c/*", "**/*", "a/b**/*"])
@pytest.mark.parametrize("here", ["", "./", "../there/", "{}/"])
def test_globs_with_two_stars_fit_what_pythons_do(tmp_path, monkeypatch, pattern, here):
    there = tmp_path / "there"
    for name in ("1.jpg", "a/2.jpg", "a/b/3.jpg", "a/b/c/4.jpg", "a/.hidden/5.jpg", "x[1]/y/6.jpg", "a/.7.jpg"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(JPEG)
    monkeypatch.chdir(there)
    pattern = here.format(there) + pattern
    due = sorted(each for each in glob.glob(pattern, recursive=True) if Path(each).is_file())  # noqa: PTH207
    assert due
    assert names(pattern) == due


@pytest.mark.parametrize("source", ["", "**/*.jpg"])
def test_pictures_that_another_run_has_made_so_far_are_no_images(folder, source):
    (folder / "first.jpg").write_bytes(JPEG)
    before = names(folder / source)
    with parts.held([folder / "pictures"]):
        (folder / "pictures.parts/chunks/00000000/0").mkdir(parents=True)
        (folder / "pictures.parts/chunks/00000000/0/0000001-x.jpg").write_bytes(JPEG)
        assert names(folder / source) == before


@pytest.mark.parametrize("source", ["", "**/*"])
@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root reads everything")
def test_folder_that_cannot_be_read_is_an_error_that_names_it(folder, source):
    code = "import sys\nfrom bentoml_detectron.dataset.sources import Dataset\nprint(*list(Dataset(sys.argv[1])), sep='\\n')"
    (folder / "b").chmod(0)
    command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    result = subprocess.run([*command, sys.executable, "-c", code, str(folder / source)], capture_output=True, text=True)
    assert f"the folder '{folder}/b' cannot be read (Permission denied); fix this" in result.stderr
    assert result.returncode == 1


def test_matches_of_a_glob_are_files_whatever_their_names(tmp_path, monkeypatch):
    """Not the list on stdin, or an address."""
    monkeypatch.chdir(tmp_path)
    for name in ("-", "data:1.jpg"):
        (tmp_path / name).touch()
    assert [each.file_name for each in Dataset("*")] == ["-", "data:1.jpg"]


def test_file_whose_name_looks_like_a_glob_is_itself(tmp_path):
    (tmp_path / "a[1].jpg").write_bytes(JPEG)
    (tmp_path / "a1.jpg").write_bytes(JPEG)
    assert names(tmp_path / "a[1].jpg") == [str(tmp_path / "a[1].jpg")]


def test_several_sources_come_in_their_order_with_positions_as_ids(folder):
    found = list(Dataset([folder / "b", folder / "1.png", folder / "notes.txt"]))
    assert [Path(item.file_name).name for item in found] == ["0.webp", "3.bmp", "1.png", "notes.txt"]
    assert [item.image_id for item in found] == [1, 2, 3, 4]


def test_list_on_stdin_names_images_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b.jpg\r\n\n*.png\n\xff.jpg")))
    assert names("-") == ["a b.jpg", "*.png", "\udcff.jpg"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa.jpg\nb.jpg\n")))
    assert names("-") == ["a.jpg", "b.jpg"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.jpg\0b.jpg\0")))
    with pytest.raises(errors.InvalidArgumentError, match="the list of paths contains NUL characters; give one path per line"):
        names("-")


def test_what_is_no_source_is_an_error():
    for source in (5, None):
        with pytest.raises(errors.InvalidArgumentError, match="give a path or a list of paths"):
            Dataset(source)
    with pytest.raises(errors.InvalidArgumentError, match="there are no sources"):
        names([])


@pytest.mark.parametrize("source", ["http://x.y/a.jpg", "s3://bucket/key", "data:image/png;base64,AAAA", "file:///a.jpg"])
def test_url_is_refused(source):
    with pytest.raises(errors.InvalidArgumentError, match="not supported") as caught:
        names(source)
    assert caught.value.value == source


def test_source_without_images_is_an_error_that_names_it(tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere.jpg", tmp_path / "empty", tmp_path / "*.jpg", 7):
        with pytest.raises(errors.InvalidArgumentError, match=str(source if source != 7 else "int").replace("*", r"\*")):
            names([source])


def annotation(path: Path, content: object, start: bytes = b"") -> Path:
    path.write_bytes(start + json.dumps(content).encode())
    return path


@pytest.mark.parametrize("ids", [(7, 3), ("b", "a")])
def test_annotation_file_is_told_by_its_content_and_brings_ids_names_and_categories(tmp_path, ids):
    images = [{"id": ids[0], "file_name": "x/1.jpg"}, {"id": ids[1], "file_name": "/abs/2.jpg"}]
    content = {"images": images, "categories": [{"id": 5, "name": "seven"}], "annotations": []}
    path = annotation(tmp_path / "val", content, b"\xef\xbb\xbf \n")
    for folder in (tmp_path, tmp_path / "data"):
        (folder / "x").mkdir(parents=True)
        (folder / "x/1.jpg").touch()
    dataset = Dataset(path)
    found = list(dataset)
    assert found == [Item("x/1.jpg", ids[0], str(tmp_path / "x/1.jpg")), Item("/abs/2.jpg", ids[1], "/abs/2.jpg")]
    assert dataset.categories == {"seven": 5}
    assert next(iter(Dataset(path, image_root=tmp_path / "data"))).path == str(tmp_path / "data/x/1.jpg")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"images": 3},
        {"images": [{"id": 1}]},
        {"images": [{"id": True, "file_name": "a"}]},
        {"images": [{"id": 1, "file_name": "a"}, {"id": "1", "file_name": "b"}]},
        {"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]},
        {"images": [{"id": 1, "file_name": 4}]},
        {"images": [{"id": 1, "file_name": "a"}], "categories": [{"name": 1, "id": 2}]},
        {"images": [{"id": 1, "file_name": "a"}], "categories": [{"name": "a", "id": 2}, {"name": "a", "id": 3}]},
    ],
)
def test_malformed_annotation_file_is_an_error_that_names_it(tmp_path, content):
    path = annotation(tmp_path / "a.json", content)
    with pytest.raises(errors.InvalidArgumentError, match=r"a\.json.*not a (valid )?COCO annotation file"):
        names(path)


def test_annotation_file_is_the_only_source(tmp_path, folder):
    path = annotation(tmp_path / "a.json", {"images": [{"id": 1, "file_name": "a"}]})
    (tmp_path / "a").touch()
    for source in ([path, folder], [folder, path], [path, path], f"{tmp_path}/*"):
        with pytest.raises(errors.InvalidArgumentError, match="the only source"):
            names(source)


def write_parquet(path: Path, rows: list[dict], group: int = 3) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_parquet_is_told_by_its_content_and_names_rows_by_their_keys(tmp_path):
    rows = [{"key": f"k{number}" if number != 4 else None, "data": bytes([number]), "n": number} for number in range(10)]
    path = write_parquet(tmp_path / "shard", rows)
    found = list(Dataset([path]))
    assert [item.file_name for item in found] == [f"k{n}" if n != 4 else f"{path}#4" for n in range(10)]
    assert [(item.path, item.row, item.image_id) for item in found] == [(str(path), row, row + 1) for row in range(10)]
    assert names(path, columns=Columns(key="n")) == [str(n) for n in range(10)]
    for start in range(11):
        assert list(parquet_source.contents(str(path), start)) == [bytes([n]) for n in range(start, 10)]


def test_parquet_keys_may_be_bytes_and_are_never_the_images(tmp_path):
    rows = [{"image": JPEG, "key": b"a\xff.jpg"}, {"image": JPEG, "key": None}]
    path = write_parquet(tmp_path / "keys.parquet", rows)
    assert names(path) == ["a\udcff.jpg", f"{path}#1"]
    path = write_parquet(tmp_path / "path.parquet", [{"path": JPEG}])
    assert names(path) == [f"{path}#0"]


def test_parquet_of_hugging_faces_form_is_read(tmp_path):
    rows = [{"image": {"bytes": b"abc", "path": "a.jpg"}, "raw": b"x"}, {"image": {"bytes": None, "path": None}, "raw": b"y"}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    assert names(path) == ["a.jpg", f"{path}#1"]
    assert list(parquet_source.contents(str(path), 0)) == [b"abc", None]
    assert list(parquet_source.contents(str(path), 1, "raw")) == [b"y"]


def test_parquet_that_does_not_fit_is_an_error_that_says_why(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"one": b"1", "two": b"2", "text": "x"}])
    for columns, match in [
        (Columns(), r"2 columns of bytes \(one: binary, two: binary, text: string\)"),
        (Columns(image="text"), "no columns of bytes named 'text'"),
        (Columns(image="three"), "no image column 'three'"),
        (Columns(image="one", key="three"), "no key column 'three'"),
    ]:
        with pytest.raises(errors.InvalidArgumentError, match=match):
            names(path, columns=columns)
    path.write_bytes(b"PAR1" + os.urandom(100))
    with pytest.raises(errors.InvalidArgumentError, match=r"a\.parquet' cannot be read as Parquet"):
        names(path)


texts = st.binary(max_size=12).map(os.fsdecode) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
listed = st.builds(Item, texts, st.integers(-(2**63), 2**63 - 1), texts, st.none() | st.integers(0, 2**40))


@settings(deadline=None, max_examples=60)
@given(items=st.lists(listed, max_size=12), size=st.integers(1, 5))
def test_listing_gives_back_what_was_listed_chunk_by_chunk(tmp_path_factory, items, size):
    path = tmp_path_factory.mktemp("listing") / "sources"
    listing = parts.Listing(path, items, size)
    assert listing.count == len(items)
    assert [listing.items(number) for number in range(listing.chunks)] == [
        items[start : start + size] for start in range(0, len(items), size)
    ]
    assert parts.Listing(path, items, size).digest == listing.digest
    assert parts.Listing(path, [*items, Item("a", 1, "a")], size).digest != listing.digest


def found(count: int, *, with_masks: bool = True) -> Detections:
    bitmap = np.zeros((6, 8), bool)
    bitmap[1:3, 2:5] = True
    return Detections(
        (6, 8),
        np.arange(4 * count, dtype=np.float32).reshape(count, 4) / 3,
        np.linspace(0.9, 0.1, count, dtype=np.float32),
        np.arange(count),
        tuple(f"n{each}" for each in range(count)),
        [masks.encode(bitmap)] * count if with_masks else None,
        np.ones((count, 2, 3), np.float32),
        category_ids=np.arange(count) * 10,
    )


COUNTS = st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4)


def joined(folder: Path, name: str, counts: list[list[int]], categories=None) -> tuple[Path, list[Prediction]]:
    """What a format makes of chunks of images with so many detections; -1 is an image that could not be used."""
    writer, every, paths = formats.make(name, categories, False, DEFAULT_LIMITS), [], []
    for number, chunk in enumerate(counts):
        pieces = []
        for count in chunk:
            position = len(every) + 1
            outcome = (
                Prediction(f"ü\udcff{position}", position, found(count))
                if count >= 0
                else Failure(f"f{position}", position, errors.DamagedImageError("cut", index=position))
            )
            every.append(outcome)
            pieces.append(writer.piece(outcome, position, None, folder / f"part{number}"))
        paths.append(folder / f"part{number}")
        writer.part(pieces, paths[-1])
    writer.join(paths, folder / "whole")
    return folder / "whole", every


def due_name(prediction: Prediction) -> str:
    return prediction.file_name.replace("\udcff", "�")


@settings(deadline=None, max_examples=25)
@given(counts=st.lists(st.lists(st.integers(-1, 3), max_size=3), max_size=4))
def test_json_formats_hold_every_result_in_order(tmp_path_factory, counts):
    folder = tmp_path_factory.mktemp("formats")
    path, every = joined(folder, formats.COCO, counts, {1: 77})
    predictions = [each for each in every if isinstance(each, Prediction)]
    due = [row for each in predictions for row in each.detections.to_coco(each.image_id)]
    assert orjson.loads(path.read_bytes()) == [{**row, "category_id": {10: 77}.get(row["category_id"], row["category_id"])}
                                               for row in due]  # fmt: skip
    path, every = joined(tmp_path_factory.mktemp("lines"), formats.JSON_LINES, counts)
    read = [Prediction.from_json(line) for line in path.read_bytes().splitlines()]
    predictions = [each for each in every if isinstance(each, Prediction)]
    assert read == [Prediction(due_name(each), each.image_id, each.detections) for each in predictions]
    path, every = joined(tmp_path_factory.mktemp("failures"), formats.FAILURES, counts)
    assert [orjson.loads(line) for line in path.read_bytes().splitlines()] == [
        {"file_name": each.file_name, "image_id": each.image_id, "reason": "cut"} for each in every if isinstance(each, Failure)
    ]


@settings(deadline=None, max_examples=15)
@given(counts=COUNTS)
def test_parquet_holds_every_result_in_order(tmp_path_factory, counts):
    from pyarrow import parquet

    path, every = joined(tmp_path_factory.mktemp("rows"), formats.DETECTION_ROWS, counts)
    rows = parquet.read_table(path).to_pylist()
    assert [(row["file_name"], row["image_id"], row["detection"]) for row in rows] == [
        (due_name(each), each.image_id, index) for each in every for index in range(len(each.detections))
    ]
    flat = [(each.detections, index) for each in every for index in range(len(each.detections))]
    for row, (detections, index) in zip(rows, flat, strict=True):
        one = Detections(
            (row["height"], row["width"]),
            np.array([row["box"]], np.float32),
            np.array([row["score"]], np.float32),
            np.array([row["class_id"]]),
            (row["class_name"],),
            [{"size": [row["height"], row["width"]], "counts": row["mask"]}],
            np.array(row["keypoints"], np.float32).reshape(1, -1, 3),
            category_ids=np.array([row["category_id"]]),
        )
        assert one == detections[[index]]
    path, every = joined(tmp_path_factory.mktemp("images"), formats.IMAGE_ROWS, counts)
    rows = parquet.read_table(path).to_pylist()
    assert [of_row(row) for row in rows] == [each.detections for each in every]
    assert [row["file_name"] for row in rows] == [due_name(each) for each in every]


def of_row(row: dict) -> Detections:
    """The detections of a Parquet row with two keypoints and masks."""
    size, count = (row["height"], row["width"]), len(row["scores"])
    return Detections(
        size,
        np.array(row["boxes"], np.float32).reshape(count, 4),
        np.array(row["scores"], np.float32),
        np.array(row["class_ids"], np.int64),
        tuple(row["class_names"]),
        None if row["masks"] is None else [{"size": list(size), "counts": each} for each in row["masks"]],
        np.array(row["keypoints"], np.float32).reshape(count, 2, 3),
        category_ids=np.array(row["category_ids"], np.int64),
    )


def test_format_is_told_by_the_outputs_name(tmp_path):
    assert formats.named(Path("a.JSON")) == formats.named(Path("b/.json")) == formats.COCO
    assert formats.named(Path("a.jsonl")) == formats.named(Path("a.ndjson")) == formats.JSON_LINES
    assert formats.named(Path("a.parquet")) == formats.DETECTION_ROWS
    assert formats.named(Path("a.parquet"), "image") == formats.IMAGE_ROWS
    assert formats.named(Path("pictures/")) == formats.PICTURES
    for path, rows in [("a.csv", "image"), ("/", "image"), ("-", "image"), ("a.parquet", "mask")]:
        with pytest.raises(errors.InvalidArgumentError):
            formats.named(Path(path), rows)


def test_pictures_names_sort_by_position_and_are_names_of_files():
    named = [formats.picture_name(Prediction(name, 1, found(0)), position) for position, name in
             [(2, "a/../x y\n.png"), (10, "ü" * 300), (999, "#")]]  # fmt: skip
    assert named == sorted(named)
    assert named[0] == "0000002-x_y_.jpg"
    assert all("/" not in each and len(os.fsencode(each)) < 150 for each in named)


def test_prediction_refuses_what_is_no_line_of_its_own():
    for text in (b"", b"[]", b"{}", b'{"file_name": "a", "image_id": 1, "detections": {}}'):
        with pytest.raises(errors.InvalidArgumentError):
            Prediction.from_json(text)


def test_second_run_on_an_output_is_refused_and_the_first_ones_folder_stays(tmp_path):
    output, other = tmp_path / "a.json", tmp_path / "b.json"
    with parts.held([output]):
        with pytest.raises(errors.OutputError, match=r"another run is writing '.*a\.json'"), parts.held([other, output]):
            pass
        assert (tmp_path / "a.json.parts").is_dir()
        assert not (tmp_path / "b.json.parts").exists()
    assert not (tmp_path / "a.json.parts").exists()
    with pytest.raises(errors.InvalidArgumentError, match="twice"), parts.held([output, tmp_path / "." / "a.json"]):
        pass
    with pytest.raises(errors.OutputError, match=r"no folder '.*nowhere'"), parts.held([tmp_path / "nowhere/a.json"]):
        pass


@pytest.mark.parametrize("theirs", [["notes.txt"], ["wheels/a.txt"], ["lock", "notes.txt"], ["chunks/a.txt"]])
def test_folder_that_no_run_has_made_is_refused_and_stays(tmp_path, theirs):
    for name in theirs:
        (tmp_path / "car.parts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "car.parts" / name).write_text("precious")
    with (
        pytest.raises(errors.OutputError, match=r"'.*car\.parts' exists, but does not belong to a run; move it"),
        parts.held([tmp_path / "car"]),
    ):
        pass
    assert {str(each.relative_to(tmp_path / "car.parts")) for each in tmp_path.rglob("*.*") if each.is_file()} <= {*theirs}
    assert all((tmp_path / "car.parts" / name).read_text() == "precious" for name in theirs)


def test_what_appears_in_a_runs_folder_from_elsewhere_stays(tmp_path):
    with parts.held([tmp_path / "car"]) as [folder]:
        (folder / ".DS_Store").write_text("a file manager's")
        (folder / parts.CHUNKS).mkdir()
        parts.write_json(folder / parts.PLAN, {})
    with parts.held([tmp_path / "car"]) as [folder]:  # it goes on
        parts.empty(folder)
    assert [each.name for each in folder.iterdir()] == [".DS_Store"]


def test_worker_that_has_not_heard_that_its_run_is_over_publishes_nothing(tmp_path):
    """As on a cluster whose head is gone, while the run goes on elsewhere."""
    stale = parts.scratch(tmp_path, 0)
    (stale / "0").write_text("a part")
    assert parts.finished_chunks(tmp_path) == (set(), 0, 0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        (stale / "1").write_text("more")
    with pytest.raises(FileNotFoundError):
        parts.publish_chunk(stale, tmp_path, 0, 5, 0)


def test_chunk_without_its_summary_is_done_again(tmp_path):
    made = parts.scratch(tmp_path, 0)
    parts.publish_chunk(made, tmp_path, 0, 5, 1)
    (tmp_path / "00000001").mkdir()
    (tmp_path / ".nfs0001").mkdir()
    assert parts.finished_chunks(tmp_path) == ({0}, 5, 1)
    assert [each.name for each in tmp_path.iterdir()] == ["00000000"]
