from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pfsurgery import Site, register_convolution, scan
from pfsurgery.errors import NoSitesError, ShapeError, WrappedModelError
from pfsurgery.scan import is_spatial
from tests import zoo
from tests.closed_list import reason_of


def site(model: nn.Module, name: str) -> Site:
    return next(s for s in scan(model, zoo.EXAMPLE) if s.name == name)


def test_a_bottleneck_knows_its_neighbours():
    found = {s.name: s for s in scan(timm.create_model("resnet50"))}
    assert len(found) == 17
    first = found["layer3.0.conv2"]
    assert str(first.geometry) == "3x3 s2 256"
    assert (first.kind, first.stage, first.calls) == ("dense", 2, 1)
    assert first.input_shape == (1, 256, 28, 28)
    assert first.output_shape == (1, 256, 14, 14)
    around = first.neighbours
    assert (around.norm, around.activation) == ("layer3.0.bn2", "layer3.0.act2")
    assert (around.pointwise_before, around.pointwise_after) == ("layer3.0.conv1", "layer3.0.conv3")
    assert around.branch == "layer3.0"
    assert first.bottleneck
    assert found["conv1"].stem
    assert not any(s.stem for name, s in found.items() if name != "conv1")


def test_neighbours_are_found_through_squeeze_excitation_and_layer_norm():
    efficient = {s.name: s for s in scan(timm.create_model("efficientnet_b0"))}
    assert efficient["blocks.2.1.conv_dw"].neighbours.pointwise_after == "blocks.2.1.conv_pwl"
    convnext = {s.name: s for s in scan(timm.create_model("convnext_atto"))}
    block = convnext["stages.1.blocks.0.conv_dw"]
    assert block.neighbours.norm == "stages.1.blocks.0.norm"
    assert block.neighbours.pointwise_after == "stages.1.blocks.0.mlp.fc1"


def test_basic_blocks_have_no_pointwise_neighbour():
    for s in scan(timm.create_model("resnet18")):
        assert s.neighbours.pointwise_after is None, s.name


def test_depth_counts_resolution_stages_or_order_where_there_is_one():
    depths = {s.name: s.depth for s in scan(timm.create_model("resnet50"))}
    assert depths["layer1.0.conv2"] == 0
    assert depths["layer3.5.conv2"] == 0.5
    isotropic = [s.depth for s in scan(timm.create_model("convmixer_768_32")) if not s.stem]
    assert isotropic == sorted(isotropic)
    assert isotropic[-1] > 0.9


def test_every_alias_and_every_call_is_seen():
    twice = site(zoo.CalledTwice(), "dense.0")
    assert twice.calls == 2
    assert twice.positions == 16 * 16 + 8 * 8
    assert site(zoo.Aliased(), "dense.0").names == ("dense.0", "again.0")


def test_stems_and_outputs_are_marked():
    model = zoo.DenseOutput()
    assert site(model, "stem.0").stem
    assert site(model, "out").output
    assert not site(model, "body.0").output


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (zoo.Subclassed, "dense.0", "subclass of Conv2d"),
        (zoo.WeightReader, "dense.0", "also read by"),
        (zoo.Functional, "model:conv2d", "functional"),
        (zoo.Parametrized, "dense.0", "parametrised"),
    ],
)
def test_what_cannot_be_replaced_says_why(model, name, reason):
    blocked = site(model(), name).blocked
    assert reason in blocked
    assert reason_of(blocked)


def test_a_registered_subclass_is_free():
    class Free(nn.Conv2d):
        pass

    model = zoo.Plain()
    model.dense[0] = Free(8, 8, 3, padding=1)
    assert site(model, "dense.0").blocked
    register_convolution(Free)
    assert site(model, "dense.0").blocked is None


def test_values_may_decide_what_runs():
    assert {s.name for s in scan(zoo.DataDependent(), zoo.EXAMPLE)} == {
        "stem.0",
        "dense.0",
        "down.0",
    }


@pytest.mark.parametrize("make", zoo.TRAPS)
def test_scanning_leaves_no_trace(make):
    model = make().train()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    scan(model, zoo.EXAMPLE)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert not calls
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_sites_survive_json():
    for s in scan(timm.create_model("mobilenetv3_small_050")):
        assert Site.from_dict(s.to_dict()) == s


def test_the_example_follows_the_model():
    assert scan(timm.create_model("test_resnet"))[0].input_shape == (1, 3, 160, 160)
    assert scan(timm.create_model("test_resnet", in_chans=1))[0].input_shape[1] == 1


def test_errors_say_what_to_do():
    with pytest.raises(NoSitesError, match="no spatial convolution"):
        scan(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ShapeError, match="Pass example="):
        scan(zoo.Plain(), torch.zeros(1, 5, 16, 16))
    with pytest.raises(ShapeError, match="not list"):
        scan(zoo.Plain(), [zoo.EXAMPLE])
    with pytest.raises(WrappedModelError, match=r"model\.module"):
        scan(nn.DataParallel(zoo.Plain()))
    with pytest.raises(WrappedModelError, match="_orig_mod"):
        scan(torch.compile(zoo.Plain()))


def test_spatial_means_a_kernel_of_more_than_one_pixel():
    assert is_spatial(nn.Conv2d(1, 1, (1, 2)))
    assert not is_spatial(nn.Conv2d(1, 1, 1))
    assert not is_spatial(nn.Conv1d(1, 1, 1))
    assert not is_spatial(nn.MaxPool2d(3))
    for cls in (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d):
        assert is_spatial(cls(1, 1, 2))


@pytest.mark.parametrize(
    "end",
    [
        nn.Identity(),
        nn.Dropout(),
        nn.Upsample(scale_factor=2),
        nn.Flatten(),
        nn.Sigmoid(),
        nn.PixelShuffle(2),
        nn.Softmax(1),
    ],
)
def test_an_output_stays_an_output_behind_what_has_no_weights(end):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1), end)
    assert [s.output for s in scan(model, zoo.EXAMPLE)] == [False, True]


def test_a_classifier_behind_global_pooling_makes_no_output_of_a_convolution():
    assert not any(s.output for s in scan(timm.create_model("test_resnet", num_classes=0)))
    assert not any(s.output for s in scan(timm.create_model("vgg11", num_classes=0)))


def test_convolutions_are_seen_where_the_data_flow_is_lost():
    class Lost(zoo.Plain):
        def __init__(self) -> None:
            super().__init__()
            self.constant = nn.Parameter(torch.randn(1, 8, 16, 16))
            self.other = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.stem(x)
            y = torch.zeros(x.shape, device=x.device)
            y[:, :] = self.dense(x)
            y = y + self.other(self.constant)
            return self.head(self.down(y).mean((2, 3)))

    names = {s.name for s in scan(Lost(), zoo.EXAMPLE)}
    assert names == {"stem.0", "dense.0", "other", "down.0"}


def test_detection_models_are_scanned():
    import torchvision

    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None
    )
    sites = scan(model, ([torch.rand(3, 320, 320)],))
    assert len(sites) == sum(is_spatial(m) for m in model.modules())
    assert sum(s.stem for s in sites) == 1


def test_values_that_decide_leave_buffers_example_and_random_state_alone():
    class Counting(zoo.DataDependent):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            x.sub_(torch.rand(1))
            return super().forward(x)

    model, x = Counting(), torch.ones(1, 3, 16, 16)
    state = torch.get_rng_state()
    scan(model, x)
    assert model.calls == 0
    assert torch.equal(x, torch.ones_like(x))
    assert torch.equal(state, torch.get_rng_state())


def test_lazy_and_tied_convolutions_are_explained():
    with pytest.raises(ShapeError, match="run the model on one batch"):
        scan(nn.Sequential(nn.LazyConv2d(4, 3)), zoo.EXAMPLE)
    tied = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    tied[2].weight = tied[1].weight
    blocked = scan(tied, zoo.EXAMPLE)[1].blocked
    assert "shared with 2" in blocked
    assert reason_of(blocked)


def test_a_linear_layer_mixes_channels_only_where_they_are_last():
    class Rows(nn.Module):
        def __init__(self, last: bool) -> None:
            super().__init__()
            self.stem, self.site = zoo.conv_norm_act(3, 16), nn.Conv2d(16, 16, 3, padding=1)
            self.linear, self.last = nn.Linear(16, 16), last

        def forward(self, x):
            x = self.site(self.stem(x))
            return self.linear(x.permute(0, 2, 3, 1) if self.last else x)

    for last in (True, False):
        after = site(Rows(last), "site").neighbours.pointwise_after
        assert after == ("linear" if last else None)


def test_a_layer_that_reads_sizes_alone_leads_nowhere_and_one_that_turns_its_input_does():
    class Grid(nn.Module):
        def forward(self, x):
            return torch.ones(x.shape[-2:], dtype=x.dtype, device=x.device)

    class Turned(nn.Module):
        def forward(self, x):
            return x.mT

    class Boxes(nn.Module):
        def __init__(self, between):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.between, self.classes = between, nn.Linear(4, 2)

        def forward(self, x):
            y = self.conv(self.stem(x))
            return self.between(y), self.classes(y.mean((2, 3)))

    assert not site(Boxes(Grid()), "conv").output
    assert site(Boxes(Turned()), "conv").output
