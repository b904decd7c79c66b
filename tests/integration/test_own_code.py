"""Models with code of their own: installed and trusted by name, or as source that the model brings along."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import textwrap
import threading
import types
import warnings
import zipfile
from pathlib import Path

import bentoml
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY
from omegaconf import OmegaConf

from bentoml_detectron import errors, verify
from bentoml_detectron.artifact import code
from support import BLOCK_NETWORK, assert_same, built, picture, run_python, small_cfg, tensors, tiny_cfg

pytestmark = pytest.mark.slow
REGISTRIES = (META_ARCH_REGISTRY, BACKBONE_REGISTRY, ROI_HEADS_REGISTRY, ROI_BOX_HEAD_REGISTRY)

PACKAGE = {
    "__init__.py": """
        with open({marker!r}, "a") as file:
            file.write(__name__ + chr(10))
        from . import backbones, heads
    """,
    "backbones/__init__.py": """
        with open({marker!r}, "a") as file:
            file.write(__name__ + chr(10))
        from .plain import build_own_backbone
    """,
    "backbones/plain.py": """
        import torch
        from detectron2.layers import ShapeSpec
        from detectron2.modeling import BACKBONE_REGISTRY, Backbone
        from ..parts.blocks import block

        class PlainBackbone(Backbone):
            def __init__(self, channels: int = 8):
                super().__init__()
                self.first, self.second = block(3, channels), block(channels, channels)
                self._out_features = ["p2"]
                self._out_feature_channels, self._out_feature_strides = {{"p2": channels}}, {{"p2": 4}}

            def forward(self, x):
                return {{"p2": self.second(self.first(x)) * {factor}}}

        @BACKBONE_REGISTRY.register()
        def build_own_backbone(cfg, input_shape):
            return PlainBackbone()
    """,
    "parts/__init__.py": "",
    "parts/blocks.py": """
        from torch import nn

        def block(before, after):
            return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU())
    """,
    "heads.py": """
        from detectron2.layers import ShapeSpec
        from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, GeneralizedRCNN, StandardROIHeads
        from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY
        from torch import nn
        import torch

        @META_ARCH_REGISTRY.register()
        class OwnRCNN(GeneralizedRCNN):
            pass

        @ROI_HEADS_REGISTRY.register()
        class OwnROIHeads(StandardROIHeads):
            pass

        @ROI_BOX_HEAD_REGISTRY.register()
        class OwnBoxHead(nn.Module):
            def __init__(self, cfg, input_shape):
                super().__init__()
                self.fc = nn.Linear(input_shape.channels * input_shape.height * input_shape.width, 16)

            @property
            def output_shape(self):
                return ShapeSpec(channels=16)

            def forward(self, x):
                return torch.tanh(self.fc(x.flatten(1)))
    """,
}

FRESH = (
    BLOCK_NETWORK
    + """
import json, bentoml, torch

tag, package, image, output, options = sys.argv[1:]
loaded = bentoml.detectron.load_model(tag, **json.loads(options))
with torch.no_grad():
    result = loaded([{"image": torch.load(image)}])[0]["instances"]
torch.save({"boxes": result.pred_boxes.tensor, "scores": result.scores, "classes": result.pred_classes}, output)
print(sys.modules[package].__file__)
"""
)


def own_cfg():
    cfg = tiny_cfg("OwnRCNN")
    cfg.MODEL.BACKBONE.NAME = "build_own_backbone"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8, 16, 32]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2"]
    cfg.MODEL.ROI_HEADS.NAME = "OwnROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "OwnBoxHead"
    return cfg


def image() -> torch.Tensor:
    return torch.as_tensor(picture().transpose(2, 0, 1).copy())


def outputs(module: torch.nn.Module):
    with torch.no_grad():
        result = module([{"image": image()}])[0]["instances"]
    return {"boxes": result.pred_boxes.tensor, "scores": result.scores, "classes": result.pred_classes}


def manifest_of(saved: bentoml.Model) -> dict:
    return json.loads(Path(saved.path_of("manifest.json")).read_text())


class Source:
    """A package in a folder of its own, which this process may import and forget."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.marker = folder / "imported"
        self.registries = [(registry, dict(registry._obj_map)) for registry in REGISTRIES]
        self.names: set[str] = set()
        folder.mkdir()

    def write(self, name: str = "ownpkg", factor: float = 1.0, files: dict[str, str] | None = None) -> None:
        for inside, text in (files or PACKAGE).items():
            path = self.folder / (f"{name}.py" if inside == "" else f"{name}/{inside}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text).format(marker=str(self.marker), factor=factor))
        self.names.add(name)
        importlib.invalidate_caches()

    def imported(self, name: str = "ownpkg") -> types.ModuleType:
        self.monkeypatch.syspath_prepend(str(self.folder))
        return importlib.import_module(name)

    def forget(self) -> None:
        """As in a process that never imported it, where it is not installed."""
        for name in list(sys.modules):
            if name.partition(".")[0] in self.names:
                del sys.modules[name]
        for registry, entries in self.registries:
            registry._obj_map.clear()
            registry._obj_map.update(entries)
        sys.path[:] = [each for each in sys.path if each != str(self.folder)]
        self.marker.unlink(missing_ok=True)

    def environment(self) -> dict[str, str]:
        """For a process where it is installed."""
        return {"PYTHONPATH": os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.fixture
def source(tmp_path, monkeypatch):
    source = Source(tmp_path / "source", monkeypatch)
    source.write()
    yield source
    source.forget()


@pytest.fixture
def installed(source):
    """A saved model whose code is installed elsewhere, what it finds, and its source; this process has forgotten the code."""
    source.imported()
    module = built(own_cfg())
    with pytest.warns(UserWarning, match=r"needs \w+, which is defined in the module ownpkg\.\S+, which no installed package"):
        saved = bentoml.detectron.save_model("installed", module, own_cfg())
    expected = outputs(module)
    source.forget()
    return saved, expected, source


@pytest.fixture
def carried(source):
    """The same for a model that brings its code along."""
    package = source.imported()
    module = built(own_cfg())
    saved = bentoml.detectron.save_model("carried", module, own_cfg(), external_modules=[package])
    expected = outputs(module)
    source.forget()
    return saved, expected, source


class TestInstalled:
    """Code that a distribution has: the caller names what may be imported."""

    def test_manifest_says_which_entries_the_config_names_and_where_they_are(self, installed):
        entries = {(each["registry"], each["name"], each["module"]) for each in manifest_of(installed[0])["registry_entries"]}
        assert {
            ("META_ARCH", "OwnRCNN", "ownpkg.heads"),
            ("BACKBONE", "build_own_backbone", "ownpkg.backbones.plain"),
            ("ROI_HEADS", "OwnROIHeads", "ownpkg.heads"),
            ("ROI_BOX_HEAD", "OwnBoxHead", "ownpkg.heads"),
        } <= entries

    @pytest.mark.parametrize("trusted", [["ownpkg"], ["ownpkg.heads", "ownpkg.backbones"]], ids=str)
    def test_trusted_code_is_imported_and_the_model_is_the_same(self, trusted, installed):
        saved, expected, source = installed
        source.monkeypatch.syspath_prepend(str(source.folder))
        assert_same(outputs(bentoml.detectron.load_model(saved, trusted=trusted)), expected)

    @pytest.mark.parametrize("trusted", [[], ["ownpk"], ["ownpkg.heads.OwnRCNN"]], ids=str)
    def test_without_trust_nothing_is_imported_and_the_error_says_whom_to_trust(self, trusted, installed):
        saved, _, source = installed
        source.monkeypatch.syspath_prepend(str(source.folder))
        with pytest.raises(errors.UntrustedCodeError, match=r"trusted=\['ownpkg\.") as caught:
            bentoml.detectron.load_model(saved, trusted=trusted)
        assert caught.value.value.startswith("ownpkg.")
        assert not source.marker.exists()
        assert "ownpkg" not in sys.modules

    @pytest.mark.slow
    def test_one_trusted_module_does_not_make_another_trusted(self, installed):
        """Its own imports, and the packages above it, aside."""
        saved, _, source = installed
        (source.folder / "ownpkg/__init__.py").write_text("")
        source.monkeypatch.syspath_prepend(str(source.folder))
        with pytest.raises(errors.UntrustedCodeError, match=r"trusted=\['ownpkg\.heads'\]"):
            bentoml.detectron.load_model(saved, trusted=["ownpkg.backbones"])

    @pytest.mark.slow
    @pytest.mark.parametrize("trusted", ["ownpkg", [7], [""], 7, ["a b"]], ids=str)
    def test_trusted_that_is_no_list_of_names_is_refused(self, trusted, installed):
        with pytest.raises(errors.InvalidArgumentError, match=r"give (a list|the names) of modules"):
            bentoml.detectron.load_model(installed[0], trusted=trusted)

    @pytest.mark.slow
    @pytest.mark.parametrize("says", ["raise RuntimeError('no such GPU')", "import nothing_of_that_name", "1 +"])
    def test_trusted_code_that_fails_is_a_typed_error(self, says, installed):
        """Also a report of verify's."""
        saved, _, source = installed
        source.monkeypatch.syspath_prepend(str(source.folder))
        (source.folder / "ownpkg/heads.py").write_text(says)
        with pytest.raises(errors.UnknownEntryError, match="importing it failed"):
            bentoml.detectron.load_model(saved, trusted=["ownpkg"])
        assert "importing it failed" in verify(saved, trusted=["ownpkg"]).problems[0]

    @pytest.mark.slow
    def test_trusted_module_that_lacks_the_entry_is_a_typed_error(self, installed):
        saved, _, source = installed
        source.monkeypatch.syspath_prepend(str(source.folder))
        (source.folder / "ownpkg/backbones/plain.py").write_text("build_own_backbone = None")
        with pytest.raises(errors.UnknownEntryError, match="build_own_backbone"):
            bentoml.detectron.load_model(saved, trusted=["ownpkg"])

    @pytest.mark.slow
    @pytest.mark.parametrize("call", [bentoml.detectron.load_predictor, verify], ids=["load_predictor", "verify"])
    def test_predictor_and_verify_take_trusted(self, call, installed):
        saved, _, source = installed
        source.monkeypatch.syspath_prepend(str(source.folder))
        if call is verify:
            assert "trusted=['ownpkg." in verify(saved).problems[0]
            assert not source.marker.exists()
            report = verify(saved, trusted=["ownpkg"])
            assert report.ok
            assert report.identical
        else:
            with pytest.raises(errors.UntrustedCodeError):
                call(saved)
            assert len(call(saved, trusted=["ownpkg"])([picture()])[0]) > 0

    @pytest.mark.slow
    def test_in_a_fresh_process(self, installed, tmp_path):
        """Refused without trust, with nothing imported; with it, the same outputs bit for bit."""
        saved, expected, source = installed
        torch.save(image(), tmp_path / "image.pth")
        arguments = [str(saved.tag), "ownpkg", str(tmp_path / "image.pth"), str(tmp_path / "result.pth")]
        refused = run_python(FRESH, *arguments, "{}", check=False, **source.environment())
        assert "trusted=['ownpkg." in refused.stderr
        assert not source.marker.exists()
        done = run_python(FRESH, *arguments, '{"trusted": ["ownpkg"]}', **source.environment())
        assert done.stdout.strip() == str(source.folder / "ownpkg/__init__.py")
        assert_same(torch.load(tmp_path / "result.pth"), expected)

    @pytest.mark.slow
    def test_code_of_main_is_taken_in_the_process_that_has_it(self, source, monkeypatch):
        """Another process is told which entry is missing."""
        source.imported()
        saved_class = type("MainRCNN", (META_ARCH_REGISTRY.get("OwnRCNN"),), {"__module__": "__main__"})
        monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "MainRCNN", saved_class)
        cfg = own_cfg()
        cfg.MODEL.META_ARCHITECTURE = "MainRCNN"
        with pytest.warns(
            UserWarning, match="needs MainRCNN, which is defined in this program's own file: elsewhere it cannot"
        ):
            saved = bentoml.detectron.save_model("main", built(cfg), cfg)
        assert type(bentoml.detectron.load_model(saved)) is saved_class
        monkeypatch.delitem(META_ARCH_REGISTRY._obj_map, "MainRCNN")
        with pytest.raises(errors.UnknownEntryError, match="MainRCNN"):
            bentoml.detectron.load_model(saved)


class TestCarried:
    """Code that travels inside the model."""

    def test_what_it_imports_and_does_not_bring_along_is_told_when_it_is_saved(self, source):
        source.write("sibling", files={"": "x = 1"})
        source.imported("sibling")
        source.write("flat", files={"": "import sibling, os, torch\n\ndef later():\n    import not_imported_here\n"})
        module = source.imported("flat")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            bentoml.detectron.save_model("flat", built(small_cfg()), small_cfg(), external_modules=[module])
        assert [str(each.message) for each in told if "external_modules" in str(each.message)] == [
            "the model's external_modules import sibling, which no installed package provides: elsewhere the model cannot be "
            "loaded; add what is missing to external_modules"
        ]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*external_modules")
            both = [module, sys.modules["sibling"]]
            bentoml.detectron.save_model("both", built(small_cfg()), small_cfg(), external_modules=both)

    @pytest.mark.parametrize("given", [torch, "torch", 7], ids=["a module", "a name", "a number"])
    def test_what_is_no_list_of_modules_is_refused(self, given):
        with pytest.raises(errors.InvalidArgumentError, match=r"give a list of modules, as \[my_package\]"):
            bentoml.detectron.save_model("none", built(small_cfg()), small_cfg(), external_modules=given)

    def test_model_holds_the_source_and_says_so(self, carried):
        saved, _, source = carried
        assert manifest_of(saved)["external_modules"] == ["ownpkg"]
        with zipfile.ZipFile(saved.path_of("external_modules.zip")) as archive:
            inside = {name: archive.read(name) for name in archive.namelist()}
        assert inside == {f"ownpkg/{name}": (source.folder / "ownpkg" / name).read_bytes() for name in PACKAGE}

    def test_same_source_is_the_same_archive(self, source, tmp_path):
        package = source.imported()
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            code.write(tmp_path / name, [package])
        assert (tmp_path / "one" / code.ARCHIVE).read_bytes() == (tmp_path / "two" / code.ARCHIVE).read_bytes()

    def test_trusted_model_loads_where_the_package_is_not_and_is_the_same(self, carried):
        saved, expected, _ = carried
        assert_same(outputs(bentoml.detectron.load_model(saved, trust_remote_code=True)), expected)
        assert sys.modules["ownpkg.parts.blocks"].__file__.startswith(str(Path(saved.path) / code.ARCHIVE))

    @pytest.mark.parametrize("options", [{}, {"trusted": ["other"]}], ids=str)
    def test_untrusted_model_is_refused_and_nothing_is_executed(self, options, carried):
        saved, _, source = carried
        with pytest.raises(errors.UntrustedCodeError, match="trust_remote_code=True"):
            bentoml.detectron.load_model(saved, **options)
        assert not source.marker.exists()
        assert "ownpkg" not in sys.modules

    @pytest.mark.slow
    def test_installed_copy_can_be_trusted_instead(self, carried):
        """Who has the package need not run the model's."""
        saved, expected, source = carried
        source.monkeypatch.syspath_prepend(str(source.folder))
        assert_same(outputs(bentoml.detectron.load_model(saved, trusted=["ownpkg"])), expected)
        assert sys.modules["ownpkg"].__file__ == str(source.folder / "ownpkg/__init__.py")

    @pytest.mark.slow
    def test_in_a_fresh_process_without_the_package(self, carried, tmp_path):
        """Refused without trust, with nothing executed; with it, the same outputs bit for bit."""
        saved, expected, source = carried
        torch.save(image(), tmp_path / "image.pth")
        shutil.rmtree(source.folder / "ownpkg")
        arguments = [str(saved.tag), "ownpkg", str(tmp_path / "image.pth"), str(tmp_path / "result.pth")]
        refused = run_python(FRESH, *arguments, "{}", check=False)
        assert "UntrustedCodeError" in refused.stderr
        assert not source.marker.exists()
        done = run_python(FRESH, *arguments, '{"trust_remote_code": true}')
        assert done.stdout.strip() == str(Path(saved.path) / code.ARCHIVE / "ownpkg/__init__.py")
        assert source.marker.exists()
        assert_same(torch.load(tmp_path / "result.pth"), expected)

    @pytest.mark.parametrize("trust", [False, True])
    def test_lazy_model_of_that_package(self, trust, source):
        package = source.imported()
        cfg = lazy_own(package)
        torch.manual_seed(0)
        module = instantiate(cfg).eval()
        saved = bentoml.detectron.save_model("lazy-carried", module, cfg, external_modules=[package])
        expected = tensors(module([{"image": image()}]))
        source.forget()
        if trust:
            loaded = bentoml.detectron.load_model(saved, trust_remote_code=True)
            assert_same(tensors(loaded([{"image": image()}])), expected)
        else:
            with pytest.raises(errors.UntrustedCodeError, match="trust_remote_code=True"):
                bentoml.detectron.load_model(saved)
            assert not source.marker.exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("call", [bentoml.detectron.load_predictor, verify], ids=["load_predictor", "verify"])
    def test_predictor_and_verify_take_trust_remote_code(self, call, carried):
        saved, _, source = carried
        if call is verify:
            assert "trust_remote_code=True" in verify(saved).problems[0]
            assert not source.marker.exists()
            report = verify(saved, trust_remote_code=True)
            assert report.ok
            assert report.identical
        else:
            with pytest.raises(errors.UntrustedCodeError):
                call(saved)
            assert not source.marker.exists()
            assert len(call(saved, trust_remote_code=True)([picture()])[0]) > 0

    def test_single_file_module(self, source):
        """Beside a package, and with names in it that are not the file's."""
        source.write("ownfile", files={"": "from torch import nn\nclass Own(nn.Linear):\n    pass\n"})
        module = source.imported("ownfile")
        cfg = OmegaConf.create(L(module.Own)(in_features=2, out_features=3))
        model = instantiate(cfg)
        saved = bentoml.detectron.save_model("file", model, cfg, external_modules=[module], self_test=False)
        with zipfile.ZipFile(saved.path_of("external_modules.zip")) as archive:
            assert archive.namelist() == ["ownfile.py"]
        source.forget()
        loaded = bentoml.detectron.load_model(saved, trust_remote_code=True)
        assert torch.equal(loaded.weight, model.weight)

    @pytest.mark.slow
    def test_submodule_brings_its_whole_package(self, source):
        """Relative imports need it."""
        source.imported()
        module = built(own_cfg())
        expected = outputs(module)
        heads = sys.modules["ownpkg.heads"]
        saved = bentoml.detectron.save_model("submodule", module, own_cfg(), external_modules=[heads])
        assert manifest_of(saved)["external_modules"] == ["ownpkg.heads"]
        source.forget()
        assert_same(outputs(bentoml.detectron.load_model(saved, trust_remote_code=True)), expected)

    def test_two_packages_that_import_each_other(self, source):
        source.write("ownbase", files={"__init__.py": "def twice(x):\n    return 2 * x\n"})
        source.write(
            "ownuser",
            files={"__init__.py": "from torch import nn\nimport ownbase\nclass Own(nn.Linear):\n    two = ownbase.twice(1)\n"},
        )
        user = source.imported("ownuser")
        cfg = OmegaConf.create(L(user.Own)(in_features=2, out_features=3))
        both = [user, sys.modules["ownbase"]]
        saved = bentoml.detectron.save_model("both", instantiate(cfg), cfg, external_modules=both, self_test=False)
        source.forget()
        assert bentoml.detectron.load_model(saved, trust_remote_code=True).two == 2

    def test_import_inside_a_function_works_later_and_after_the_model_was_deleted(self, source):
        source.write(
            "ownlazy",
            files={
                "__init__.py": (
                    "from torch import nn\nclass Own(nn.Linear):\n"
                    "    def later(self):\n        from . import rest\n        return rest.VALUE\n"
                ),
                "rest.py": "VALUE = 7\n",
            },
        )
        module = source.imported("ownlazy")
        cfg = OmegaConf.create(L(module.Own)(in_features=2, out_features=3))
        saved = bentoml.detectron.save_model("later", instantiate(cfg), cfg, external_modules=[module], self_test=False)
        source.forget()
        loaded = bentoml.detectron.load_model(saved, trust_remote_code=True)
        bentoml.models.delete(saved.tag)
        assert loaded.later() == 7

    @pytest.mark.slow
    def test_source_of_a_carried_class_can_be_shown(self, carried):
        """By tracebacks and by TorchScript."""
        import inspect

        saved, _, _ = carried
        loaded = bentoml.detectron.load_model(saved, trust_remote_code=True)
        assert "class PlainBackbone" in inspect.getsource(type(loaded.backbone))

    @pytest.mark.slow
    def test_loaded_model_can_be_saved_again_with_its_code(self, carried):
        """Fine-tuned, in a process that never had the package."""
        saved, expected, source = carried
        loaded = bentoml.detectron.load_model(saved, trust_remote_code=True)
        again = bentoml.detectron.save_model("again", loaded, own_cfg(), external_modules=[sys.modules["ownpkg"]])
        bentoml.models.delete(saved.tag)
        source.forget()
        assert_same(outputs(bentoml.detectron.load_model(again, trust_remote_code=True)), expected)

    @pytest.mark.slow
    def test_legacy_contract_pickles_by_value(self, source):
        """`custom_objects.pkl` holds objects of the package's classes, and BentoML reads them without it."""
        package = source.imported()
        saved = bentoml.detectron.save_model(
            "legacy",
            built(own_cfg()),
            own_cfg(),
            external_modules=[package],
            custom_objects={"block": package.parts.blocks.block},
        )
        source.forget()
        assert [type(part).__name__ for part in saved.custom_objects["block"](1, 2)] == ["Conv2d", "ReLU"]
        assert "ownpkg" not in sys.modules

    @pytest.mark.slow
    def test_saving_leaves_the_import_system_alone(self, source):
        package = source.imported()
        module = built(own_cfg())
        before = list(sys.path), list(sys.meta_path), {name for name in sys.modules if name.startswith("own")}
        bentoml.detectron.save_model("manners", module, own_cfg(), external_modules=[package])
        assert (list(sys.path), list(sys.meta_path), {name for name in sys.modules if name.startswith("own")}) == before

    @pytest.mark.slow
    def test_loading_leaves_the_path_alone_and_offers_nothing_afterwards(self, carried):
        saved, _, source = carried
        before = list(sys.path)
        bentoml.detectron.load_model(saved, trust_remote_code=True)
        assert list(sys.path) == before
        source.forget()
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("ownpkg")

    @pytest.mark.slow
    def test_threads_that_load_at_once(self, carried):
        """The modules are imported once, and each thread has its model."""
        saved, expected, source = carried
        found: list[object] = []

        def load():
            try:
                found.append(outputs(bentoml.detectron.load_model(saved, trust_remote_code=True)))
            except BaseException as exc:
                found.append(exc)

        threads = [threading.Thread(target=load) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6
        for each in found:
            assert_same(each, expected)
        assert sorted(source.marker.read_text().split()) == ["ownpkg", "ownpkg.backbones"]


def lazy_own(package: types.ModuleType):
    """A proposal network over the package's backbone, as a LazyConfig."""
    from detectron2.modeling import ProposalNetwork
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.proposal_generator import RPN, StandardRPNHead

    return OmegaConf.create(
        L(ProposalNetwork)(
            backbone=L(package.backbones.plain.PlainBackbone)(channels=8),
            proposal_generator=L(RPN)(
                in_features=["p2"],
                head=L(StandardRPNHead)(in_channels=8, num_anchors=3),
                anchor_generator=L(DefaultAnchorGenerator)(sizes=[[16]], aspect_ratios=[0.5, 1.0, 2.0], strides=[4]),
                anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1]),
                box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
                batch_size_per_image=256,
                positive_fraction=0.5,
                pre_nms_topk=(200, 100),
                post_nms_topk=(20, 20),
                nms_thresh=0.7,
            ),
            pixel_mean=[103.53, 116.28, 123.675],
            pixel_std=[1.0, 1.0, 1.0],
        )
    )


@pytest.mark.slow
class TestOtherModulesOfThatName:
    def test_another_version_of_another_model_is_refused_and_the_same_one_works(self, carried):
        """One process has one module of a name."""
        saved, expected, source = carried
        source.write(factor=2.0)
        package = source.imported()
        changed = built(own_cfg())
        other = bentoml.detectron.save_model("carried-other", changed, own_cfg(), external_modules=[package])
        changed_outputs = outputs(changed)
        source.forget()

        assert_same(outputs(bentoml.detectron.load_model(saved, trust_remote_code=True)), expected)
        assert_same(outputs(bentoml.detectron.load_model(saved, trust_remote_code=True)), expected)
        with pytest.raises(errors.InvalidModelError, match=r"the 'ownpkg' bundled with .* a process of its own") as caught:
            bentoml.detectron.load_model(other, trust_remote_code=True)
        assert caught.value.value == "ownpkg"
        source.forget()
        assert_same(outputs(bentoml.detectron.load_model(other, trust_remote_code=True)), changed_outputs)

    def test_same_version_of_two_models_works_also_when_the_first_is_deleted(self, carried):
        saved, expected, source = carried
        source.imported()
        module = built(own_cfg())
        second = bentoml.detectron.save_model("carried-second", module, own_cfg(), external_modules=[sys.modules["ownpkg"]])
        source.forget()
        bentoml.detectron.load_model(saved, trust_remote_code=True)
        bentoml.models.delete(saved.tag)
        assert_same(outputs(bentoml.detectron.load_model(second, trust_remote_code=True)), expected)

    def test_same_package_beside_different_others_works(self, source):
        """Two models' archives differ; what both have is the same."""
        source.write("ownextra", files={"": "X = 1\n"})
        package, extra = source.imported(), source.imported("ownextra")
        module = built(own_cfg())
        one = bentoml.detectron.save_model("one-of-two", module, own_cfg(), external_modules=[package])
        two = bentoml.detectron.save_model("two-of-two", module, own_cfg(), external_modules=[package, extra])
        source.forget()
        for saved in (one, two):
            bentoml.detectron.load_model(saved, trust_remote_code=True)

    def test_model_saved_again_under_its_tag_with_other_code(self, source):
        """Python remembers an archive's directory by its path."""
        package = source.imported()
        bentoml.detectron.save_model("renewed:one", built(own_cfg()), own_cfg(), external_modules=[package])
        source.forget()
        bentoml.detectron.load_model("renewed:one", trust_remote_code=True)
        bentoml.models.delete("renewed:one")
        source.forget()
        source.write(factor=3.0)
        (source.folder / "ownpkg/backbones/extra.py").write_text("# another length\n" * 50)
        package = source.imported()
        module = built(own_cfg())
        expected = outputs(module)
        bentoml.detectron.save_model("renewed:one", module, own_cfg(), external_modules=[package])
        source.forget()
        assert_same(outputs(bentoml.detectron.load_model("renewed:one", trust_remote_code=True)), expected)

    def test_module_that_the_process_has_stays_as_it_is(self, carried):
        """No warning where it is the same."""
        saved, expected, source = carried
        package = source.imported()
        source.marker.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert_same(outputs(bentoml.detectron.load_model(saved, trust_remote_code=True)), expected)
        assert sys.modules["ownpkg"] is package
        assert not source.marker.exists()

    def test_warns_where_the_process_has_another_version(self, carried):
        """It is the caller's own, so it stays; verify finds that the model finds something else."""
        saved, _, source = carried
        source.write(factor=2.0)
        package = source.imported()
        with pytest.warns(UserWarning, match="has already imported a 'ownpkg' that differs") as caught:
            bentoml.detectron.load_model(saved, trust_remote_code=True)
        assert caught[0].filename == __file__
        assert sys.modules["ownpkg"] is package
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert any("features.backbone" in problem for problem in verify(saved, trust_remote_code=True).problems)

    def test_code_that_fails_is_a_typed_error_and_leaves_nothing(self, source):
        source.write(
            "ownbad", files={"__init__.py": "import sys\nif 'ownbad_ok' not in sys.modules:\n    raise OSError('no')\n"}
        )
        source.monkeypatch.setitem(sys.modules, "ownbad_ok", types.ModuleType("ownbad_ok"))
        bad, package = source.imported("ownbad"), source.imported()
        saved = bentoml.detectron.save_model("bad", built(own_cfg()), own_cfg(), external_modules=[bad, package])
        source.forget()
        source.monkeypatch.delitem(sys.modules, "ownbad_ok")
        with pytest.raises(errors.InvalidModelError, match=r"importing ownbad, .* failed: OSError\('no'\)") as caught:
            bentoml.detectron.load_model(saved, trust_remote_code=True)
        assert caught.value.file == code.ARCHIVE
        assert "ownbad" not in sys.modules


class TestRefusedAtSave:
    """Each is a clear error, and nothing is saved."""

    def refused(self, module: object, match: str) -> None:
        cfg = tiny_cfg()
        before = [model.tag for model in bentoml.models.list()]
        with pytest.raises(errors.InvalidArgumentError, match=match):
            bentoml.detectron.save_model("refused", built(cfg), cfg, external_modules=[module], self_test=False)
        assert [model.tag for model in bentoml.models.list()] == before

    @pytest.mark.parametrize("module", ["ownpkg", None, 7, types.SimpleNamespace(__name__="ownpkg")], ids=str)
    def test_what_is_no_module(self, module):
        self.refused(module, "pass imported modules")

    def test_main(self):
        self.refused(sys.modules["__main__"], "module of its own")

    @pytest.mark.parametrize("name", ["sys", "json", "math", "_json"])
    def test_python_s_own(self, name):
        self.refused(importlib.import_module(name), "comes with Python")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["numpy", "torch", "yaml._yaml"])
    def test_compiled(self, name):
        """The package, or a part of it."""
        self.refused(importlib.import_module(name), "is compiled")

    def test_compiled_single_module(self, monkeypatch):
        module = types.ModuleType("owncompiled")
        module.__file__ = sys.modules["numpy._core._multiarray_umath"].__file__
        monkeypatch.setitem(sys.modules, "owncompiled", module)
        self.refused(module, r"no source file .* not a \.py file")

    def test_module_made_in_memory(self, monkeypatch):
        module = types.ModuleType("ownmade")
        monkeypatch.setitem(sys.modules, "ownmade", module)
        self.refused(module, "no source file")

    def test_folder_without_init(self, source):
        source.write("ownspace", files={"inner.py": "X = 1\n"})
        self.refused(source.imported("ownspace.inner"), r"folder without __init__\.py")

    def test_too_large(self, source, monkeypatch):
        monkeypatch.setattr(code, "MAX_BYTES", 1000)
        self.refused(source.imported(), "larger than 1,000 bytes")

    def test_what_cannot_be_imported_is_left_out(self, source, tmp_path):
        package = source.imported()
        for inside in (".ipynb_checkpoints/heads.py", "my-script.py", ".venv/lib/thing.py"):
            path = source.folder / "ownpkg" / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("X = 1\n")
        code.write(tmp_path, [package])
        with zipfile.ZipFile(tmp_path / code.ARCHIVE) as archive:
            assert set(archive.namelist()) == {f"ownpkg/{name}" for name in PACKAGE}


class TestDamaged:
    def test_flipped_bit_in_the_archive_is_found_before_anything_runs(self, carried):
        """At both ends and between; the error names the file."""
        saved, _, source = carried
        path = Path(saved.path_of(code.ARCHIVE))
        content = path.read_bytes()
        for place in (0, len(content) // 3, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
            with pytest.raises(errors.CorruptFileError, match=r"external_modules\.zip in .* is damaged") as caught:
                bentoml.detectron.load_model(saved, trust_remote_code=True)
            assert caught.value.file == code.ARCHIVE
        assert not source.marker.exists()

    def test_missing_archive(self, carried):
        saved, _, _ = carried
        Path(saved.path_of(code.ARCHIVE)).unlink()
        with pytest.raises(errors.CorruptFileError, match=r"external_modules\.zip is missing"):
            bentoml.detectron.load_model(saved, trust_remote_code=True)
