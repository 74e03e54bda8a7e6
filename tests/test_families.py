"""One model of each timm family: all sites found, `maxpool_all` converts, shapes stay."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from pfsurgery import convert, record, scan
from pfsurgery.scan import is_spatial
from tests.closed_list import RESULT, reason_of

# The smallest model of each family that has spatial convolutions, and how many it has.
FAMILIES = {
    "beit_base_patch16_224": 1,
    "halonet_h1": 1,
    "test_byobnet": 6,
    "cait_xxs24_224": 1,
    "coat_tiny": 20,
    "convit_tiny": 1,
    "convmixer_768_32": 33,
    "test_convnext": 13,
    "cpubone_nano": 11,
    "crossvit_tiny_240": 2,
    "csatv2": 49,
    "cs3darknet_focus_s": 14,
    "cspnext_tiny": 15,
    "davit_tiny": 28,
    "deepseek_vit_412m": 1,
    "deit_tiny_patch16_224": 1,
    "densenet121": 59,
    "dla46x_c": 15,
    "dpn48b": 17,
    "edgenext_xx_small": 19,
    "efficientformer_l1": 5,
    "efficientformerv2_s0": 27,
    "test_efficientnet": 6,
    "efficientvim_m1": 28,
    "efficientvit_b0": 16,
    "efficientvit_m0": 46,
    "vit_tiny_patch16_dinov3_qkvb": 1,
    "fasternet_t0": 17,
    "fastvit_t8": 29,
    "focalnet_tiny_srf": 28,
    "gcvit_xxtiny": 16,
    "ghostnet_050": 42,
    "hardcorenas_b": 19,
    "hgnetv2_b0": 22,
    "hiera_tiny_224": 1,
    "sam2_hiera_tiny": 1,
    "hrnet_w18_small": 65,
    "iformer_t": 21,
    "inception_next_atto": 40,
    "inception_resnet_v2": 104,
    "inception_v3": 54,
    "inception_v4": 88,
    "lcnetv2_small": 18,
    "levit_128s": 4,
    "lowformer_b0": 19,
    "test_mambaout": 11,
    "test_coatnet": 4,
    "poolformerv2_s12": 4,
    "gmlp_ti16_224": 1,
    "mobilenetv3_small_050": 12,
    "mobilenetv5_base": 16,
    "mobilevit_xxs": 14,
    "mvitv2_tiny": 31,
    "nasnetalarge": 221,
    "nest_tiny": 3,
    "nextvit_small": 24,
    "test_nfnet": 12,
    "pit_ti_224": 3,
    "pnasnet5large": 169,
    "pvt_v2_b0": 18,
    "qwen3_vit_88m": 1,
    "rdnet_tiny": 25,
    "regnetx_002": 14,
    "repghostnet_050": 42,
    "repvit_m1": 28,
    "res2next50": 49,
    "resnest14d": 7,
    "test_resnet": 10,
    "resnetv2_18": 17,
    "rexnet_100": 17,
    "selecsls42": 22,
    "legacy_seresnet18": 17,
    "sequencer2d_s": 2,
    "shvit_s1": 21,
    "skresnet18": 25,
    "starnet_s050": 17,
    "swiftformer_xs": 21,
    "swin_tiny_patch4_window7_224": 1,
    "swinv2_tiny_window16_256": 1,
    "swinv2_cr_tiny_224": 1,
    "tiny_vit_5m_224": 17,
    "tnt_s_legacy_patch16_224": 1,
    "tresnet_m": 29,
    "twins_svt_small": 15,
    "vgg11": 9,
    "visformer_tiny": 11,
    "test_vit": 1,
    "vit_tiny_r_s16_p8_224": 2,
    "test_vit_relpos": 1,
    "samvit_base_patch16_224": 1,
    "vitamin_small_224": 9,
    "volo_d1_224": 5,
    "ese_vovnet19b_slim_dw": 15,
    "legacy_xception": 36,
    "xception41p": 41,
    "xcit_nano_12_p8_224": 27,
}
EVERYDAY = (
    "test_byobnet",
    "test_convnext",
    "test_efficientnet",
    "test_resnet",
    "test_mambaout",
    "test_coatnet",
    "densenet121",
    "dla46x_c",
    "edgenext_xx_small",
    "efficientformerv2_s0",
    "efficientvit_b0",
    "fasternet_t0",
    "fastvit_t8",
    "ghostnet_050",
    "hgnetv2_b0",
    "inception_next_atto",
    "lcnet_035",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "pvt_v2_b0",
    "regnetx_002",
    "repvit_m1",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "starnet_s050",
    "tiny_vit_5m_224",
    "vgg11",
    "xcit_nano_12_p8_224",
    "nf_regnet_b0",
    "tf_efficientnet_b0",
    "tresnet_m",
    "csatv2",
    "davit_tiny",
)


def check(name: str) -> None:
    model = timm.create_model(name).eval()
    sites = scan(model)
    named = {site.name for site in sites if ":" not in site.name}
    modules = {path for path, module in model.named_modules() if is_spatial(module)}
    assert named == modules
    if name in FAMILIES:
        assert len(named) == FAMILIES[name]
    fast = convert(model, "maxpool_all")
    chosen = record(fast).plans[0]
    assert sum(decision.site.stem for decision in chosen) <= 2, "CrossViT has two stems"
    for decision in chosen:
        assert decision.replaced or reason_of(decision.reason), decision
        plain = decision.site.geometry.stride == (1, 1) and not decision.site.stem
        if plain and decision.site.blocked is None:
            assert decision.replaced, decision
    with torch.no_grad():
        size = sites[0].input_shape if name != "csatv2" else (1, 3, 512, 512)
        x = torch.zeros(1, *(model.pretrained_cfg["input_size"] or size[1:]), device="meta")
        assert fast.to("meta")(x).shape == model.to("meta")(x).shape


@pytest.mark.parametrize("name", EVERYDAY)
@pytest.mark.filterwarnings("ignore::pfsurgery.errors.NoEffectWarning")
def test_a_family(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(EVERYDAY)))
@pytest.mark.filterwarnings("ignore::pfsurgery.errors.NoEffectWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_every_other_family(name):
    check(name)


def test_each_site_of_the_sweep_is_kept_for_a_reason_of_the_closed_list():
    rows = json.loads(RESULT.read_text())["models"]
    kept = {text for row in rows for text in row.get("maxpool_all", {}).get("kept", {})}
    assert kept
    assert not [text for text in kept if reason_of(text) is None]


@pytest.mark.parametrize("text", ["", "it cannot be converted", "unknown: it reads something"])
def test_a_catch_all_is_not_in_the_list(text):
    assert reason_of(text) is None
