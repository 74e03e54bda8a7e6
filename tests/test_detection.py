"""Torchvision's detectors and segmenters with a converted backbone: forward, a step, saved."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, segmentation

from pfsurgery import Base, convert, load, plan, record, save, set_base

SIZE = 64


def faster_rcnn() -> nn.Module:
    torch.manual_seed(0)
    return detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=SIZE, max_size=SIZE
    )


def deeplab(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4, **kwargs
    )


def photographs() -> tuple[list[Tensor]]:
    return ([torch.rand(3, SIZE, SIZE), torch.rand(3, SIZE, 48)],)


def moved(model: nn.Module, loss: Tensor) -> None:
    """One step of SGD reaches every parameter that the loss depends on."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss.backward()
    assert loss.isfinite()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 20
    assert all(g.isfinite().all() for g in gradients)
    optimizer.step()


def test_faster_rcnn():
    model = faster_rcnn().eval()
    fast = convert(model, "maxpool_all", example=photographs())
    assert type(fast) is type(model)
    decided = {d.site.name: d for d in record(fast).plans[0]}
    # anchors are made of the sizes of feature maps alone: no feature map feeds the boxes by them
    assert [d.site.name for d in decided.values() if not d.replaced] == ["backbone.body.0.0"]
    with torch.no_grad():
        found = fast(*photographs())
    assert [set(boxes) for boxes in found] == [{"boxes", "labels", "scores"}] * 2
    targets = [
        {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[8.0, 8.0, 30.0, 44.0]]), "labels": torch.tensor([2])},
    ]
    losses = fast.train()(*photographs(), targets)
    moved(fast, torch.stack(list(losses.values())).sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_heads_for_masks_and_keypoints_train(name):
    """With labels there are boxes for them, however little the backbone knows."""
    torch.manual_seed(0)
    model = getattr(detection, name)(
        weights=None, weights_backbone=None, min_size=2 * SIZE, max_size=2 * SIZE
    ).eval()
    image = [torch.rand(3, 2 * SIZE, 2 * SIZE)]
    fast = convert(model, "maxpool_all", example=(image,)).train()
    target = {"boxes": torch.tensor([[10.0, 10.0, 100.0, 100.0]]), "labels": torch.tensor([1])}
    if name.startswith("mask"):
        target["masks"] = torch.ones(1, 2 * SIZE, 2 * SIZE, dtype=torch.uint8)
    else:
        target["keypoints"] = torch.cat([torch.rand(1, 17, 2) * 80 + 15, torch.ones(1, 17, 1)], -1)
    losses = fast(image, [target])
    torch.stack(list(losses.values())).sum().backward()
    without = [n for n, p in fast.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in fast.parameters() if p.grad is not None)


def test_the_convolutions_of_a_detector_that_write_classes_and_boxes_are_kept():
    model = detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=SIZE, max_size=SIZE
    ).eval()
    decided = plan(model, "maxpool_all", example=([torch.rand(3, SIZE, SIZE)],))
    assert {d.site.name for d in decided if not d.replaced and not d.site.stem} == {
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",
    }
    for output in ("classification_head.cls_logits", "regression_head.bbox_reg"):
        assert decided[f"head.{output}"].reason == "it feeds the model's output"


@pytest.mark.parametrize("auxiliary", [False, True])
def test_deeplab(auxiliary, tmp_path):
    model = deeplab(aux_loss=auxiliary).eval()
    set_base(
        model,
        Base(
            "torchvision",
            "deeplabv3_mobilenet_v3_large",
            {"num_classes": 4, "aux_loss": auxiliary},
        ),
    )
    example = torch.zeros(1, 3, SIZE, SIZE)
    fast = convert(model, "maxpool_all", example=example)
    with torch.no_grad():
        made, meant = fast(example), model(example)
        assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in meant.items()}
        again = load(save(fast, tmp_path))
        torch.testing.assert_close(again(example), made)
    output = fast.train()(torch.rand(2, 3, SIZE, SIZE))["out"]
    moved(fast, nn.functional.cross_entropy(output, torch.randint(0, 4, (2, SIZE, SIZE))))


def test_a_head_whose_output_convolution_is_spatial_is_kept_until_it_is_named():
    model = deeplab().eval()
    model.classifier[4] = nn.Conv2d(256, 4, 3, padding=1)
    example = torch.zeros(1, 3, SIZE, SIZE)
    decision = plan(model, "maxpool_all", example=example)["classifier.4"]
    assert (decision.op, decision.reason) == ("keep", "it feeds the model's output")
    named = plan(model, "maxpool_all", example=example, include="classifier.4")
    assert named["classifier.4"].label == "max_pool+pointwise"


def test_a_converted_classifier_serves_as_the_backbone_of_a_detector():
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    torch.manual_seed(0)
    body = convert(torchvision.models.resnet18(norm_layer=nn.BatchNorm2d), "maxpool_deep")
    backbone = _resnet_fpn_extractor(body, trainable_layers=5)
    model = detection.FasterRCNN(backbone, 3, min_size=SIZE, max_size=SIZE).eval()
    with torch.no_grad():
        assert len(model(*photographs())) == 2
