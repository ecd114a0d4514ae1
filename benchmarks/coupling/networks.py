"""The networks of each family, with random weights; those of facenet-pytorch with the weights of their wheel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

FIXED = {
    "inception_v3": 96,
    "maxvit_t": 224,
    "alexnet": 224,
    "s3d": 224,
    "mvit_v1_b": 224,
    "mvit_v2_s": 224,
    "ssd300_vgg16": 300,
} | {f"vgg{n}": 224 for n in (11, 13, 16, 19)}  # networks that ask for a size, or for at least one
ONE_TOKEN = {"efficientvit_m0": 224, "levit_128s": 224, "levit_conv_128s": 224, "shvit_s1": 224}
"""Networks whose last attention sees a single token of a smaller image: a softmax over one is 1 whatever it is of."""
TIMM = """
convnext_atto convnext_tiny convnextv2_atto edgenext_xx_small edgenext_small mobilenetv4_conv_small
mobilenetv4_hybrid_medium mobilenetv3_small_100 efficientnet_lite0 tf_efficientnetv2_b0 efficientnetv2_rw_t regnetx_004
regnety_004 regnetz_c16 repvgg_a0 repghostnet_050 mobileone_s0 fastvit_t8 fastvit_sa12 efficientvit_b0 efficientvit_m0
efficientformer_l1 efficientformerv2_s0 ghostnet_100 ghostnetv2_100 densenet121 inception_v3 inception_v4
inception_resnet_v2 xception41 hrnet_w18_small resnet18 resnet50d resnext26ts seresnet18 ecaresnet26t skresnet18
resnest14d res2net50_26w_4s selecsls42 dla34 dpn68 vovnet39a ese_vovnet19b_dw cspresnet50 cspdarknet53 darknet53
hardcorenas_a tinynet_e mnasnet_small mixnet_s lcnet_050 spnasnet_100 fbnetc_100 rexnet_100 gernet_s nf_resnet26
vit_tiny_patch16_224 vit_small_patch32_224 deit_tiny_patch16_224 deit3_small_patch16_224 cait_xxs24_224
swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 pvt_v2_b0 levit_128s levit_conv_128s xcit_nano_12_p16_224
resmlp_12_224 mixer_s32_224 gmlp_ti16_224 poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18 coat_tiny
coatnet_0_rw_224 maxvit_tiny_rw_224 mobilevit_xxs mobilevitv2_050 tiny_vit_5m_224 twins_pcpvt_small twins_svt_small
nest_tiny visformer_tiny crossvit_tiny_240 convit_tiny beit_base_patch16_224 focalnet_tiny_srf davit_tiny
gcvit_xxtiny inception_next_atto repvit_m0_9 starnet_s1 shvit_s1 hgnetv2_b0 rdnet_tiny mambaout_femto sequencer2d_s
"""

MTCNN = {"PNet": 48, "RNet": 24, "ONet": 48}
"""Networks of facenet-pytorch, and the side of their images: P-Net slides over any, the others ask for theirs."""

TRAINED = ("mtcnn",)
"""Families whose weights are real."""

MODULES = {
    "torchvision": "torchvision.models",
    "segmentation": "torchvision.models.segmentation",
    "detection": "torchvision.models.detection",
    "video": "torchvision.models.video",
}


def families() -> dict[str, Callable[[], list[str]]]:
    """Family -> names of its networks, those of torchvision by the operations that they take, least first."""
    found: dict[str, Callable[[], list[str]]] = {
        family: lambda module=module: _torchvision_names(module)  # type: ignore[misc]
        for family, module in MODULES.items()
    }
    return found | {"timm": TIMM.split, "mtcnn": lambda: list(MTCNN)}


def build(family: str, name: str, size: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network in eval mode, and an example."""
    torch.manual_seed(0)
    torchvision()
    if family == "timm":
        return _timm(name, size)
    if family == "mtcnn":
        nets = importlib.import_module("facenet_pytorch.models.mtcnn")
        return getattr(nets, name)().eval(), (torch.randn(1, 3, MTCNN[name], MTCNN[name]),)
    return _torchvision(family, name, size)


# --- torchvision ---------------------------------------------------------------------------------------------------


@cache
def torchvision() -> Any:
    """torchvision beside a CPU build of torch: two operators that its compiled part would declare are declared here."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    package: Any = importlib.import_module("torchvision")
    package.kept = library
    return package


def _torchvision_names(module: str) -> list[str]:
    models = torchvision().models
    names = models.list_models(module=importlib.import_module(module))
    return sorted(names, key=lambda name: float(models.get_model_weights(name).DEFAULT.meta["_ops"]))


def _torchvision(family: str, name: str, size: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    size = max(size, FIXED.get(name.removesuffix("_bn"), size))
    if name.startswith("vit_"):
        size = max(size, 28) // 32 * 32 if "32" in name else max(size, 28) // 14 * 14 if "14" in name else size
    options: dict[str, Any] = {"weights": None}
    if family in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if name.startswith("vit_"):
        options["image_size"] = size
    if name in ("inception_v3", "googlenet"):
        options |= {"init_weights": False, "aux_logits": name != "googlenet"}
    model: nn.Module = torchvision().models.get_model(name, **options).eval()
    if family == "detection":
        model = Detector(model).eval()
    frames = (16,) if family == "video" else ()
    return model, (torch.randn(1, 3, *frames, size, size),)


class Detector(nn.Module):
    """A detection network of torchvision up to what picks boxes: backbone, neck, and the heads that see whole maps.

    Networks of one stage give what their heads give. Those of two stages give the maps too, since boxes are cut out of
    them afterwards: the channels of those maps are outputs, as they are for the second stage.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone: nn.Module = network.backbone  # type: ignore[assignment]
        self.two_stages = hasattr(network, "rpn")
        self.head: nn.Module = network.rpn.head if self.two_stages else network.head  # type: ignore[assignment, union-attr]

    def forward(self, images: Tensor) -> list[Any]:
        """images: (N, 3, H, W), normalised and resized already."""
        maps = list(self.backbone(images).values())
        return [self.head(maps), *(maps if self.two_stages else [])]


# --- timm ----------------------------------------------------------------------------------------------------------


def _timm(name: str, size: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    timm: Any = importlib.import_module("timm")
    size = max(size, ONE_TOKEN.get(name, size))
    for options in ({"img_size": size}, {}):
        try:
            model: nn.Module = timm.create_model(name, pretrained=False, **options).eval()
            with torch.no_grad():
                model(torch.randn(1, 3, size, size))
            return model, (torch.randn(1, 3, size, size),)
        except (TypeError, RuntimeError, AssertionError, ValueError):
            continue
    size = model.pretrained_cfg["input_size"][-1]  # type: ignore[index, assignment]
    return model, (torch.randn(1, 3, size, size),)
