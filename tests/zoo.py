"""Models of every family of Detectron2's zoo that a pure-Python build can run, made narrow, with thresholds for random weights.

FCOS is in the zoo as a LazyConfig only; here a registered function builds it, as whoever wants it by a CfgNode would do.
"""

from __future__ import annotations

import importlib.util

import pytest
from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import META_ARCH_REGISTRY

no_fcos = importlib.util.find_spec("detectron2.modeling.meta_arch.fcos") is None

ZOO = {
    "Faster R-CNN, C4": "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
    "Faster R-CNN, DC5": "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml",
    "Faster R-CNN, FPN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "Faster R-CNN, FPN, ResNeXt": "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
    "Fast R-CNN, FPN": "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml",
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "RPN, C4": "COCO-Detection/rpn_R_50_C4_1x.yaml",
    "RPN, FPN": "COCO-Detection/rpn_R_50_FPN_1x.yaml",
    "Mask R-CNN, C4": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    "Mask R-CNN, DC5": "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml",
    "Mask R-CNN, FPN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "Mask R-CNN, GroupNorm": "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml",
    "Mask R-CNN, SyncBN": "Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml",
    "Mask R-CNN, class-agnostic": "Misc/mask_rcnn_R_50_FPN_1x_cls_agnostic.yaml",
    "Mask R-CNN, deformable convolution": "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml",
    "Mask R-CNN, LVIS": "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "Mask R-CNN, Cityscapes": "Cityscapes/mask_rcnn_R_50_FPN.yaml",
    "Cascade Mask R-CNN": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "Keypoint R-CNN": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "Semantic FPN": "Misc/semantic_R_50_FPN_1x.yaml",
    "Panoptic FPN": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
}


def zoo_config(name: str):
    """A zoo config with an eighth of the channels, thresholds that let everything through, and for small images."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(name))
    return narrowed(cfg)


def narrowed(cfg):
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    least = 32 if cfg.MODEL.RESNETS.NORM == "GN" else 8  # GroupNorm has 32 groups
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = least
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = least if cfg.MODEL.RESNETS.NUM_GROUPS == 1 else 1
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        cfg.MODEL.RESNETS.NORM = "BN"  # with statistics of their own, so that activations stay finite
    cfg.MODEL.PIXEL_STD = [5000.0, 5000.0, 5000.0]  # random weights amplify
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 255
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [32, 32]
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.0
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    cfg.INPUT.MIN_SIZE_TEST = 128
    cfg.INPUT.MAX_SIZE_TEST = 160
    return cfg


def point_rend():
    from detectron2.projects.point_rend import add_pointrend_config

    cfg = get_cfg()
    add_pointrend_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.ROI_MASK_HEAD.NAME = "PointRendMaskHead"
    cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = True
    cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
    cfg.MODEL.ROI_MASK_HEAD.FC_DIM = 32
    cfg.MODEL.POINT_HEAD.FC_DIM = 16
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = 80
    return narrowed(cfg)


def point_rend_semantic():
    from detectron2.projects.point_rend import add_pointrend_config

    cfg = get_cfg()
    add_pointrend_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("Misc/semantic_R_50_FPN_1x.yaml"))
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PointRendSemSegHead"
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    cfg.MODEL.POINT_HEAD.FC_DIM = 16
    cfg.MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS = 256
    return narrowed(cfg)


def deeplab():
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res5"]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "DeepLabV3PlusHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS = 16
    cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 19
    return narrowed(cfg)


def panoptic_deeplab():
    from detectron2.projects.panoptic_deeplab import add_panoptic_deeplab_config

    cfg = get_cfg()
    add_panoptic_deeplab_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "PanopticDeepLab"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res5"]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PanopticDeepLabSemSegHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_FEATURES = ["res2", "res3"]
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS = [8, 8]
    cfg.MODEL.SEM_SEG_HEAD.HEAD_CHANNELS = 16
    cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS = 16
    cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 19
    cfg.MODEL.INS_EMBED_HEAD.ASPP_CHANNELS = 16
    cfg.MODEL.INS_EMBED_HEAD.CONVS_DIM = 16
    cfg.MODEL.INS_EMBED_HEAD.NORM = "BN"
    cfg.MODEL.PANOPTIC_DEEPLAB.CENTER_THRESHOLD = 0.0
    cfg.MODEL.PANOPTIC_DEEPLAB.STUFF_AREA = 1
    # The dataset tells which classes are things.
    cfg.DATASETS.TRAIN = ("cityscapes_fine_panoptic_train",)
    cfg.DATASETS.TEST = ("cityscapes_fine_panoptic_val",)
    return narrowed(cfg)


@META_ARCH_REGISTRY.register()
def build_fcos_of_the_zoo(cfg):
    model = LazyConfig.load(model_zoo.get_config_file("common/models/fcos.py")).model
    model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "BN"
    model.head.norm = "BN"  # Detectron2 0.6 tries GroupNorm out on one channel, which PyTorch no longer takes
    model.pixel_std = list(cfg.MODEL.PIXEL_STD)
    model.test_score_thresh = 0.0
    model.max_detections_per_image = cfg.TEST.DETECTIONS_PER_IMAGE
    return instantiate(model)


def fcos():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "build_fcos_of_the_zoo"
    return narrowed(cfg)


PROJECTS = {
    "FCOS": pytest.param(fcos, marks=pytest.mark.skipif(no_fcos, reason="this Detectron2 has no FCOS")),
    "PointRend": point_rend,
    "PointRend, semantic": point_rend_semantic,
    "DeepLab v3+": deeplab,
    "Panoptic-DeepLab": panoptic_deeplab,
}
