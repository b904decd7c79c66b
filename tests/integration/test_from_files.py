"""Models from config files, overrides and weights are those that Detectron2's own tools would make of them."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import bentoml
import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from torch import nn

from bentoml_detectron import errors, from_files
from bentoml_detectron.artifact import manifest
from support import assert_same, built, picture, tiny_cfg
from zoo import ZOO, narrowed

DATASET = "a_dataset_of_test_from_files"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A config file over another, and a checkpoint with random weights.

    Its dataset is of these tests alone: some give it class names, which Detectron2 keeps for the rest of the process.
    """
    folder = tmp_path_factory.mktemp("files")
    cfg = tiny_cfg()
    cfg.DATASETS.TEST = (DATASET,)
    (folder / "base.yaml").write_text(cfg.dump())
    (folder / "config.yaml").write_text("_BASE_: base.yaml\nMODEL:\n  ROI_HEADS:\n    SCORE_THRESH_TEST: 0.1\n")
    torch.save({"model": built(tiny_cfg()).state_dict()}, folder / "model.pth")
    return folder


@pytest.fixture(scope="module")
def state(files) -> dict[str, torch.Tensor]:
    return torch.load(files / "model.pth", weights_only=True)["model"]


def by_detectron2(config: Path, weights: Path, *overrides: str) -> DefaultPredictor:
    """What its demo and its trainers do with the same arguments."""
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.merge_from_list(list(overrides))
    cfg.MODEL.WEIGHTS = str(weights)
    return DefaultPredictor(cfg)


def pickled(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def same(files: Path, weights: Path, *overrides: str) -> None:
    found = from_files.build(str(files / "config.yaml"), str(weights), overrides)
    assert isinstance(found.checkpointables, DefaultPredictor)
    due = by_detectron2(files / "config.yaml", weights, *overrides)
    assert_same(found.checkpointables(picture()), due(picture()))


class TestWeights:
    def test_checkpoint(self, files):
        same(files, files / "model.pth")

    def test_checkpoint_of_training(self, files, tmp_path):
        """With the states of optimizer and scheduler after a step, which nobody unpickles."""
        cfg = tiny_cfg()
        model = build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        scheduler = build_lr_scheduler(cfg, optimizer)
        for each in model.parameters():
            each.grad = torch.ones_like(each)
        optimizer.step()
        scheduler.step()
        trainer = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer, scheduler=scheduler)
        trainer.save("model_final", iteration=7)
        assert {"optimizer", "scheduler", "iteration"} < torch.load(tmp_path / "model_final.pth", weights_only=True).keys()
        same(files, tmp_path / "model_final.pth")

    def test_state_dict_alone_of_a_wrapped_model_by_a_link(self, files, state, tmp_path):
        torch.save({f"module.{name}": each for name, each in state.items()}, tmp_path / "real.pth")
        (tmp_path / "linked.pth").symlink_to(tmp_path / "real.pth")
        same(files, tmp_path / "linked.pth")

    def test_half_precision(self, files, state, tmp_path):
        torch.save({"model": {name: each.half() for name, each in state.items()}}, tmp_path / "half.pth")
        same(files, tmp_path / "half.pth")

    def test_zoo_file(self, files, state, tmp_path):
        arrays = {name: each.numpy() for name, each in state.items()}
        same(files, pickled(tmp_path / "zoo.pkl", {"model": arrays, "__author__": "Detectron2 Model Zoo"}))

    def test_zoo_file_whose_names_are_matched(self, files, state, tmp_path):
        """As converted from another library: without the names of the modules around."""
        arrays = {name.removeprefix("backbone."): each.numpy() for name, each in state.items()}
        content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
        same(files, pickled(tmp_path / "converted.pkl", content))

    def test_file_of_detectron_1(self, files, state, tmp_path):
        blobs = {**as_detectron_1(state), "conv1_w_momentum": state["backbone.bottom_up.stem.conv1.weight"].numpy()}
        assert "res2_0_branch1_bn_s" in blobs
        same(files, pickled(tmp_path / "model_final.pkl", {"blobs": blobs, "cfg": "a text"}))

    def test_what_has_no_place_is_listed(self, files, state, tmp_path):
        torch.save({"model": {**state, "head.weight": torch.ones(2), "pixel_mean": torch.ones(3)}}, tmp_path / "more.pth")
        found = from_files.build(str(files / "config.yaml"), str(tmp_path / "more.pth"))
        assert found.unused == ("head.weight",)

    def test_what_is_missing_or_misshaped_is_an_error_with_the_cure(self, files, state, tmp_path):
        torch.save(
            {"model": {name: each for name, each in state.items() if "box_predictor" not in name}}, tmp_path / "part.pth"
        )
        with pytest.raises(errors.WeightsMismatchError, match="give the weights of the whole trained model") as caught:
            from_files.build(str(files / "config.yaml"), str(tmp_path / "part.pth"))
        assert len(caught.value.missing) == 4
        with pytest.raises(errors.WeightsMismatchError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES") as caught:
            from_files.build(str(files / "config.yaml"), str(files / "model.pth"), ["MODEL.ROI_HEADS.NUM_CLASSES", "7"])
        assert caught.value.misshaped["roi_heads.box_predictor.cls_score.weight"] == ((6, 16), (8, 16))
        assert not caught.value.missing

    def test_what_torch_wrote_is_read_under_any_name(self, files, tmp_path):
        (tmp_path / "model_final.pkl").write_bytes((files / "model.pth").read_bytes())
        built = from_files.build(str(files / "config.yaml"), str(tmp_path / "model_final.pkl"))
        assert_same(by_detectron2(files / "config.yaml", files / "model.pth").model.state_dict(), built.module.state_dict())

    def test_backbone_alone_is_not_a_model(self, files, state, tmp_path):
        blobs = {name: each for name, each in as_detectron_1(state).items() if name.startswith(("conv1", "res"))}
        with pytest.raises(errors.WeightsMismatchError):
            from_files.build(str(files / "config.yaml"), str(pickled(tmp_path / "R-50.pkl", blobs)))

    def test_old_or_cut_files_are_errors_with_the_cure(self, files, state, tmp_path):
        torch.save({"model": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        (tmp_path / "cut.pkl").write_bytes(pickle.dumps({"model": {}})[:-3])
        for name in ("old.pth", "cut.pkl"):
            with pytest.raises(errors.CorruptFileError, match=r"give the \.pth that training wrote"):
                from_files.build(str(files / "config.yaml"), str(tmp_path / name))

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (("MODEL.WEIGHTS", ""), "names no weights; give a local"),
            (("MODEL.WEIGHTS", "detectron2://x/model.pkl"), "training started from.*such as --weights output/model_final.pth"),
            (("MODEL.WEIGHTS", "https://127.0.0.1:9/model.pth"), "nothing is downloaded"),
            (("MODEL.WEIGHTS", "no/such.pth"), "no weights file 'no/such.pth'"),
        ],
    )
    def test_weights_that_are_not_here(self, overrides, message, files):
        with pytest.raises(errors.InvalidArgumentError, match=message):
            from_files.build(str(files / "config.yaml"), None, overrides)

    def test_weights_that_the_config_names(self, files):
        found = from_files.build(str(files / "config.yaml"), None, ["MODEL.WEIGHTS", str(files / "model.pth")])
        assert_same(found.checkpointables(picture()), by_detectron2(files / "config.yaml", files / "model.pth")(picture()))


def as_detectron_1(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """The weights of a Faster R-CNN with FPN by Detectron 1's names: background first, affine layers in place of norms."""
    last = {2: 2, 3: 3, 4: 5, 5: 2}  # the last block of each stage of R50

    def lateral(match: re.Match[str]) -> str:
        return f"fpn_inner_res{match[1]}_{last[int(match[1])]}_sum_lateral"

    def output(match: re.Match[str]) -> str:
        return f"fpn_res{match[1]}_{last[int(match[1])]}_sum"

    blobs = {}
    for name, each in state.items():
        if name.endswith(("running_mean", "running_var")):
            continue
        value = each
        name = name.replace("roi_heads.box_head.fc1", "fc6").replace("proposal_generator.rpn_head.conv", "conv_rpn_fpn2")
        name = name.replace("proposal_generator.rpn_head.objectness_logits", "rpn_cls_logits_fpn2")
        name = name.replace("proposal_generator.rpn_head.anchor_deltas", "rpn_bbox_pred_fpn2")
        if "box_predictor.cls_score" in name:
            value = torch.cat([each[-1:], each[:-1]])
        if "box_predictor.bbox_pred" in name:
            value = torch.cat([torch.ones_like(each[:4]), each])
        name = name.replace("roi_heads.box_predictor.", "").replace("backbone.bottom_up.", "").replace("stem.", "")
        name = re.sub(r"backbone\.fpn_lateral(\d)", lateral, name)
        name = re.sub(r"backbone\.fpn_output(\d)", output, name)
        if name.startswith("conv1.norm"):
            name = f"res_{name}"
        for ours, theirs in (("shortcut", "branch1"), ("conv1", "branch2a"), ("conv2", "branch2b"), ("conv3", "branch2c")):
            if re.match(r"res\d", name):
                name = name.replace(f".{ours}.", f".{theirs}.")
        name = name.replace("norm.weight", "bn_s").replace("norm.bias", "bn_b")
        name = name.removesuffix(".weight") + "_w" if name.endswith(".weight") else name
        name = name.removesuffix(".bias") + "_b" if name.endswith(".bias") else name
        blobs[name.replace(".", "_")] = value.numpy()
    return blobs


class TestConfig:
    def test_overrides(self, files):
        overrides = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.05", "INPUT.MIN_SIZE_TEST", "48", "TEST.DETECTIONS_PER_IMAGE", "3")
        same(files, files / "model.pth", *overrides)
        found = from_files.build(str(files / "config.yaml"), str(files / "model.pth"), overrides)
        assert len(found.checkpointables(picture())["instances"]) <= 3

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["MODEL.NOTHING", "1"], "MODEL.NOTHING 1 is not valid: there is no key MODEL.NOTHING; give a key"),
            (["MODEL.ROI_HEADS.SCORE_THRESH", "1"], r"did you mean MODEL\.ROI_HEADS\.SCORE_THRESH_TEST\?"),
            (["MODEL.ROI_HEADS.NUM_CLASSES", "many"], "is not valid: .*a value of the right type"),
            (["INPUT.FORMAT"], "INPUT.FORMAT has no value; give KEY VALUE pairs"),
            (["--name", "x"], "--name comes after the overrides; put options before"),
            (["_BASE_", "x"], "_BASE_ x is not valid"),
        ],
    )
    def test_overrides_that_are_none(self, overrides, message, files):
        with pytest.raises(errors.InvalidArgumentError, match=message):
            from_files.build(str(files / "config.yaml"), str(files / "model.pth"), overrides)

    def test_every_config_of_the_zoo_is_read_as_detectron2_reads_it(self):
        folder = Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).parent
        names = [str(each.relative_to(folder)) for each in sorted(folder.rglob("*.yaml"))]
        assert set(ZOO.values()) <= set(names)
        for name in names:
            due = get_cfg()
            due.merge_from_file(str(folder / name))
            found = from_files._yacs_config(from_files._config_path(name), ())
            assert (type(found), found) == (type(due), due), name

    def test_config_that_is_not_there(self, files):
        for name in ("no/such.yaml", "https://127.0.0.1:9/config.yaml", "COCO-Detection/none.yaml"):
            with pytest.raises(errors.InvalidArgumentError, match="give a local file, or a name from Detectron2's model zoo"):
                from_files.build(name, str(files / "model.pth"))

    def test_keys_of_a_project_say_what_to_do(self, files, tmp_path):
        (tmp_path / "config.yaml").write_text("MODEL:\n  A_PROJECT:\n    DEPTH: 7\n")
        with pytest.raises(errors.InvalidArgumentError, match=r"A_PROJECT.*save it with bentoml\.detectron\.save_model"):
            from_files.build(str(tmp_path / "config.yaml"), str(files / "model.pth"))


class TestLazyConfig:
    @pytest.fixture(scope="class")
    @classmethod
    def lazy(cls, tmp_path_factory) -> Path:
        """A narrow RetinaNet in a file that imports another beside it, and its weights."""
        folder = tmp_path_factory.mktemp("lazy")
        source = Path(model_zoo.get_config_file("common/models/retinanet.py")).read_text().replace("256", "16")
        source = source.replace("depth=50", "depth=18").replace("stride_in_1x1=True,", "").replace("2048", "512")
        (folder / "retinanet.py").write_text(source)
        (folder / "config.py").write_text("from .retinanet import model\ntrain = dict(init_checkpoint='')\n")
        torch.manual_seed(0)
        module = instantiate(LazyConfig.load(str(folder / "config.py")).model)
        torch.save({"model": module.state_dict()}, folder / "model.pth")
        return folder

    @pytest.mark.slow
    def test_it_is_saved_with_its_overrides_and_loads_the_same(self, lazy):
        overrides = [
            "model.test_score_thresh=0.0",
            "model.test_topk_candidates=20",
            f"train.init_checkpoint={lazy / 'model.pth'}",
        ]
        found = from_files.build(str(lazy / "config.py"), None, overrides, trust_remote_code=True)
        assert found.untrusted == []
        saved = bentoml.detectron.save_model("lazy_from_files", found.checkpointables, found.config)
        due = LazyConfig.apply_overrides(LazyConfig.load(str(lazy / "config.py")), overrides)
        module = instantiate(due.model).eval()
        DetectionCheckpointer(module).load(str(lazy / "model.pth"))
        image = torch.from_numpy(picture().transpose(2, 0, 1).copy())
        with torch.no_grad():
            assert_same(bentoml.detectron.load_model(saved)([{"image": image}]), module([{"image": image}]))

    @pytest.mark.slow
    def test_classes_are_named_for_a_dataset_that_the_config_need_not_have(self, lazy, tmp_path):
        file = coco(tmp_path / "three.json", [(5, "a"), (6, "b"), (9, "c")])
        torch.save({"model": instantiate(with_classes(lazy, 3)).state_dict()}, tmp_path / "three.pth")
        overrides = ["model.num_classes=3"]
        found = from_files.build(
            str(lazy / "config.py"), str(tmp_path / "three.pth"), overrides, classes_from=file, trust_remote_code=True
        )
        saved = bentoml.detectron.save_model("lazy_with_classes", found.checkpointables, found.config)
        dataset = manifest.read(Path(saved.path)).dataset
        assert dataset.thing_classes == ["a", "b", "c"]
        assert dataset.thing_dataset_id_to_contiguous_id == {5: 0, 6: 1, 9: 2}

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["model.num_classes", "3"], "for a LazyConfig give key=value"),
            (["model.num_classes=["], "do not fit the LazyConfig"),
            (["model.num_classes.more=1"], "do not fit the LazyConfig"),
            (["--name=x"], "comes after the overrides"),
        ],
    )
    def test_overrides_that_are_none(self, overrides, message, lazy):
        with pytest.raises(errors.InvalidArgumentError, match=message):
            from_files.build(str(lazy / "config.py"), str(lazy / "model.pth"), overrides, trust_remote_code=True)

    def test_what_fails_in_the_file_is_said(self, lazy, tmp_path):
        for text, message in (("import no_such_module", "add their folder to PYTHONPATH"), ("model = (", "cannot be run"),
                              ("x = 7", "has neither a '_target_'")):  # fmt: skip
            (tmp_path / "config.py").write_text(text)
            with pytest.raises(errors.InvalidArgumentError, match=message):
                from_files.build(str(tmp_path / "config.py"), str(lazy / "model.pth"), trust_remote_code=True)

    def test_modules_of_the_users_own_are_named(self, lazy, tmp_path, monkeypatch):
        (tmp_path / "own_models.py").write_text(
            "from detectron2.modeling.meta_arch import RetinaNet\nclass Own(RetinaNet):\n    pass\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "retinanet.py").write_text((lazy / "retinanet.py").read_text())
        (tmp_path / "config.py").write_text("from .retinanet import model\nfrom own_models import Own\nmodel._target_ = Own\n")
        found = from_files.build(str(tmp_path / "config.py"), str(lazy / "model.pth"), trust_remote_code=True)
        assert found.untrusted == ["own_models"]


def with_classes(lazy: Path, count: int):
    model = LazyConfig.load(str(lazy / "config.py")).model
    model.num_classes = count
    return model


def coco(path: Path, named: list[tuple[int, str]]) -> Path:
    path.write_text(json.dumps({"categories": [{"id": number, "name": name} for number, name in named]}))
    return path


class TestClasses:
    FIVE = ((30, "e"), (1, "a"), (7, "c"), (2, "b"), (9, "d"))

    def saved(self, files, tag, file):
        found = from_files.build(str(files / "config.yaml"), str(files / "model.pth"), classes_from=file)
        return manifest.read(Path(bentoml.detectron.save_model(tag, found.checkpointables).path)).dataset

    def test_names_by_rising_id_and_the_files_own_ids(self, files, tmp_path):
        dataset = self.saved(files, "named", coco(tmp_path / "train.json", self.FIVE))
        assert dataset.name == DATASET
        assert dataset.thing_classes == ["a", "b", "c", "d", "e"]
        assert dataset.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 7: 2, 9: 3, 30: 4}

    def test_a_dataset_of_other_classes_keeps_its_name(self, files, tmp_path):
        """A config over one of COCO names COCO's as its dataset."""
        text = (files / "config.yaml").read_text() + "DATASETS:\n  TEST: ('coco_2017_val',)\n"
        (files / "over_coco.yaml").write_text(text)
        file = coco(tmp_path / "own_animals.json", self.FIVE)
        found = from_files.build(str(files / "over_coco.yaml"), str(files / "model.pth"), classes_from=file)
        assert found.checkpointables.cfg.DATASETS.TEST == ("own_animals",)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not JSON"),
            ("[]", "has no valid list of categories"),
            ('{"categories": []}', "has no valid list of categories"),
            ('{"categories": [{"id": 1}]}', "has no valid list of categories"),
            ('{"categories": [{"id": true, "name": "a"}]}', "has no valid list of categories"),
            ('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "two categories with the same id"),
            ('{"categories": [{"id": 1, "name": "a"}]}', "has 1 categories, but the model has 5 classes"),
        ],
    )
    def test_files_that_do_not_fit(self, text, message, files, tmp_path):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(errors.InvalidArgumentError, match=message):
            from_files.build(str(files / "config.yaml"), str(files / "model.pth"), classes_from=tmp_path / "x.json")
        with pytest.raises(errors.InvalidArgumentError, match="cannot be read"):
            from_files.build(str(files / "config.yaml"), str(files / "model.pth"), classes_from=tmp_path / "none.json")

    @pytest.mark.parametrize(
        ("family", "stuff"),
        [("Panoptic FPN", ["things", "sky", "sea"]), ("Semantic FPN", ["cat", "sky", "sea"]), ("RPN, FPN", None)],
    )
    def test_stuff(self, family, stuff, tmp_path):
        cfg = get_cfg()
        cfg.merge_from_file(model_zoo.get_config_file(ZOO[family]))
        cfg = narrowed(cfg)
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3, 1
        cfg.DATASETS.TEST = ()
        (tmp_path / "config.yaml").write_text(cfg.dump())
        torch.save(built(cfg).state_dict(), tmp_path / "model.pth")
        kinds = [
            {"id": 4, "name": "sky", "isthing": 0},
            {"id": 5, "name": "sea", "isthing": 0},
            {"id": 1, "name": "cat", "isthing": 1},
        ]
        (tmp_path / "scenes.json").write_text(json.dumps({"categories": kinds}))

        def build():
            return from_files.build(
                str(tmp_path / "config.yaml"), str(tmp_path / "model.pth"), classes_from=tmp_path / "scenes.json"
            )

        if stuff is None:
            with pytest.raises(errors.InvalidArgumentError, match="omit --classes-from"):
                build()
            return
        saved = bentoml.detectron.save_model("stuff", build().checkpointables)
        dataset = manifest.read(Path(saved.path)).dataset
        assert dataset.stuff_classes == stuff
        assert dataset.thing_classes == (["cat"] if family == "Panoptic FPN" else None)


def test_module_of_what_was_built_is_in_evaluation_mode_on_the_cpu(files):
    module = from_files.build(str(files / "config.yaml"), str(files / "model.pth"), ["MODEL.DEVICE", "cuda"]).module
    assert isinstance(module, nn.Module)
    assert not module.training
    assert {each.device.type for each in module.parameters()} == {"cpu"}
