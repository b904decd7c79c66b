"""Models that name or bring code: what a forged one can make this process import, with trust and without it.

A forger can write every file of a model, so each forgery is sealed with a manifest whose digests are right. Modules that must
not be imported touch a file when they are.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bentoml
import pytest
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from omegaconf import OmegaConf
from torch import nn

from bentoml_detectron import errors, verify
from bentoml_detectron.artifact import code, manifest
from support import built, small_cfg

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """One saved model of each kind of config, outside the store."""
    node = OmegaConf.create(L(nn.Linear)(in_features=2, out_features=3))
    saved = {
        "yacs": bentoml.detectron.save_model("hostile", built(small_cfg()), small_cfg(), self_test=False),
        "lazy": bentoml.detectron.save_model("hostile", instantiate(node), node, self_test=False),
    }
    folders = {}
    for kind, model in saved.items():
        folders[kind] = tmp_path_factory.mktemp(kind) / "model"
        shutil.copytree(model.path, folders[kind])
        bentoml.models.delete(model.tag)
    return folders


@pytest.fixture
def forged(models, store) -> Iterator[Callable[[str], Path]]:
    """A copy in the store, to forge."""
    made = []

    def of(kind: str = "yacs") -> Path:
        text = (models[kind] / "model.yaml").read_text()
        version = next(line.split()[1] for line in text.splitlines() if line.startswith("version:"))
        target = store / "hostile" / version
        shutil.copytree(models[kind], target)
        made.append(target)
        return target

    yield of
    for target in made:
        shutil.rmtree(target)


@pytest.fixture
def touched(tmp_path, monkeypatch) -> Iterator[Path]:
    """A file that hostile code makes, and modules of this process that it would replace."""
    before = {name: module for name, module in sys.modules.items() if isinstance(module, types.ModuleType)}
    yield tmp_path / "touched"
    assert not any(each.endswith(code.ARCHIVE) for each in sys.path)
    assert all(sys.modules.get(name) is module for name, module in before.items()), "a module was replaced"
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0].startswith(("evil", "colorsys_", "tabnanny_")):
            del sys.modules[name]


def payload(touched: Path) -> str:
    return f"open({str(touched)!r}, 'w').close()\n"


def archive(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return buffer.getvalue()


def forge(model: Path, names: list[str] | None, content: bytes | None, **changes: Any) -> None:
    """Gives a model these external modules and this archive, with right digests for all."""
    said = json.loads((model / manifest.MANIFEST).read_text())
    said.pop(manifest.DIGEST)
    if content is not None:
        (model / code.ARCHIVE).write_bytes(content)
    if names is not None:
        said["external_modules"] = names
    said |= changes
    said["files"] = {
        path.name: manifest.record(model, path.name).model_dump() for path in model.iterdir() if path.name != manifest.MANIFEST
    }
    (model / manifest.MANIFEST).write_bytes(manifest.spell(said))


def load(model: Path, **options: Any) -> Any:
    return bentoml.detectron.load_model(f"hostile:{model.name}", **options)


NAMES = [
    "../x",
    "/etc/x",
    "",
    ".",
    "..",
    "a..b",
    ".a",
    "a.",
    "a b",
    "a;b",
    "a\n",
    "a/b",
    "a\\b",
    "a-b",
    "1a",
    "é",
    "a\0",
    "__main__.x y",
]
PYTHONS = ["os", "os.path", "sys", "builtins", "importlib", "json", "pickle", "colorsys", "tabnanny", "encodings.evil"]


class TestNames:
    @pytest.mark.parametrize("name", NAMES, ids=ascii)
    @pytest.mark.parametrize("trust", [False, True])
    def test_what_is_no_name_of_a_module_is_refused(self, name, trust, forged, touched):
        model = forged()
        forge(model, [name], archive({f"{name}.py": payload(touched), f"{name}/__init__.py": payload(touched)}))
        with pytest.raises(errors.InvalidModelError, match="is not a valid name for a module"):
            load(model, trust_remote_code=trust)
        assert not touched.exists()

    @pytest.mark.parametrize("name", PYTHONS)
    @pytest.mark.parametrize("trust", [False, True])
    def test_python_s_own_modules_cannot_be_brought(self, name, trust, forged, touched):
        """Imported already or not."""
        model = forged()
        top = name.partition(".")[0]
        forge(model, [name], archive({f"{top}.py": payload(touched), f"{top}/__init__.py": payload(touched)}))
        with pytest.raises(errors.InvalidModelError, match="is not a valid name for a module bundled with a model"):
            load(model, trust_remote_code=trust)
        assert not touched.exists()

    @pytest.mark.parametrize("name", ["torch", "numpy", "detectron2", "bentoml", "bentoml_detectron", "detectron2.modeling"])
    def test_imported_packages_cannot_be_replaced(self, name, forged, touched):
        """With trust too; the model's copy is not imported."""
        model = forged()
        top = name.partition(".")[0]
        forge(
            model, [name], archive({f"{top}/__init__.py": payload(touched), f"{name.replace('.', '/')}.py": payload(touched)})
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(model, trust_remote_code=True)
        assert any(f"imported a {top!r} that differs" in str(each.message) for each in caught)
        assert not touched.exists()

    @pytest.mark.parametrize("name", ["evil", "evil.inner", "sklearn", "evil_package"])
    def test_without_trust_nothing_happens(self, name, forged, touched):
        """The model needs none of it, so it loads, and none of it is imported."""
        model = forged()
        before = set(sys.modules)
        forge(model, [name], archive({f"{name.replace('.', '/')}/__init__.py": payload(touched)}))
        load(model)
        assert verify(f"hostile:{model.name}").ok
        assert not touched.exists()
        assert name not in set(sys.modules) - before

    def test_control_with_trust_it_would_run(self, forged, touched):
        model = forged()
        forge(model, ["evil"], archive({"evil.py": payload(touched)}))
        load(model, trust_remote_code=True)
        assert touched.exists()


class TestArchive:
    def test_what_is_beside_the_listed_modules_is_not_imported(self, forged, touched):
        """Nor found by who imports it: another package, a module of Python's that was not imported yet, a module of a path."""
        model = forged()
        assert "tabnanny" not in sys.modules
        members = {name: payload(touched) for name in ("evil_other.py", "tabnanny.py", "sitecustomize.py", "evil_pth.pth")}
        forge(model, ["evil"], archive({"evil.py": "X = 1\nimport tabnanny\n", **members}))
        load(model, trust_remote_code=True)
        assert sys.modules["evil"].X == 1
        assert not touched.exists()
        assert ".zip" not in sys.modules["tabnanny"].__file__
        for name in ("evil_other", "evil_pth"):
            with pytest.raises(ModuleNotFoundError):
                __import__(name)
        del sys.modules["tabnanny"]

    def test_listed_module_cannot_import_a_neighbour_that_is_not_listed(self, forged, touched):
        model = forged()
        forge(model, ["evil"], archive({"evil.py": "import evil_other\n", "evil_other.py": payload(touched)}))
        with pytest.raises(errors.InvalidModelError, match="No module named 'evil_other'"):
            load(model, trust_remote_code=True)
        assert not touched.exists()

    @pytest.mark.parametrize("inside", ["../evil_up.py", "/tmp/evil_abs.py", "..\\evil_win.py", "evil/../../evil_deep.py"])
    def test_paths_that_lead_elsewhere_are_harmless(self, inside, forged, touched):
        """Nothing is extracted."""
        model = forged()
        forge(model, ["evil"], archive({"evil/__init__.py": "", inside: payload(touched)}))
        before = {path for folder in (model, *model.parents[:3]) for path in folder.iterdir()}
        load(model, trust_remote_code=True)
        assert {path for folder in (model, *model.parents[:3]) for path in folder.iterdir()} == before
        assert not Path("/tmp/evil_abs.py").exists()
        assert not touched.exists()

    @pytest.mark.parametrize(
        "content",
        [b"", b"no archive", b"PK\5\6" + b"\0" * 18, archive({"evil.py": "X = 1"})[:-5]],
        ids=["empty", "text", "none", "cut"],
    )
    def test_what_is_no_archive_is_a_typed_error(self, content, forged):
        model = forged()
        forge(model, ["evil"], content)
        with pytest.raises(errors.InvalidModelError) as caught:
            load(model, trust_remote_code=True)
        assert caught.value.file == code.ARCHIVE

    def test_archive_that_unfolds_to_more_than_the_limit_is_refused(self, forged, touched):
        """32 MB in 32 KB."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("evil.py", payload(touched))
            file.writestr("evil_large.py", "#" * (32 << 20))
        model = forged()
        forge(model, ["evil"], buffer.getvalue())
        with pytest.raises(errors.CorruptFileError, match="more than 16,777,216 bytes"):
            load(model, trust_remote_code=True)
        assert not touched.exists()

    def test_archive_that_lies_about_its_sizes_is_refused(self, forged, touched):
        """The directory says one byte; the data say more."""
        content = bytearray(archive({"evil.py": payload(touched)}))
        start = content.index(b"PK\1\2")
        content[start + 24 : start + 28] = (1).to_bytes(4, "little")
        model = forged()
        forge(model, ["evil"], bytes(content))
        with pytest.raises(errors.InvalidModelError):
            load(model, trust_remote_code=True)
        assert not touched.exists()

    def test_archive_that_is_a_link_or_a_folder_is_refused(self, forged, tmp_path, touched):
        (tmp_path / "real.zip").write_bytes(archive({"evil.py": payload(touched)}))
        model = forged()
        forge(model, ["evil"], (tmp_path / "real.zip").read_bytes())
        path = model / code.ARCHIVE
        path.unlink()
        path.symlink_to(tmp_path / "real.zip")
        with pytest.raises(errors.UnsafeFileError):
            load(model, trust_remote_code=True)
        path.unlink()
        path.mkdir()
        with pytest.raises(errors.UnsafeFileError):
            load(model, trust_remote_code=True)
        assert not touched.exists()

    def test_manifest_names_modules_and_there_is_no_archive(self, forged):
        model = forged()
        forge(model, ["evil"], None)
        with pytest.raises(errors.CorruptFileError, match=r"does not list external_modules\.zip"):
            load(model, trust_remote_code=True)
        load(model)

    def test_archive_that_the_manifest_names_no_modules_of(self, forged, touched):
        model = forged()
        forge(model, [], archive({"evil.py": payload(touched)}))
        load(model, trust_remote_code=True)
        assert "evil" not in sys.modules
        assert not touched.exists()

    def test_archive_that_the_manifest_does_not_list_is_a_problem_of_verify(self, forged, touched):
        model = forged()
        (model / code.ARCHIVE).write_bytes(archive({"evil.py": payload(touched)}))
        report = verify(f"hostile:{model.name}", trust_remote_code=True)
        assert report.problems == (f"{code.ARCHIVE} is not a file of this model; it was added later",)
        assert not touched.exists()

    def test_listed_module_that_is_not_in_the_archive(self, forged, touched):
        model = forged()
        forge(model, ["evil_absent"], archive({"evil.py": payload(touched)}))
        with pytest.raises(errors.InvalidModelError, match="importing evil_absent"):
            load(model, trust_remote_code=True)
        assert not touched.exists()


class TestEntries:
    """Registry entries whose module the manifest names."""

    @pytest.fixture
    def installed(self, tmp_path, monkeypatch, touched):
        for name in ("evil_installed", "detectron2_evil"):
            (tmp_path / f"{name}.py").write_text(payload(touched))
        monkeypatch.syspath_prepend(str(tmp_path))

    @pytest.mark.parametrize(
        "module", ["evil_installed", "detectron2_evil", "detectron2.", "..evil_installed", "", "evil_installed\n"]
    )
    @pytest.mark.parametrize("options", [{}, {"trusted": ["evil"]}, {"trust_remote_code": True}], ids=str)
    def test_module_that_is_not_trusted_is_not_imported(self, module, options, forged, touched, installed):
        """`trust_remote_code` is about what the model brings, not about what is installed."""
        model = forged()
        entry = {"registry": "BACKBONE", "name": "nobody", "module": module}
        forge(model, ["evil"], archive({"evil.py": ""}), registry_entries=[entry])
        with pytest.raises(errors.InvalidModelError):
            load(model, **options)
        assert not touched.exists()

    @pytest.mark.parametrize("trusted", [["os"], ["evil_installed.x"], ["evil_installe"], ["*"], ["."], ["evil_*"]], ids=str)
    def test_trusting_something_else_is_not_enough(self, trusted, forged, touched, installed):
        model = forged()
        forge(model, None, None, registry_entries=[{"registry": "BACKBONE", "name": "nobody", "module": "evil_installed"}])
        with pytest.raises((errors.UntrustedCodeError, errors.InvalidArgumentError)):
            load(model, trusted=trusted)
        assert not touched.exists()

    def test_model_that_brings_a_module_along_does_not_make_the_installed_one_trusted(self, forged, touched, installed):
        model = forged()
        entry = {"registry": "BACKBONE", "name": "nobody", "module": "evil_installed"}
        forge(model, ["evil_installed"], archive({"evil_installed.py": "X = 1\n"}), registry_entries=[entry])
        with pytest.raises(errors.UntrustedCodeError):
            load(model)
        assert "evil_installed" not in sys.modules
        load(model, trust_remote_code=True)
        assert sys.modules["evil_installed"].X == 1  # the model's, whatever is installed
        assert not touched.exists()


class TestLazy:
    @pytest.mark.parametrize("trust", [False, True])
    def test_name_that_is_not_allowed_is_refused(self, trust, forged, touched):
        """Also with trust in what the model brings, which is another module."""
        model = forged("lazy")
        config = f'_target_: os.system\ncommand: "touch {touched}"\n'
        (model / "config.yaml").write_text(config)
        forge(model, ["evil"], archive({"evil.py": ""}))
        with pytest.raises(errors.UntrustedCodeError, match=r"os\.system"):
            load(model, trust_remote_code=trust)
        assert not touched.exists()

    def test_nothing_is_imported_before_every_name_is_checked(self, forged, touched, tmp_path, monkeypatch):
        (tmp_path / "evil_named.py").write_text(payload(touched) + "class A:\n    pass\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        model = forged("lazy")
        (model / "config.yaml").write_text(
            "_target_: torch.nn.Linear\nin_features: {_target_: evil_named.A}\nout_features: 3\n"
        )
        forge(model, None, None)
        with pytest.raises(errors.UntrustedCodeError):
            load(model)
        assert not touched.exists()

    @pytest.mark.parametrize("kind", ["yacs", "lazy"])
    def test_manifest_that_says_the_other_kind_of_config(self, kind, forged, touched):
        model = forged(kind)
        forge(model, None, None, config="lazy" if kind == "yacs" else "yacs")
        with pytest.raises(errors.InvalidModelError):
            load(model)
        assert not verify(f"hostile:{model.name}").ok

    @pytest.mark.parametrize("text", ["7", "[]", "{}", "a: 1", "_target_: 7", "_target_: torch.nn.Linear", "_target_: torch"])
    def test_config_that_builds_nothing(self, text, forged):
        model = forged("lazy")
        (model / "config.yaml").write_text(text)
        forge(model, None, None, config_tuples=[])
        with pytest.raises(errors.InvalidModelError):
            load(model)

    def test_lazy_model_that_says_it_is_a_predictor(self, forged):
        """In the manifest alone, in the record alone, and in both."""
        model = forged("lazy")
        forge(model, None, None, kind="predictor")
        with pytest.raises(errors.InvalidModelError, match="_is_predictor=False"):
            load(model)
        record = model / "model.yaml"
        record.write_text(record.read_text().replace("_is_predictor: false", "_is_predictor: true"))
        forge(model, None, None, kind="module")
        with pytest.raises(errors.InvalidModelError, match="_is_predictor=True"):
            load(model)
        forge(model, None, None, kind="predictor")
        with pytest.raises(errors.InvalidModelError, match="predictor"):
            load(model)
        with pytest.raises(errors.InvalidModelError, match="predictor"):
            bentoml.detectron.load_predictor(f"hostile:{model.name}")
        assert not verify(f"hostile:{model.name}").ok
