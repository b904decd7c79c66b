"""Saving and loading through the public names: a model is whole, arguments are left alone, mistakes leave nothing."""

from __future__ import annotations

import copy
import sys
import uuid
from pathlib import Path

import bentoml
import pytest
import torch
from bentoml import Tag
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from fvcore.transforms.transform import NoOpTransform

from bentoml_detectron import errors, verify
from support import BLOCK_NETWORK, assert_same, built, checkpoint, picture, run_python, tensors, tiny_cfg, tree

IN_ANOTHER_PROCESS = (
    BLOCK_NETWORK
    + """
import bentoml, numpy as np, torch
tag, image, output = sys.argv[1:]
model = bentoml.detectron.load_model(tag)
image = np.load(image)
if isinstance(model, torch.nn.Module):
    with torch.no_grad():
        result = model([{"image": torch.as_tensor(image.transpose(2, 0, 1).copy())}])[0]["instances"]
else:
    result = model(image)["instances"]
torch.save({"boxes": result.pred_boxes.tensor, "scores": result.scores, "classes": result.pred_classes,
            "masks": result.pred_masks}, output)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["predictor", "module"])
def test_saved_model_is_whole_after_its_checkpoint_is_gone(kind, tmp_path, demo_image):
    """In another process, without network and without the original file, the outputs are the same bit for bit."""
    import numpy as np

    from bentoml_detectron import demo

    cfg = demo.config()
    original = tmp_path / "original.pth"
    original.write_bytes(Path(cfg.MODEL.WEIGHTS).read_bytes())
    cfg.MODEL.WEIGHTS = str(original)
    predictor = DefaultPredictor(cfg)
    if kind == "predictor":
        expected = predictor(demo_image)["instances"]
        saved = bentoml.detectron.save_model("whole", predictor)
    else:
        with torch.no_grad():
            tensor = torch.as_tensor(demo_image.transpose(2, 0, 1).copy())
            expected = predictor.model([{"image": tensor}])[0]["instances"]
        saved = bentoml.detectron.save_model("whole", predictor.model, cfg)
    original.unlink()
    np.save(tmp_path / "image.npy", demo_image)

    run_python(IN_ANOTHER_PROCESS, str(saved.tag), str(tmp_path / "image.npy"), str(tmp_path / "result.pth"))

    result = torch.load(tmp_path / "result.pth")
    assert len(expected) > 3
    for name, value in {
        "boxes": expected.pred_boxes.tensor,
        "scores": expected.scores,
        "classes": expected.pred_classes,
        "masks": expected.pred_masks,
    }.items():
        assert torch.equal(result[name], value), name


def test_network_block_of_these_tests_blocks():
    """The guard of the test above is not asleep."""
    code = BLOCK_NETWORK + "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    assert "network use" in run_python(code, check=False).stderr


def test_loaded_predictor_is_a_default_predictor_with_the_same_config(demo_predictor):
    saved = bentoml.detectron.save_model("same-config", demo_predictor)
    loaded = bentoml.detectron.load_model(saved.tag)
    assert type(loaded) is DefaultPredictor
    before, after = demo_predictor.cfg.clone(), loaded.cfg.clone()
    before.MODEL.WEIGHTS = after.MODEL.WEIGHTS = ""
    assert before == after
    assert type(after.DATASETS.TEST) is tuple
    assert not loaded.model.training


def test_loaded_predictors_config_names_the_stored_weights(demo_predictor, demo_image):
    """Whoever builds a predictor from that config gets the saved model again."""
    loaded = bentoml.detectron.load_model(bentoml.detectron.save_model("own-weights", demo_predictor))
    assert_same(DefaultPredictor(loaded.cfg)(demo_image), demo_predictor(demo_image))


def test_loaded_module_is_in_evaluation_mode_and_its_parameters_can_be_trained():
    cfg = tiny_cfg()
    module = built(cfg)
    loaded = bentoml.detectron.load_model(bentoml.detectron.save_model("trainable", module, cfg))
    assert not loaded.training
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in module.parameters()]
    with torch.no_grad():
        next(p for p in loaded.parameters() if p.requires_grad).add_(1)


def test_changing_a_loaded_model_leaves_the_saved_one_alone():
    """Weights are mapped from the file; writing to them must not write to it."""
    cfg = tiny_cfg()
    saved = bentoml.detectron.save_model("untouched", built(cfg), cfg)
    before = Path(saved.path_of("saved_model.pth")).read_bytes()
    loaded = bentoml.detectron.load_model(saved)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert Path(saved.path_of("saved_model.pth")).read_bytes() == before


@pytest.mark.slow
def test_class_names_come_back_in_a_process_that_does_not_know_the_dataset(demo_predictor):
    saved = bentoml.detectron.save_model("names", demo_predictor)
    code = "import bentoml, sys; print(bentoml.detectron.load_model(sys.argv[1]).metadata.thing_classes)"
    assert run_python(code, str(saved.tag)).stdout.strip() == str([str(digit) for digit in range(10)])


@pytest.mark.parametrize("kind", ["predictor", "module"])
def test_device_id_is_honoured(kind, demo_predictor):
    """Both kinds land on the named device, and a device that is not there is refused by name."""
    # A config for a GPU, which is not here: only the argument decides.
    predictor = copy.copy(demo_predictor)
    predictor.cfg = demo_predictor.cfg.clone()
    predictor.cfg.MODEL.DEVICE = "cuda"
    arguments = (predictor,) if kind == "predictor" else (predictor.model, predictor.cfg)
    saved = bentoml.detectron.save_model("device", *arguments)
    loaded = bentoml.detectron.load_model(saved, device_id="cpu")
    if kind == "predictor":
        assert loaded.cfg.MODEL.DEVICE == "cpu"
    module = loaded.model if kind == "predictor" else loaded
    assert {p.device for p in module.parameters()} == {torch.device("cpu")}
    for wrong in ("cuda:7", "warp", "", "meta"):
        with pytest.raises(errors.UnknownDeviceError) as caught:
            bentoml.detectron.load_model(saved, device_id=wrong)
        assert repr(wrong) in str(caught.value) or wrong == "meta"
        assert caught.value.value == wrong


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["predictor", "module"])
def test_device_id_on_a_gpu(kind, demo_predictor, demo_image):
    saved = bentoml.detectron.save_model(
        "gpu", *((demo_predictor,) if kind == "predictor" else (demo_predictor.model, demo_predictor.cfg))
    )
    loaded = bentoml.detectron.load_model(saved, device_id="cuda:0")
    module = loaded.model if kind == "predictor" else loaded
    assert {p.device.type for p in module.parameters()} == {"cuda"}
    if kind == "predictor":
        assert loaded.cfg.MODEL.DEVICE == "cuda:0"
        assert len(loaded(demo_image)["instances"]) > 3


def test_nothing_of_the_callers_is_changed():
    """A frozen config stays frozen, and dicts that are passed keep their content; BentoML's adapter wrote into them."""
    cfg = tiny_cfg()
    module = built(cfg)
    module.train()
    before = copy.deepcopy(cfg)
    cfg.freeze()
    given = {
        "signatures": {"__call__": {"batchable": True, "batch_dim": 0}},
        "labels": {"stage": "dev"},
        "custom_objects": {"mine": [1, 2]},
        "metadata": {"ap": 0.5, "nested": {"list": [1, {"a": 2}]}},
    }
    expected = copy.deepcopy(given)
    state = {name: value.clone() for name, value in module.state_dict().items()}

    saved = bentoml.detectron.save_model("manners", module, cfg, external_modules=[sys.modules["support"]], **given)
    bentoml.detectron.load_model(saved)

    assert given == expected
    assert cfg == before
    assert cfg.is_frozen()
    assert module.training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert saved.info.metadata == {**expected["metadata"], "_is_predictor": False}
    assert saved.info.labels == expected["labels"]


def test_one_config_may_be_shared_by_two_models():
    cfg = tiny_cfg()
    one, other = built(cfg, seed=1), built(cfg, seed=2)
    saved = [bentoml.detectron.save_model("shared", module, cfg) for module in (one, other)]
    for module, model in zip((one, other), saved, strict=True):
        loaded = bentoml.detectron.load_model(model)
        for name, value in module.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)


def test_versions_do_not_follow_from_the_clock(monkeypatch):
    """Which processes that save at the same moment share, and those that were forked together all that goes with it."""
    at = uuid.uuid1()
    monkeypatch.setattr(uuid, "uuid1", lambda *arguments: at)
    cfg = tiny_cfg()
    module = built(cfg)
    assert len({bentoml.detectron.save_model("at_once", module, cfg).tag.version for _ in range(3)}) == 3


def test_record_of_a_saved_model_is_what_the_contract_says(demo_predictor):
    saved = bentoml.detectron.save_model("record", demo_predictor, custom_objects={"mine": 7})
    assert saved.info.module == "bentoml.detectron"
    assert saved.info.metadata["_is_predictor"] is True
    assert saved.info.signatures["__call__"].batchable is False
    assert saved.info.context.framework_name == "detectron2"
    assert saved.custom_objects["mine"] == 7  # BentoML's own reader, which unpickles
    assert saved.custom_objects["config"] == demo_predictor.cfg
    assert {path.name for path in Path(saved.path).iterdir()} == {
        "model.yaml", "saved_model.pth", "config.yaml", "custom_objects.pkl", "manifest.json",
    }  # fmt: skip
    assert torch.load(saved.path_of("saved_model.pth"), weights_only=True)["model"].keys() == (
        demo_predictor.model.state_dict().keys()
    )


def test_config_beside_a_predictor_is_ignored_with_a_warning(demo_predictor, caplog):
    saved = bentoml.detectron.save_model("ignored", demo_predictor, tiny_cfg())
    assert "config is ignored" in caplog.text
    assert bentoml.detectron.load_model(saved).cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10


def test_predictor_that_was_made_in_inference_mode(tmp_path):
    cfg = checkpoint(tiny_cfg(), tmp_path / "model_final.pth")
    with torch.inference_mode():
        predictor = DefaultPredictor(cfg)
    loaded = bentoml.detectron.load_model(bentoml.detectron.save_model("inference_mode", predictor))
    assert_same(tensors(loaded(picture())), tensors(predictor(picture())))


def test_half_precision_weights_stay_half_precision():
    cfg = tiny_cfg()
    module = built(cfg).half()
    loaded = bentoml.detectron.load_model(bentoml.detectron.save_model("half", module, cfg))
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}


def test_data_parallel_module_is_saved_as_the_module_inside():
    cfg = tiny_cfg()
    module = built(cfg)
    saved = bentoml.detectron.save_model("parallel", torch.nn.DataParallel(module), cfg)
    assert bentoml.detectron.load_model(saved).state_dict().keys() == module.state_dict().keys()


def test_class_names_are_those_of_the_training_where_there_is_nothing_to_test_on(tmp_path):
    """As Detectron2's tutorial has it."""
    MetadataCatalog.get("training_of_this_test").set(thing_classes=["balloon"])
    cfg = checkpoint(tiny_cfg(), tmp_path / "weights.pth")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("training_of_this_test",), ()
    saved = bentoml.detectron.save_model("balloons", DefaultPredictor(cfg))
    assert bentoml.detectron.load_model(saved).metadata.thing_classes == ["balloon"]
    assert bentoml.detectron.load_predictor(saved).class_names == ("balloon",)


def test_predictor_that_is_called_in_its_own_way_is_saved_with_a_warning(tmp_path, caplog):
    class Counting(DefaultPredictor):
        def __call__(self, original_image):
            return len(super().__call__(original_image)["instances"])

    saved = bentoml.detectron.save_model("counting", Counting(checkpoint(tiny_cfg(), tmp_path / "weights.pth")))
    assert "Counting overrides __call__, which is not saved" in caplog.text
    assert type(bentoml.detectron.load_model(saved)) is DefaultPredictor


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype, demo_predictor, demo_image):
    saved = bentoml.detectron.save_model("defaults", demo_predictor)
    due = bentoml.detectron.load_predictor(saved)([demo_image])
    predictor = bentoml.detectron.load_predictor(saved)
    torch.set_default_dtype(dtype)
    try:
        assert predictor([demo_image]) == due
        assert bentoml.detectron.load_model(saved).model.pixel_mean.dtype == torch.float32
        assert bentoml.detectron.load_predictor(saved)([demo_image]) == due
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


class TestMistakes:
    """Each is a clear error, and the store is afterwards what it was."""

    @pytest.fixture(autouse=True)
    def _store_unchanged(self, store):
        before = tree(store)
        staging = store.with_name("models.staging")
        yield
        assert tree(store) == before
        assert [path.name for path in staging.glob("*")] in ([], ["lock"])

    def test_module_without_config(self):
        with pytest.raises(ValueError, match="config is required"):
            bentoml.detectron.save_model("mistake", built(tiny_cfg()))

    def test_predictor_whose_images_are_not_as_its_config_says(self, tmp_path):
        """They would be once it is loaded, without a word."""
        for name, value, cure in (
            ("aug", ResizeShortestEdge([96, 96], 200), "MIN_SIZE_TEST"),
            ("aug", ResizeShortestEdge(64, 300), "MAX_SIZE_TEST"),
            ("aug", NoOpTransform(), "MIN_SIZE_TEST"),
            ("input_format", "RGB", "FORMAT"),
        ):
            cfg = checkpoint(tiny_cfg(), tmp_path / "weights.pth")
            cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 200
            predictor = DefaultPredictor(cfg)
            setattr(predictor, name, value)
            with pytest.raises(errors.InvalidArgumentError, match=rf"the predictor's {name}.*{cure}"):
                bentoml.detectron.save_model("mistake", predictor)

    @pytest.mark.parametrize("config", [{}, "config.yaml", 7])
    def test_config_of_the_wrong_type(self, config):
        with pytest.raises(errors.InvalidArgumentError, match=type(config).__name__):
            bentoml.detectron.save_model("mistake", built(tiny_cfg()), config)

    @pytest.mark.parametrize("checkpointables", [None, {}, "model.pth", tiny_cfg])
    def test_checkpointables_of_the_wrong_type(self, checkpointables):
        with pytest.raises(errors.InvalidArgumentError, match=r"DefaultPredictor, or a torch\.nn\.Module"):
            bentoml.detectron.save_model("mistake", checkpointables, tiny_cfg())

    @pytest.mark.parametrize("name", ["with space", "", "../up", "a/b", "x" * 64, "name:", 7, None, "-a"])
    def test_name_that_is_no_tag(self, name, demo_predictor):
        with pytest.raises(errors.InvalidArgumentError, match="is not a valid tag"):
            bentoml.detectron.save_model(name, demo_predictor)
        with pytest.raises(errors.InvalidArgumentError, match="is not a valid tag"):
            bentoml.detectron.get(name)

    def test_labels_and_metadata_that_bentoml_does_not_take(self, demo_predictor):
        with pytest.raises(errors.InvalidArgumentError, match="dictionary update sequence"):
            bentoml.detectron.save_model("mistake", demo_predictor, labels="stage")
        with pytest.raises(errors.InvalidArgumentError, match=r"metadata: .*object"):
            bentoml.detectron.save_model("mistake", demo_predictor, metadata={"a": object()})

    def test_version_that_means_the_newest(self, demo_predictor):
        with pytest.raises(errors.InvalidArgumentError, match="latest"):
            bentoml.detectron.save_model("mistake:latest", demo_predictor)

    def test_state_that_is_no_plain_tensor(self):
        """It could not be loaded, so it is not saved."""
        cfg = tiny_cfg()
        module = built(cfg)
        module.roi_heads.box_predictor.cls_score.bias.data = torch.ones(1).expand(6)
        with pytest.raises(errors.UnsafeFileError, match=r"shape \(6,\), for which the file has only 4 bytes"):
            bentoml.detectron.save_model("mistake", module, cfg)

    def test_custom_object_that_cannot_be_pickled(self, demo_predictor):
        with pytest.raises(errors.SaveError, match="pickle"):
            bentoml.detectron.save_model("mistake", demo_predictor, custom_objects={"lock": __import__("threading").Lock()})

    def test_config_that_is_not_plain_data(self):
        cfg = tiny_cfg()
        module = built(cfg)
        cfg.MODEL["EXTRA"] = torch.zeros(3)
        with pytest.raises(errors.InvalidArgumentError, match=r"config\.MODEL\.EXTRA"):
            bentoml.detectron.save_model("mistake", module, cfg)

    @pytest.mark.parametrize(("key", "value"), [("MAX_SIZE_TEST", 96.5), ("MIN_SIZE_TEST", (64, 96)), ("FORMAT", 7)])
    def test_config_that_does_not_say_how_images_go_in(self, key, value):
        cfg = tiny_cfg()
        module = built(cfg)
        cfg.INPUT[key] = value
        with pytest.raises(errors.InvalidModelError, match=f"INPUT.{key} is"):
            bentoml.detectron.save_model("mistake", module, cfg)

    def test_config_of_another_model(self):
        """All that is missing, unexpected and misshaped is listed."""
        cfg = tiny_cfg()
        module = built(cfg)
        other = cfg.clone()
        other.MODEL.ROI_HEADS.NUM_CLASSES = 7
        other.MODEL.MASK_ON = True
        with pytest.raises(errors.WeightsMismatchError) as caught:
            bentoml.detectron.save_model("mistake", module, other)
        assert "roi_heads.mask_head.deconv.weight" in caught.value.missing
        assert caught.value.misshaped["roi_heads.box_predictor.cls_score.weight"] == ((6, 16), (8, 16))
        assert "missing: roi_heads.mask_head.deconv.weight" in str(caught.value)
        module.extra = torch.nn.Linear(1, 1)
        with pytest.raises(errors.WeightsMismatchError) as caught:
            bentoml.detectron.save_model("mistake", module, cfg)
        assert caught.value.unexpected == ("extra.weight", "extra.bias")

    def test_config_that_names_what_nobody_registered(self):
        cfg = tiny_cfg()
        module = built(cfg)
        cfg.MODEL.META_ARCHITECTURE = "NobodyMadeThis"
        with pytest.raises(errors.UnknownEntryError, match="NobodyMadeThis"):
            bentoml.detectron.save_model("mistake", module, cfg)

    def test_version_that_exists(self, demo_predictor, store):
        saved = bentoml.detectron.save_model("twice:one", demo_predictor)
        before = tree(store)
        with pytest.raises(errors.SaveError, match="twice:one is already in the model store"):
            bentoml.detectron.save_model("twice:one", demo_predictor)
        assert tree(store) == before
        bentoml.models.delete(saved.tag)

    def test_unknown_model(self):
        with pytest.raises(bentoml.exceptions.NotFound, match="nobody-saved-this"):
            bentoml.detectron.load_model("nobody-saved-this:latest")

    def test_model_of_another_framework(self):
        with bentoml.models.create("other", module="bentoml.sklearn") as other:
            pass
        for use in (bentoml.detectron.get, bentoml.detectron.load_model):
            with pytest.raises(bentoml.exceptions.NotFound, match=r"bentoml\.sklearn"):
                use(other.tag)
        with pytest.raises(bentoml.exceptions.NotFound, match=r"bentoml\.sklearn"):
            bentoml.detectron.load_model(other)
        bentoml.models.delete(other.tag)


@pytest.mark.parametrize(
    "metadata", [{"config": {"_BASE_": "base.yaml"}}, {"ids": list(range(20_000))}, {"log": "x" * (5 << 20)}], ids=str
)
def test_metadata_that_could_not_be_read_again(metadata, demo_predictor):
    """Nothing is saved, and the newest version is the one before."""
    name = f"not_read_again_{next(iter(metadata))}"
    before = bentoml.detectron.save_model(name, demo_predictor)
    with pytest.raises(errors.InvalidArgumentError, match="metadata"):
        bentoml.detectron.save_model(name, demo_predictor, metadata=metadata)
    assert bentoml.models.list(name) == [before]
    assert bentoml.detectron.get(f"{name}:latest").tag == before.tag


def test_weights_that_do_not_fit_are_listed_on_load():
    """Detectron2 only logs them."""
    cfg = tiny_cfg()
    saved = bentoml.detectron.save_model("damaged-names", built(cfg), cfg)
    path = Path(saved.path_of("saved_model.pth"))
    state = torch.load(path, weights_only=True)["model"]
    state["surprise"] = torch.zeros(1)
    del state["roi_heads.box_predictor.bbox_pred.bias"]
    state["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(9)
    torch.save({"model": state}, path)
    from bentoml_detectron.artifact import folder

    (Path(saved.path) / "manifest.json").unlink()
    folder.seal(Path(saved.path), folder.describe(cfg), is_predictor=False)  # so that the digests are right
    with pytest.raises(errors.WeightsMismatchError) as caught:
        bentoml.detectron.load_model(saved)
    assert caught.value.missing == ("roi_heads.box_predictor.bbox_pred.bias",)
    assert caught.value.unexpected == ("surprise",)
    assert caught.value.misshaped == {"roi_heads.box_predictor.cls_score.bias": ((9,), (6,))}


def test_export_and_import_keep_a_model_whole(tmp_path, demo_predictor, demo_image):
    saved = bentoml.detectron.save_model("travel", demo_predictor)
    path = bentoml.models.export_model(saved.tag, str(tmp_path / "travel.bentomodel"))
    bentoml.models.delete(saved.tag)
    imported = bentoml.models.import_model(path)
    assert_same(bentoml.detectron.load_model(imported.tag)(demo_image), demo_predictor(demo_image))


@pytest.mark.slow
@pytest.mark.parametrize("missing", [["detectron2"], ["torch", "torchvision", "detectron2"]], ids=["Detectron2", "PyTorch too"])
def test_what_is_missing_is_said_with_the_install_line(missing):
    """BentoML's own exception says how to install it, whatever was to be done."""
    cfg = tiny_cfg()
    tag = str(bentoml.detectron.save_model("missing", built(cfg), cfg, self_test=False).tag)
    code = """
import sys
tag, *missing = sys.argv[1:]
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
import bentoml, bentoml_detectron
from bentoml_detectron import demo
for act in (
    lambda: bentoml.detectron.save_model("x", None),
    lambda: bentoml.detectron.load_model(tag),
    lambda: bentoml.detectron.load_predictor(tag),
    lambda: bentoml_detectron.verify(tag),
    lambda: list(bentoml_detectron.predict(tag, demo.images()[:1])),
    demo.predictor,
):
    try:
        act()
    except bentoml.exceptions.MissingDependencyException as exc:
        print(exc)
"""
    output = run_python(code, tag, *missing).stdout
    assert output.count("pip install 'git+https://github.com/facebookresearch/detectron2.git' --no-build-isolation") == 6


def test_checkpoint_with_frozen_config_from_a_file(tmp_path):
    """The usual way: a config file's config, frozen, with a checkpoint."""
    cfg = checkpoint(tiny_cfg(), tmp_path / "model.pth")
    cfg.freeze()
    predictor = DefaultPredictor(cfg)
    expected = predictor(picture())
    saved = bentoml.detectron.save_model("frozen", predictor)
    (tmp_path / "model.pth").unlink()
    assert_same(bentoml.detectron.load_model(saved)(picture()), expected)
    assert tensors(expected)[".instances.scores"].numel() > 5


@pytest.mark.slow
def test_models_own_class_names_win_over_another_dataset_of_that_name(demo_predictor):
    """A dataset that was labelled anew under its old name."""
    saved = bentoml.detectron.save_model("renamed", demo_predictor)
    code = """
import bentoml, sys
from detectron2.data import MetadataCatalog
MetadataCatalog.get("handwritten_digits").set(thing_classes=["cat", "dog"])
print(bentoml.detectron.load_model(sys.argv[1]).metadata.thing_classes[:2])
print(MetadataCatalog.get("handwritten_digits").thing_classes)
"""
    assert run_python(code, str(saved.tag)).stdout.splitlines() == ["['0', '1']", "['cat', 'dog']"]


def test_parameters_that_a_model_ties_stay_tied(monkeypatch):
    """And keep their precision."""
    from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

    class Tied(GeneralizedRCNN):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.other = torch.nn.Linear(16, 6)
            self.other.weight = self.roi_heads.box_predictor.cls_score.weight

    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Tied", Tied)
    cfg = tiny_cfg("Tied")
    module = built(cfg).half()
    loaded = bentoml.detectron.load_model(bentoml.detectron.save_model("tied", module, cfg))
    assert loaded.other.weight is loaded.roi_heads.box_predictor.cls_score.weight
    assert torch.equal(loaded.other.weight, module.other.weight)
    assert loaded.other.weight.dtype == torch.float16


def test_model_is_built_for_the_device_that_is_asked_for(monkeypatch):
    """Some architectures keep their device from the config; and the caller's default device is no matter."""
    from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

    class Keeps(GeneralizedRCNN):
        @classmethod
        def from_config(cls, cfg):
            devices.append(cfg.MODEL.DEVICE)
            return super().from_config(cfg)

    devices: list[str] = []
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Keeps", Keeps)
    cfg = tiny_cfg("Keeps")
    module = built(cfg)
    cfg.MODEL.DEVICE = "cuda"
    saved = bentoml.detectron.save_model("keeps", module, cfg)
    torch.set_default_device("meta")
    try:
        loaded = bentoml.detectron.load_model(saved, "cpu")
    finally:
        torch.set_default_device(None)
    assert devices[-1] == "cpu"
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


@pytest.mark.parametrize("direction", ["saved with", "loaded with"])
def test_batch_counters_of_frozen_norms_may_be_on_one_side_only(direction, monkeypatch):
    """Later versions of Detectron2 keep them, 0.6 does not; they count batches of training."""
    from detectron2.layers import FrozenBatchNorm2d

    cfg = tiny_cfg()
    module = built(cfg)
    frozen = [part for part in module.modules() if isinstance(part, FrozenBatchNorm2d)]
    assert frozen
    name = "backbone.bottom_up.stem.conv1.norm.num_batches_tracked"
    if direction == "saved with":
        for part in frozen:
            part.register_buffer("num_batches_tracked", torch.tensor(0))
        assert name in module.state_dict()
        loaded = bentoml.detectron.load_model(bentoml.detectron.save_model("counted", module, cfg))
        assert name not in loaded.state_dict()
        return
    saved = bentoml.detectron.save_model("counted", module, cfg)
    original = FrozenBatchNorm2d.__init__

    def later(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    monkeypatch.setattr(FrozenBatchNorm2d, "__init__", later)
    assert name in bentoml.detectron.load_model(saved).state_dict()


def test_entry_that_is_registered_from_another_place_is_taken(monkeypatch):
    """A project that was imported from its folder when saving, and from its package when loading."""
    from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

    class Elsewhere(GeneralizedRCNN):
        pass

    Elsewhere.__module__ = "a_module_that_is_gone"
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Elsewhere", Elsewhere)
    cfg = tiny_cfg("Elsewhere")
    saved = bentoml.detectron.save_model("elsewhere", built(cfg), cfg)
    assert type(bentoml.detectron.load_model(saved)) is Elsewhere
    monkeypatch.delitem(META_ARCH_REGISTRY._obj_map, "Elsewhere")
    with pytest.raises(errors.UntrustedCodeError, match="import a_module_that_is_gone"):
        bentoml.detectron.load_model(saved)


def test_a_tag_that_is_given_stays_as_it_is(demo_predictor):
    """BentoML's store writes the version into it, and would give that one again when there is a newer one."""
    for given in (Tag("asked"), Tag("asked", "latest")):
        first = bentoml.detectron.save_model("asked", demo_predictor)
        assert bentoml.detectron.get(given).tag == first.tag
        second = bentoml.detectron.save_model("asked", demo_predictor)
        assert bentoml.detectron.get(given).tag == second.tag


class Remembering(FPN):
    """Keeps its last image's size, and counts its images, as Swin's blocks and users' modules do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.height, self.width, self.images = None, None, 0

    def forward(self, x):
        self.height, self.width = x.shape[-2:]
        self.images += 1
        return super().forward(x)


@BACKBONE_REGISTRY.register()
def build_remembering_backbone(cfg, input_shape):
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return Remembering(bottom_up, cfg.MODEL.FPN.IN_FEATURES, 16, top_block=LastLevelMaxPool())


def test_what_a_run_leaves_in_a_module_is_no_setting(store):
    cfg = tiny_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_remembering_backbone"
    module = built(cfg)
    fresh = bentoml.detectron.save_model("remembering:fresh", module, cfg)
    module([{"image": torch.zeros(3, 96, 64)}])
    used = bentoml.detectron.save_model("remembering:used", module, cfg)
    assert (module.backbone.height, module.backbone.images) == (96, 1)
    for saved in (fresh, used):
        assert verify(saved).ok
        loaded = bentoml.detectron.load_model(saved)
        loaded([{"image": torch.zeros(3, 96, 64)}])
        bentoml.detectron.save_model("remembering", loaded, cfg)
    module.backbone.top_block.in_feature = "p4"
    with pytest.raises(errors.InvalidModelError, match="in_feature"):  # which is one
        bentoml.detectron.save_model("remembering", module, cfg)


def test_model_in_16_bits_that_cannot_run_is_no_predictor():
    cfg = tiny_cfg()
    saved = bentoml.detectron.save_model("half", built(cfg).half(), cfg)
    with pytest.raises(errors.InvalidModelError, match=r"weights are torch.float16.*module.float\(\)"):
        bentoml.detectron.load_predictor(saved)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"signatures": ["__call__"]}, "signatures"),
        ({"signatures": {"__call__": True}}, "signatures"),
        ({"custom_objects": ["a"]}, "custom_objects must be a dict"),
    ],
    ids=["signatures", "a signature", "custom_objects"],
)
def test_arguments_of_other_types_are_refused(arguments, says):
    cfg = tiny_cfg()
    with pytest.raises(errors.InvalidArgumentError, match=says):
        bentoml.detectron.save_model("types", built(cfg), cfg, **arguments)


@pytest.mark.parametrize("trusted", [None, 7, "a"])
def test_trusted_that_is_no_list_is_refused(trusted):
    cfg = tiny_cfg()
    saved = bentoml.detectron.save_model("trusted", built(cfg), cfg, self_test=False)
    with pytest.raises(errors.InvalidArgumentError, match="give a list of modules"):
        bentoml.detectron.load_model(saved, trusted=trusted)


def test_empty_latest_is_named(store):
    cfg = tiny_cfg()
    saved = bentoml.detectron.save_model("emptied:1", built(cfg), cfg, self_test=False)
    latest = Path(saved.path).parent / "latest"
    latest.write_text("")
    with pytest.raises(errors.CorruptFileError, match="latest is damaged; give a version"):
        bentoml.detectron.get("emptied")
    assert bentoml.detectron.get("emptied:1").tag == saved.tag
    bentoml.detectron.save_model("emptied:2", built(cfg), cfg, self_test=False)
    assert bentoml.detectron.get("emptied:latest").tag.version == "2"


def test_model_that_would_have_no_class_names_is_told():
    """Detectron2 knows a dataset's names when it has loaded it."""
    cfg = tiny_cfg()
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = ("nameless_a",), ("nameless_b",)
    with pytest.warns(UserWarning, match=r"no class names.*nameless_a, nameless_b.*MetadataCatalog"):
        bentoml.detectron.save_model("nameless", built(cfg), cfg, self_test=False)


@pytest.mark.parametrize(("names", "is_told"), [(["a", "b"], True), (list("abcde"), False), (list("abcdef"), True)])
def test_class_names_that_are_more_or_fewer_than_the_classes_are_told(names, is_told, caplog):
    cfg = tiny_cfg()
    cfg.DATASETS.TEST = (f"named_{len(names)}",)
    MetadataCatalog.get(cfg.DATASETS.TEST[0]).set(thing_classes=names)
    bentoml.detectron.save_model("counted", built(cfg), cfg, self_test=False)
    assert ("but the model has 5" in caplog.text) == is_told


def test_class_names_are_those_of_the_dataset_that_has_as_many_as_the_model(caplog):
    """Detectron2's base configs test on COCO, and many configs set only what they train on."""
    cfg = tiny_cfg()
    MetadataCatalog.get("counted_train").set(thing_classes=list("abcde"), thing_dataset_id_to_contiguous_id={7: 0})
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = ("coco_2017_val",), ("counted_train",)
    saved = bentoml.detectron.save_model("counted", DefaultPredictor(cfg), self_test=False)
    assert "names 80 classes" not in caplog.text
    loaded = bentoml.detectron.load_predictor(saved)
    assert (loaded.dataset.name, loaded.dataset.thing_classes) == ("counted_train", list("abcde"))
    assert bentoml.detectron.load_model(saved).metadata.thing_classes == list("abcde")


def test_names_of_semantic_segmentation_are_counted_too():
    cfg = tiny_cfg("SemanticSegmentor")
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    MetadataCatalog.get("four_stuff").set(stuff_classes=list("abcd"))
    MetadataCatalog.get("three_stuff").set(stuff_classes=list("abc"))
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = ("four_stuff",), ("three_stuff",)
    saved = bentoml.detectron.save_model("counted", built(cfg), cfg, self_test=False)
    assert bentoml.detectron.load_predictor(saved).dataset.stuff_classes == list("abc")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_training_that_diverged_are_told(value):
    cfg = tiny_cfg()
    model = built(cfg)
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.bias[3] = value
    with pytest.warns(
        UserWarning, match=r"1 of the model's weights hold NaN or infinity, the first is roi_heads\.box_predictor\.bbox_pred"
    ):
        bentoml.detectron.save_model("diverged", model, cfg)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("MIN_SIZE_TEST", -1, "MIN_SIZE_TEST is -1; it must be a whole number"),
        ("MAX_SIZE_TEST", -5, "MAX_SIZE_TEST is -5; it must be a whole number"),
        ("MAX_SIZE_TEST", 0, "MAX_SIZE_TEST is 0, to which no image can be scaled"),
    ],
)
def test_sizes_to_which_no_image_can_be_scaled_are_refused(key, value, says):
    cfg = tiny_cfg()
    cfg.INPUT[key] = value
    with pytest.raises(errors.InvalidModelError, match=says):
        bentoml.detectron.save_model("unscaled", built(cfg), cfg)


def test_model_without_values_is_refused():
    cfg = tiny_cfg()
    with pytest.raises(errors.InvalidModelError, match="on the device 'meta', without values"):
        bentoml.detectron.save_model("empty", built(cfg).to("meta"), cfg)


def test_model_inside_another_is_named():
    """As that of PyTorch's averaged weights, or a LightningModule's."""
    cfg = tiny_cfg()
    with pytest.raises(errors.WeightsMismatchError, match=r"^the model is inside AveragedModel; save its attribute 'module'"):
        bentoml.detectron.save_model("averaged", torch.optim.swa_utils.AveragedModel(built(cfg)), cfg)
