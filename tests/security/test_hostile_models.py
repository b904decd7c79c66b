"""Forged models: each is refused with a typed error before anything that it names is imported or called.

A forger can write every file of a model, so each forgery here is sealed with a manifest whose digests are right, unless the lie
is in the manifest itself. Payloads would touch a file, and the modules they name touch it when imported.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import bentoml
import pytest
import torch
import yaml
from detectron2.config import CfgNode

from bentoml_detectron import errors
from bentoml_detectron.artifact import config, manifest, plain_yaml
from bentoml_detectron.artifact import folder as artifact
from support import built, tiny_cfg


class Payload:
    """A pickled instance calls `function(*args)` when it is unpickled."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def cfg():
    return tiny_cfg()


@pytest.fixture(scope="module")
def module(cfg):
    return built(cfg)


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    """A file that appears if anything hostile runs, and a module that would make it."""
    touched = tmp_path / "touched"
    for name in ("evil_module", "detectron2_evil"):
        (tmp_path / f"{name}.py").write_text(f"open({str(touched)!r}, 'w').close()\ndef call(*args): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield touched
    assert not touched.exists(), "a payload ran"
    assert not {"evil_module", "detectron2_evil"} & set(sys.modules), "a module that the model names was imported"


@pytest.fixture(scope="module")
def saved_once(module, cfg, store, tmp_path_factory) -> Path:
    """A saved model, and the file that names it the latest, outside the store."""
    folder = tmp_path_factory.mktemp("saved") / "forged"
    bentoml.detectron.save_model("forged", module, cfg)
    shutil.move(store / "forged", folder)
    return folder


@pytest.fixture
def forged(saved_once, store, sentinel):
    """A saved model whose files the test may forge, in the store."""
    shutil.copytree(saved_once, store / "forged")
    (model,) = (each for each in (store / "forged").iterdir() if each.is_dir())
    yield model
    shutil.rmtree(store / "forged")


def seal(model: Path, cfg) -> None:
    (model / manifest.MANIFEST).unlink()
    artifact.seal(model, artifact.describe(cfg), is_predictor=False)


def as_old(model: Path, pickled: bytes, *, is_predictor: bool = True) -> None:
    """Makes a model one of BentoML's own adapter, with the given pickle."""
    record = yaml.safe_load((model / "model.yaml").read_text())
    record["api_version"] = "v1"
    record["metadata"]["_is_predictor"] = is_predictor
    (model / "model.yaml").write_text(yaml.safe_dump(record))
    (model / manifest.MANIFEST).unlink()
    (model / "config.yaml").unlink()
    (model / "custom_objects.pkl").write_bytes(pickled)


def refused(model: Path, *kinds: type[Exception]) -> Exception:
    tag = f"{model.parent.name}:{model.name}"
    with pytest.raises(kinds or errors.UnsafeFileError) as caught:
        bentoml.detectron.load_model(tag)
    assert isinstance(caught.value, errors.DetectronError)
    return caught.value


def by_module(name: str, attribute: str, argument: str = "x") -> bytes:
    """A pickle that calls a function by name, without this process importing its module."""
    return (
        b"\x80\x04c"
        + f"{name}\n{attribute}\n".encode()
        + b"X"
        + struct.pack("<I", len(argument))
        + argument.encode()
        + b"\x85R."
    )


PICKLES = {
    "os.system": lambda touch: pickle.dumps({"config": Payload(os.system, f"touch {touch}")}),
    "builtins.eval": lambda touch: pickle.dumps({"config": Payload(eval, f"open({str(touch)!r}, 'w')")}),
    "builtins.exec": lambda touch: pickle.dumps({"config": Payload(exec, f"open({str(touch)!r}, 'w')")}),
    "builtins.open": lambda touch: pickle.dumps({"config": Payload(open, str(touch), "w")}),
    "builtins.getattr": lambda touch: by_module("builtins", "getattr"),
    "a module that runs code on import": lambda touch: by_module("evil_module", "call"),
    "the same by STACK_GLOBAL": lambda touch: b"\x80\x04\x8c\x0bevil_module\x8c\x04call\x93)R.",
    "beside a good config": lambda touch: pickle.dumps({"config": {}, "more": Payload(os.system, f"touch {touch}")}),
    "in an old protocol": lambda touch: pickle.dumps({"config": Payload(os.system, f"touch {touch}")}, protocol=0),
    "by INST": lambda touch: b"(S'" + f"touch {touch}".encode() + b"'\nios\nsystem\n.",
    "by OBJ": lambda touch: b"(cos\nsystem\nS'" + f"touch {touch}".encode() + b"'\no.",
    "by an extension code": lambda touch: b"\x80\x02\x82\x01.",
    "by a persistent id": lambda touch: b"\x80\x04X\x01\x00\x00\x00xQ.",
    "a dotted name inside an allowed module": lambda touch: by_module(
        "detectron2.config.config", "os.system", f"touch {touch}"
    ),
    "another name of an allowed module": lambda touch: by_module("yacs.config", "load_cfg"),
    "a memo of two billion entries": lambda touch: b"\x80\x04Nr\xff\xff\xff\x7f.",
    "a second pickle behind the first": lambda touch: (
        pickle.dumps({"config": {}}) + by_module("os", "system", f"touch {touch}")
    ),
    "torch's own loader": lambda touch: by_module("torch", "load"),
    "tuples that unfold without end when hashed": lambda touch: b"\x80\x04})" + b"2\x86" * 60 + b"Ns.",
    "the same through the memo": lambda touch: b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "four million empty sets": lambda touch: b"\x80\x04(" + b"\x8f" * 4_000_000 + b"t.",
    "a bytearray": lambda touch: pickle.dumps({"config": bytearray(10)}, protocol=5),
}


def test_these_payloads_would_run(tmp_path):
    """Control: what the tests below refuse does its work in an ordinary unpickler."""
    for name in ("os.system", "builtins.eval", "builtins.exec", "builtins.open", "by INST", "by OBJ"):
        touched = tmp_path / name.replace(" ", "-")
        pickle.loads(PICKLES[name](touched))
        assert touched.exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("pickled", PICKLES.values(), ids=PICKLES.keys())
@pytest.mark.parametrize("is_predictor", [True, False], ids=["predictor", "module"])
def test_old_models_pickle(pickled, is_predictor, forged, sentinel):
    """Models of BentoML's own adapter keep their config in a pickle; it may hold a config and nothing else."""
    as_old(forged, pickled(sentinel), is_predictor=is_predictor)
    assert refused(forged).file == "custom_objects.pkl"


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"no pickle",
        pickle.dumps([1]),
        pickle.dumps({}),
        pickle.dumps({"config": {"A": 1}}),
        pickle.dumps({"config": {1, 2}}),
        pickle.dumps({"config": 7})[:-1],
    ],
)
def test_old_models_pickle_that_holds_no_config(pickled, forged):
    as_old(forged, pickled)
    assert refused(forged, errors.CorruptFileError).file == "custom_objects.pkl"


def test_old_models_config_that_unfolds_without_end(forged):
    """A hundred shared lists can stand for more values than there are atoms; and one may hold itself."""
    bomb: list = []
    for _ in range(40):
        bomb = [bomb, bomb]
    itself: list = []
    itself.append(itself)
    for value in (bomb, itself):
        node = CfgNode()
        dict.__setitem__(node, "A", value)
        if (forged / "config.yaml").exists():
            as_old(forged, pickle.dumps({"config": node}))
        (forged / "custom_objects.pkl").write_bytes(pickle.dumps({"config": node}))
        refused(forged)


def test_our_own_models_pickle_is_never_read(forged, cfg, sentinel):
    """It is written for BentoML's contract; whatever is in it, loading does not touch it."""
    (forged / "custom_objects.pkl").write_bytes(pickle.dumps(Payload(os.system, f"touch {sentinel}")))
    seal(forged, cfg)
    bentoml.detectron.load_model("forged:latest")
    bentoml.detectron.get("forged:latest").to_runnable()


def test_removing_the_manifest_does_not_make_a_model_an_old_one(forged, sentinel):
    (forged / "custom_objects.pkl").write_bytes(pickle.dumps(Payload(os.system, f"touch {sentinel}")))
    (forged / manifest.MANIFEST).unlink()
    assert refused(forged, errors.CorruptFileError).file == manifest.MANIFEST


CONFIGS = {
    "a tag that calls": b"MODEL: !!python/object/apply:os.system ['touch {touch}']\n",
    "a tag that makes an object": b"MODEL: !!python/object/new:evil_module.call [x]\n",
    "a tag that imports a module": b"MODEL: !!python/module:evil_module\n",
    "a tag that names a function": b"MODEL: !!python/name:evil_module.call\n",
    "a harmless tag": b"MODEL: !!str 7\n",
    "_BASE_ to a file": b"_BASE_: /etc/passwd\nMODEL: {}\n",
    "_BASE_ to a URL": b"_BASE_: http://127.0.0.1:9/base.yaml\n",
    "_BASE_ further down": b"MODEL:\n  _BASE_: ../other/config.yaml\n",
    "aliases that unfold": b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "nesting that overflows the C stack": b"a: " + b"[" * 100_000 + b"]" * 100_000,
    "a set": b"MODEL: {? a, ? b}\n".replace(b"{", b"!!set {"),
    "a date": b"MODEL: 2001-01-01\n",
    "binary data": b"MODEL: !!binary aGVsbG8=\n",
    "a number to base 60": b"MODEL: 1" + b":1" * 200_000,
    "a number to base 60 that is too large": b"MODEL: 1" + b":1" * 100 + b".5",
    "half a million values": b"a: [" + b"0," * 500_000 + b"0]",
    "half a million mappings": b"a: [" + b"{}," * 500_000 + b"{}]",
    "a number of five thousand digits": b"MODEL: 0x" + b"f" * 300,
    "a number as a key": b"? 0x" + b"f" * 300 + b"\n: 1\n",
    "five megabytes": b"a: " + b"x" * (5 << 20),
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())
def test_config(text, forged, cfg, sentinel):
    (forged / "config.yaml").write_bytes(text.replace(b"{touch}", str(sentinel).encode()))
    seal(forged, cfg)
    assert refused(forged).file == "config.yaml"


@pytest.mark.parametrize("text", [b"", b"[1, 2]", b"a: [", b"\xff\xfe\x00", b"a: 1\n---\nb: 2\n"])
def test_config_that_is_none(text, forged, cfg):
    (forged / "config.yaml").write_bytes(text)
    seal(forged, cfg)
    assert refused(forged, errors.CorruptFileError).file == "config.yaml"


def save_weights(model: Path, state: dict, cfg) -> None:
    torch.save({"model": state}, model / "saved_model.pth")
    seal(model, cfg)


def test_config_whose_sections_are_none(forged, cfg):
    (forged / "config.yaml").write_bytes(b"MODEL: 7\n")
    seal(forged, cfg)
    refused(forged, errors.InvalidModelError)
    as_old(forged, pickle.dumps({"config": CfgNode({"MODEL": 7})}))
    refused(forged, errors.InvalidModelError)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ROI_BOX_HEAD.NUM_FC", 10**6),
        ("MODEL.ROI_BOX_HEAD.NUM_CONV", 10**6),
        ("MODEL.ROI_BOX_HEAD.FC_DIM", 10**9),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", 10**7),
        ("MODEL.ROI_HEADS.NUM_CLASSES", 10**8),
        ("MODEL.RESNETS.DEPTH", 7),
        ("MODEL.RESNETS.DEFORM_NUM_GROUPS", 10**6),
    ],
)
def test_config_of_a_model_that_is_far_too_large(key, value, forged, cfg):
    """Building ends early: it may make no more than a multiple of what the weights file has."""
    huge = cfg.clone()
    huge.merge_from_list([key, value])
    if "DEFORM" in key:
        huge.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [True] * 4
        huge.MODEL.RESNETS.DEFORM_MODULATED = True
    (forged / "config.yaml").write_bytes(plain_yaml.dump(config.to_plain(huge)[0]))
    seal(forged, huge)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(forged, errors.InvalidModelError)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000  # KiB


class TestRecord:
    """`model.yaml`, which BentoML itself reads: in `get` too."""

    @pytest.mark.parametrize(
        "text",
        [
            b"zz: 1" + b":1" * 200_000,
            b"metadata:\n  a0: &a0 [x, x]\n"
            + b"".join(b"  a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 40)),
            b"a: [" + b"0," * 500_000 + b"0]",
            b"a: " + b"[" * 100_000,
            b"name: !!python/object/apply:os.system ['touch /tmp/never']",
        ],
        ids=["base 60", "aliases", "many", "deep", "tag"],
    )
    def test_record_made_to_take_long(self, text, forged):
        (forged / "model.yaml").write_bytes(text)
        for use in (bentoml.detectron.get, bentoml.detectron.load_model):
            with pytest.raises((errors.UnsafeFileError, errors.CorruptFileError)) as caught:
                use(f"forged:{forged.name}")
            assert caught.value.file == "model.yaml"

    def test_record_that_is_a_pipe_or_a_link(self, forged, tmp_path):
        shutil.move(forged / "model.yaml", tmp_path / "elsewhere")
        os.mkfifo(forged / "model.yaml")
        assert refused(forged).file == "model.yaml"
        (forged / "model.yaml").unlink()
        (forged / "model.yaml").symlink_to(tmp_path / "elsewhere")
        assert refused(forged).file == "model.yaml"

    def test_shared_metadata_and_bytes_that_bentoml_writes_are_taken(self, module, cfg):
        shared = [1, 2]
        saved = bentoml.detectron.save_model("shares", module, cfg, metadata={"a": shared, "b": shared, "c": b"bytes"})
        assert bentoml.detectron.get(saved.tag).info.metadata["b"] == [1, 2]


def two_directories(good: bytes, evil_member: bytes) -> bytes:
    """An archive in which Python finds one directory, right before the end, and PyTorch another, where the end record says."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        offset = archive.start_dir
    whole = buffer.getvalue()
    end = whole.rindex(b"PK\5\6")
    directory = whole[offset:end]
    record = bytearray(whole[end:])
    return whole[:offset] + directory.replace(b"data.pkl", b"evil.pkl") + evil_member + directory + bytes(record)


class TestWeights:
    NAME = "roi_heads.box_predictor.cls_score.bias"

    def test_archive_with_two_directories(self, forged, cfg):
        """What is checked would not be what is loaded."""
        (forged / "saved_model.pth").write_bytes(two_directories((forged / "saved_model.pth").read_bytes(), b""))
        seal(forged, cfg)
        refused(forged, errors.CorruptFileError)
        content = (forged / "saved_model.pth").read_bytes()
        for changed in (content + b"more", content[:-2] + b"\1\0x"):
            (forged / "saved_model.pth").write_bytes(changed)
            seal(forged, cfg)
            refused(forged, errors.CorruptFileError)

    @pytest.mark.parametrize(
        "structure",
        [
            b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
            b"\x80\x02(" + b"}" * 4_000_000 + b"t.",
            b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x70\x85R.",
            b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n.",
            b"\x80\x02ctorch\nload\n.",
        ],
        ids=["hash bomb", "many dicts", "a large bytearray", "another rebuilder", "another name of torch"],
    )
    def test_structure_that_does_more_than_make_tensors(self, structure, forged, cfg):
        with zipfile.ZipFile(forged / "saved_model.pth") as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(forged / "saved_model.pth", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, structure if name.endswith("data.pkl") else content)
        seal(forged, cfg)
        assert refused(forged).file == "saved_model.pth"

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.complex64])
    def test_tensor_of_another_kind(self, dtype, forged, cfg, module):
        save_weights(forged, {**module.state_dict(), self.NAME: torch.zeros(6, dtype=dtype)}, cfg)
        assert self.NAME in str(refused(forged, errors.WeightsMismatchError))

    def test_code_in_the_checkpoint(self, forged, cfg, module, sentinel):
        """By a reduce payload, in the place of a tensor and beside the tensors."""
        for content in (
            {"model": {**module.state_dict(), self.NAME: Payload(os.system, f"touch {sentinel}")}},
            {"model": module.state_dict(), "more": Payload(os.system, f"touch {sentinel}")},
            Payload(os.system, f"touch {sentinel}"),
        ):
            torch.save(content, forged / "saved_model.pth")
            seal(forged, cfg)
            assert refused(forged).file == "saved_model.pth"

    def test_checkpoint_of_the_time_before_zip_files(self, forged, cfg, module, sentinel):
        content = {"model": {**module.state_dict(), self.NAME: Payload(os.system, f"touch {sentinel}")}}
        torch.save(content, forged / "saved_model.pth", _use_new_zipfile_serialization=False)
        seal(forged, cfg)
        assert refused(forged, errors.CorruptFileError).file == "saved_model.pth"

    def test_plain_pickle(self, forged, cfg, sentinel):
        (forged / "saved_model.pth").write_bytes(pickle.dumps({"model": Payload(os.system, f"touch {sentinel}")}))
        seal(forged, cfg)
        assert refused(forged, errors.CorruptFileError).file == "saved_model.pth"

    def test_torchscript_archive(self, forged, cfg):
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), forged / "saved_model.pth")
        seal(forged, cfg)
        assert refused(forged).file == "saved_model.pth"

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (6,)),
            torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10**15,)),
            torch.zeros(1).expand(6),
            torch.zeros(1).expand(10**15),
            torch.quantize_per_tensor(torch.zeros(6), 1.0, 0, torch.qint8),
            torch.zeros(6, device="meta"),
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(4)]),
            torch.zeros(6, dtype=torch.complex64).conj(),
            7,
            "text",
        ],
        ids=[
            "sparse",
            "oversized sparse",
            "expanded",
            "oversized",
            "quantised",
            "meta",
            "nested",
            "conjugate",
            "number",
            "string",
        ],
    )
    def test_what_is_no_plain_tensor(self, tensor, forged, cfg, module):
        save_weights(forged, {**module.state_dict(), self.NAME: tensor}, cfg)
        assert refused(forged).file == "saved_model.pth"

    def test_tensor_that_reads_beyond_its_bytes(self, forged, cfg, module):
        """The pickle says 10**6 numbers, the archive has six."""
        save_weights(forged, module.state_dict(), cfg)
        path = forged / "saved_model.pth"
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in members if name.endswith("/data.pkl"))
        marker = self.NAME.encode()
        at = members[name].index(marker)
        # K\x06 is the shape (6,) of the bias; M is a two-byte number.
        shape = members[name].index(b"K\x06\x85", at)
        members[name] = members[name][:shape] + b"M\xff\xff\x85" + members[name][shape + 3 :]
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        seal(forged, cfg)
        refused(forged, errors.CorruptFileError, errors.UnsafeFileError)

    @pytest.mark.slow
    def test_archive_that_unpacks_to_more_than_it_is(self, forged, cfg):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * (200 << 20))
            archive.writestr("archive/version", b"3\n")
        (forged / "saved_model.pth").write_bytes(buffer.getvalue())
        seal(forged, cfg)
        assert refused(forged).file == "saved_model.pth"


class TestFiles:
    @pytest.mark.parametrize("name", ["config.yaml", "saved_model.pth", "manifest.json", "model.yaml"])
    def test_symbolic_link_out_of_the_model(self, name, forged, cfg, tmp_path):
        """Even to a file with the right content: a model's files are its own."""
        shutil.move(forged / name, tmp_path / "elsewhere")
        (forged / name).symlink_to(tmp_path / "elsewhere")
        assert refused(forged).file == name

    @pytest.mark.parametrize("name", ["config.yaml", "saved_model.pth", "manifest.json"])
    def test_pipe_that_would_block_for_ever(self, name, forged):
        (forged / name).unlink()
        os.mkfifo(forged / name)
        assert refused(forged).file == name

    def test_folder_in_the_place_of_a_file(self, forged):
        (forged / "config.yaml").unlink()
        (forged / "config.yaml").mkdir()
        assert refused(forged).file == "config.yaml"

    @pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "", "a/../b", "."])
    def test_name_that_leads_out(self, name, tmp_path):
        from bentoml_detectron.artifact import files

        with pytest.raises(errors.UnsafeFileError):
            files.read_small(tmp_path, name)


def rewrite_manifest(model: Path, **changes: object) -> None:
    """Changes a manifest and gives it the right digest again."""
    content = json.loads((model / manifest.MANIFEST).read_text())
    (model / manifest.MANIFEST).write_bytes(manifest.spell({**content, **changes}))


LIES = {
    "another kind": {"kind": "predictor"},
    "an unknown kind": {"kind": "script"},
    "an unknown sort of config": {"config": "python"},
    "a name out of the folder": {"files": {"../../other": {"size": 1, "sha256": "0" * 64, "xxh3_128": "0" * 32}}},
    "no files": {"files": {}},
    "a tuple where there is none": {"config_tuples": [["MODEL", "NOWHERE"]]},
    "a tuple inside a number": {"config_tuples": [["VERSION", 0]]},
    "a tuple that is the config": {"config_tuples": [[]]},
    "an unknown key": {"run": "evil_module.call"},
    "a module of another package": {"registry_entries": [{"registry": "R", "name": "n", "module": "evil_module"}]},
    "a module that looks like Detectron2's": {
        "registry_entries": [{"registry": "R", "name": "n", "module": "detectron2_evil"}]
    },
    "a module by a path": {"registry_entries": [{"registry": "R", "name": "n", "module": "detectron2/../evil_module"}]},
    "a module two dots on": {"registry_entries": [{"registry": "R", "name": "n", "module": "detectron2..evil_module"}]},
    "a module by a relative name": {"registry_entries": [{"registry": "R", "name": "n", "module": ".evil_module"}]},
    "a module that is not there": {"registry_entries": [{"registry": "R", "name": "n", "module": "detectron2.nobody"}]},
    "a negative size": {"files": {"saved_model.pth": {"size": -1, "sha256": "0" * 64, "xxh3_128": "0" * 32}}},
    "a format of the future": {"format": 99},
    "a format that is none": {"format": "one"},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_manifest_that_lies(lie, forged):
    rewrite_manifest(forged, **lie)
    refused(forged, errors.InvalidModelError)


def test_manifest_of_the_future_is_named_as_such(forged):
    rewrite_manifest(forged, format=99)
    assert "upgrade" in str(refused(forged, errors.UnsupportedFormatError))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"null", b"[" * 100_000, b'{"a": 1}', b"\xff"])
def test_manifest_that_is_none(text, forged):
    (forged / manifest.MANIFEST).write_bytes(text)
    assert refused(forged, errors.CorruptFileError).file == manifest.MANIFEST


def test_record_that_says_nonsense(forged, cfg):
    record = yaml.safe_load((forged / "model.yaml").read_text())
    record["metadata"]["_is_predictor"] = "perhaps"
    (forged / "model.yaml").write_text(yaml.safe_dump(record))
    seal(forged, cfg)
    assert refused(forged, errors.CorruptFileError).file == "model.yaml"


def test_class_that_only_looks_like_an_ordered_dict(forged):
    """An allowed name gives an inert dict, whatever arguments come with it."""
    content = OrderedDict(config=OrderedDict(A=1))
    as_old(forged, pickle.dumps(content))
    assert refused(forged, errors.CorruptFileError).file == "custom_objects.pkl"
