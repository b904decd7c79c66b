"""Forged files of weights: each is refused with a typed error before anything that it names is imported or called."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import sys
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bentoml_detectron import errors, from_files
from bentoml_detectron.artifact import weights, zoo_pickle
from support import built, tiny_cfg


class Payload:
    """A pickled instance calls `function(*args)` when it is unpickled."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.fixture
def sentinel(tmp_path, monkeypatch):
    """A file that appears if anything hostile runs, and a module that would make it."""
    touched = tmp_path / "touched"
    (tmp_path / "evil_module.py").write_text(f"open({str(touched)!r}, 'w').close()\ndef call(*args): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield touched
    assert not touched.exists(), "a payload ran"
    assert "evil_module" not in sys.modules, "a module that the file names was imported"


def zoo(value: object, protocol: int = 2) -> bytes:
    """A file in the zoo's form with something under the name of a weight."""
    return pickle.dumps({"model": {"weight": value}, "__author__": "who"}, protocol=protocol)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def entry(value: bytes) -> bytes:
    """The same, of opcodes."""
    return b"\x80\x04}" + text("__author__") + text("who") + b"s" + text("model") + b"}" + text("weight") + value + b"ss."


def raw(shape: bytes, values: bytes, code: str = "f4", order: str = "<", parts: bytes = b"NNN") -> bytes:
    """The opcodes of an array, with any lie in them."""
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text("b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(code) + b"K\x00K\x01tR(K\x03" + text(order) + parts + b"K\x00K\x00K\x00tb"
    return made + b"(K\x01" + shape + dtype + b"I00\n" + values + b"tb"


LONG = b"\x8a\x08" + struct.pack("<q", 1 << 40)
HALF_MEGABYTE = b"B" + struct.pack("<I", 500_000) + bytes(500_000)

FORGED = {
    "os.system": lambda touch: zoo(Payload(os.system, f"touch {touch}")),
    "builtins.eval": lambda touch: zoo(Payload(eval, f"open({str(touch)!r}, 'w')"), 4),
    "builtins.exec": lambda touch: zoo(Payload(exec, f"open({str(touch)!r}, 'w')"), 0),
    "beside good arrays": lambda touch: pickle.dumps(
        {"model": {"weight": np.ones(2)}, "__author__": "who", "more": Payload(os.system, f"touch {touch}")}
    ),
    "as the author": lambda touch: pickle.dumps({"model": {}, "__author__": Payload(os.system, f"touch {touch}")}),
    "in an array of objects": lambda touch: zoo(np.array([Payload(os.system, f"touch {touch}")], dtype=object)),
    "in an array's state": lambda touch: entry(raw(b"(K\x01t", b"cos\nsystem\n(" + text(f"touch {touch}") + b"tR")),
    "by INST": lambda touch: b"(S'" + f"touch {touch}".encode() + b"'\nios\nsystem\n.",
    "by OBJ": lambda touch: b"(cos\nsystem\nS'" + f"touch {touch}".encode() + b"'\no.",
    "by NEWOBJ": lambda touch: entry(b"cnumpy\nndarray\n(t\x81"),
    "by an extension code": lambda touch: b"\x80\x02\x82\x01.",
    "by a persistent id": lambda touch: entry(text("x") + b"Q"),
    "a module that runs code on import": lambda touch: entry(b"cevil_module\ncall\n(t R".replace(b" ", b"")),
    "the same by STACK_GLOBAL": lambda touch: entry(text("evil_module") + text("call") + b"\x93)R"),
    "a dotted name inside an allowed module": lambda touch: entry(
        text("numpy") + text("lib.npyio.load") + b"\x93(" + text("x") + b"tR"
    ),
    "NumPy's loader of files": lambda touch: entry(b"cnumpy\nload\n(" + text("/etc/passwd") + b"tR"),
    "NumPy's mapping of files": lambda touch: entry(b"cnumpy\nmemmap\n(" + text(str(touch)) + b"tR"),
    "PyTorch's loader": lambda touch: entry(b"ctorch\nload\n(" + text("/etc/passwd") + b"tR"),
    "a second pickle behind the first": lambda touch: zoo(np.ones(2)) + pickle.dumps(Payload(os.system, f"touch {touch}")),
    "a codec that decompresses": lambda touch: entry(b"c_codecs\nencode\n(" + text("x") + text("zlib_codec") + b"tR"),
    "a codec that is looked up": lambda touch: entry(b"c_codecs\nencode\n(" + text("x") + text("evil_module") + b"tR"),
    "an array of a terabyte without its bytes": lambda touch: entry(raw(b"(" + LONG + b"t", b"C\x00")),
    "an array made by its class": lambda touch: entry(b"cnumpy\nndarray\n(" + LONG + b"tR"),
    "a shape whose product overflows": lambda touch: entry(raw(b"(" + LONG * 4 + b"t", b"C\x00")),
    "a negative shape": lambda touch: entry(raw(b"(J\xff\xff\xff\xffJ\xfc\xff\xff\xfft", b"C\x10" + bytes(16))),
    "a shape of truths": lambda touch: entry(raw(b"(\x88t", b"C\x04" + bytes(4))),
    "a shape that is a list": lambda touch: entry(raw(b"]K\x01a", b"C\x04" + bytes(4))),
    "a shape that holds itself": lambda touch: entry(raw(b"]q\x09h\x09a", b"C\x04" + bytes(4))),
    "a hundred dimensions": lambda touch: entry(raw(b"(" + b"K\x01" * 100 + b"t", b"C\x04" + bytes(4))),
    "more bytes than the shape needs": lambda touch: entry(raw(b"(K\x01t", b"C\x08" + bytes(8))),
    "numbers of a kind that is none": lambda touch: entry(raw(b"(K\x01t", b"C\x04" + bytes(4), code="evil_module")),
    "pointers": lambda touch: entry(raw(b"(K\x01t", b"C\x08" + bytes(8), code="O8")),
    "texts": lambda touch: entry(raw(b"(K\x01t", b"C\x04" + bytes(4), code="S4")),
    "structures": lambda touch: entry(raw(b"(K\x01t", b"C\x04" + bytes(4), parts=b"N(" + text("a") + b"t}")),
    "sub-arrays": lambda touch: entry(raw(b"(K\x01t", b"C\x04" + bytes(4), parts=b"(K\x01K\x02tNN")),
    "a byte order that is none": lambda touch: entry(raw(b"(K\x01t", b"C\x04" + bytes(4), order="?")),
    "no array": lambda touch: zoo("text"),
    "an array without values": lambda touch: entry(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tNtR"),
    "an array of another class": lambda touch: entry(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(K\x00tNtR"),
    "a name that is none": lambda touch: pickle.dumps({"model": {7: np.ones(2)}, "__author__": ""}),
    "a function's attributes": lambda touch: entry(b"c_codecs\nencode\nN}" + text("__defaults__") + b")s\x86b"),
    "a class's attributes": lambda touch: entry(b"cnumpy\ndtype\nN}" + text("__init__") + b"Ns\x86b"),
    "one blob in a thousand arrays": lambda touch: (
        b"\x80\x04}" + text("__author__") + text("") + b"s" + text("model") + b"}" + HALF_MEGABYTE + b"q\x050"
        + b"".join(text(str(i)) + raw(b"(J" + struct.pack("<i", 125_000) + b"t", b"h\x05") + b"s" for i in range(1000)) + b"s."
    ),
    "one text encoded ten thousand times": lambda touch: (
        b"\x80\x04" + text("x" * 500_000) + b"q\x020" + (b"c_codecs\nencode\n(h\x02" + text("latin1") + b"tR0") * 10_000 + b"}."
    ),
    "more arrays than a model has": lambda touch: pickle.dumps(
        {"model": {str(i): np.ones(1) for i in range(zoo_pickle.MAX_ARRAYS + 1)}, "__author__": ""}
    ),
    "a memo of two billion entries": lambda touch: b"\x80\x04Nr\xff\xff\xff\x7f.",
    "tuples that unfold without end when hashed": lambda touch: b"\x80\x04})" + b"2\x86" * 60 + b"Ns.",
    "bytes that are said to be exabytes": lambda touch: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "a bytearray that is said to be a terabyte": lambda touch: b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "a frame that is said to be a terabyte": lambda touch: b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"}.",
    "buffers from elsewhere": lambda touch: b"\x80\x05}" + text("a") + b"\x97s.",
}  # fmt: skip


def test_these_payloads_would_run(tmp_path):
    """Control: what the test below refuses does its work in an ordinary unpickler."""
    names = ("os.system", "builtins.eval", "builtins.exec", "beside good arrays", "as the author", "in an array of objects",
             "in an array's state", "by INST", "by OBJ")  # fmt: skip
    for name in names:
        touched = tmp_path / name.replace(" ", "-").replace("'", "")
        try:
            pickle.loads(FORGED[name](touched))
        except (TypeError, ValueError):  # NumPy's, of the state that the call gave
            assert name == "in an array's state"
        assert touched.exists(), name


def test_a_file_of_these_opcodes_is_read(tmp_path):
    """Control: the forgeries differ from good files by their lie alone."""
    (tmp_path / "model.pkl").write_bytes(entry(raw(b"(K\x02t", b"C\x08" + np.arange(2, dtype="f4").tobytes())))
    assert zoo_pickle.read(tmp_path / "model.pkl")["model"]["weight"].tolist() == [0, 1]


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED.keys())
def test_forged_zoo_file(content, tmp_path, sentinel):
    path = tmp_path / "model.pkl"
    path.write_bytes(content(sentinel))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((errors.UnsafeFileError, errors.CorruptFileError)) as caught:
        zoo_pickle.read(path)
    assert caught.value.file == "model.pkl"
    if content in (FORGED["one blob in a thousand arrays"], FORGED["one text encoded ten thousand times"]):
        assert "arrays larger than the file" in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_refused_file_leaves_the_reader_as_it_was(tmp_path):
    """What a pickle says of a function or a class holds for no other file."""
    good = entry(raw(b"(K\x02t", b"C\x08" + bytes(8)))
    for name in ("a function's attributes", "a class's attributes"):
        (tmp_path / "forged.pkl").write_bytes(FORGED[name](tmp_path))
        with pytest.raises((errors.UnsafeFileError, errors.CorruptFileError)):
            zoo_pickle.read(tmp_path / "forged.pkl")
    (tmp_path / "good.pkl").write_bytes(good)
    assert zoo_pickle.read(tmp_path / "good.pkl")["model"]["weight"].tolist() == [0, 0]


def test_a_checkpoint_gives_no_state_to_a_function(tmp_path):
    """As above, of a .pth: a pickle that sets `_rebuild_tensor_v2`'s defaults."""
    forged = b"\x80\x02}" + text("model") + b"}" + text("a")
    forged += b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__defaults__") + b")s\x86bss."
    torch.save({"model": {}}, tmp_path / "saved_model.pth")
    with zipfile.ZipFile(tmp_path / "saved_model.pth") as archive:
        folder = archive.namelist()[0].partition("/")[0]
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "forged.pth"))
    writer.write_record("data.pkl", forged, len(forged))
    writer.write_end_of_file()
    assert folder
    defaults = weights._tensor.__defaults__
    with pytest.raises(errors.CorruptFileError):
        weights.read(tmp_path, "forged.pth")
    assert weights._tensor.__defaults__ == defaults


@pytest.mark.parametrize("name", ["model.pkl", "model.pth"])
def test_building_from_a_forged_file_runs_nothing_and_says_what_to_give(name, tmp_path, sentinel):
    cfg = tiny_cfg()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    forged = tmp_path / name
    if name == "model.pkl":
        forged.write_bytes(FORGED["beside good arrays"](sentinel))
    else:
        torch.save({"model": built(cfg).state_dict(), "hooks": Payload(os.system, f"touch {sentinel}")}, forged)
    with pytest.raises(errors.UnsafeFileError, match=r"system.*give a file written by torch\.save"):
        from_files.build(str(tmp_path / "config.yaml"), str(forged))


CONFIGS = {
    "a tag that calls": "MODEL: !!python/object/apply:os.system ['touch {touch}']\n",
    "a tag that evaluates": "MODEL:\n  WEIGHTS: !!python/object/apply:eval [\"open('{touch}', 'w')\"]\n",
    "a tag that imports": "MODEL: !!python/module:evil_module\n",
    "_BASE_ to an address": "_BASE_: http://127.0.0.1:9/base.yaml\n",
    "_BASE_ to a store of Detectron2's": "_BASE_: detectron2://base.yaml\n",
    "_BASE_ among several": "_BASE_: ['https://127.0.0.1:9/base.yaml']\n",
    "_BASE_ to itself": "_BASE_: config.yaml\n",
    "_BASE_ to a device": "_BASE_: /dev/zero\n",
    "aliases that unfold": "b0: &b0 {k: x}\n" + "".join(f"b{i}: &b{i} {{k: *b{i - 1}, l: *b{i - 1}}}\n" for i in range(1, 40)),
    "nesting that overflows the C stack": "a: " + "[" * 100_000 + "]" * 100_000,
    "five megabytes": "A: " + "x" * (5 << 20),
    "no mapping": "7\n",
    "nothing": "",
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS.keys())
def test_forged_config_file(content, tmp_path, sentinel):
    (tmp_path / "config.yaml").write_text(content.replace("{touch}", str(sentinel)))
    with pytest.raises(errors.DetectronError):
        from_files.build(str(tmp_path / "config.yaml"), "none.pth")


def test_config_that_is_a_program_is_not_run(tmp_path, sentinel):
    (tmp_path / "config.py").write_text("import evil_module\n")
    with pytest.raises(errors.UntrustedCodeError, match="--trust-remote-code"):
        from_files.build(str(tmp_path / "config.py"), "none.pth")
