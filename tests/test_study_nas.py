"""The architecture search: supernet, search that goes on, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from pfsurgery.errors import DataError, SurgeryError, TrainingError, UnsupportedSiteError
from pfsurgery.run_folder import read_run
from pfsurgery.study import darts, nas
from pfsurgery.study.darts import SearchSetting
from pfsurgery.study.nas import Cell, NasSetting, nas_study
from pfsurgery.study.networks import bottlenecks, dense_network
from pfsurgery.study.supernet import choices, supernet
from tests import test_cli, test_study_layer

cli = test_cli.cli

TINY = NasSetting(
    images=24,
    val_images=12,
    size=16,
    layers=(1, 1),
    width=4,
    epochs=1,
    batch_size=4,
    seeds=1,
    candidates=("depthwise", "max_pool", "mixed"),
    search=SearchSetting(epochs=2, warmup=1, choice_lr=0.1),
)
EXAMPLE = torch.zeros(1, 3, 16, 16)


def net(*candidates):
    dense = dense_network(TINY, channels=3, classes=3, seed=0)
    return supernet(dense, bottlenecks(dense, EXAMPLE), candidates, seed=0)


def test_each_bottleneck_has_its_own_choice():
    model = net("dense", "depthwise", "max_pool", "shift", "mixed", "identity")
    first, second = choices(model)
    assert first.logits is not second.logits
    assert first.weights() == pytest.approx(dict.fromkeys(first.candidates, 1 / 6))
    assert isinstance(model.layer1[0].bn2, torch.nn.Identity)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(choice.logits.grad.abs().max() > 0 for choice in (first, second))
    with torch.no_grad():
        first.logits[2] = 50.0
    x = torch.randn(4, 4, 8, 8)
    assert torch.allclose(first(x), first.candidates["max_pool"](x), atol=1e-5)
    with pytest.raises(UnsupportedSiteError, match="avg_down"):
        net("avg_down", "max_pool")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"epochs": 0}, "epochs"), ({"warmup": 2}, "warmup=2"), ({"choice_lr": 0}, "choice_lr")],
)
def test_wrong_settings_of_the_search_are_refused(wrong, message):
    with pytest.raises(TrainingError, match=message):
        replace(TINY.search, **wrong)


@pytest.mark.parametrize("wrong", [("max_pool",), ("max_pool", "max_pool")])
def test_wrong_candidates_are_refused(wrong):
    with pytest.raises(SurgeryError, match="candidates"):
        replace(TINY, candidates=wrong)


def test_a_search_goes_on_where_it_was(tmp_path, monkeypatch):
    train, val = test_study_layer.batches(24), test_study_layer.batches(12)
    whole = nas_study(train, val, tmp_path / "whole", setting=TINY)

    # Killed in the second epoch of the search
    real = darts._epoch

    def killed(model, halves, descend, choose, how, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return real(model, halves, descend, choose, how, epoch)

    monkeypatch.setattr(darts, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        nas_study(train, val, tmp_path / "cut", setting=TINY)
    monkeypatch.setattr(darts, "_epoch", real)
    # Trainings of the same networks need not be done twice for this test
    (tmp_path / "cut" / "trainings.jsonl").write_bytes(
        (tmp_path / "whole" / "trainings.jsonl").read_bytes()
    )
    again = nas_study(train, val, tmp_path / "cut", setting=TINY)
    assert again.history == whole.history
    assert again.cells == whole.cells
    assert len({tuple(cell.weights.values()) for cell in whole.cells}) == len(whole.cells) == 2
    assert [cell.kind for cell in whole.cells] == ["normal", "reduction"]
    assert [cell.depth for cell in whole.cells] == [0.0, 1.0]

    written = json.loads((tmp_path / "cut" / "nas.json").read_text())
    assert set(written) == {
        *("setting", "paper_setting", "candidates", "cells", "history", "found", "baselines"),
    }
    assert set(written["found"]) == {"top1", "params", "macs", "ms"}
    assert [made["name"] for made in written["baselines"]] == [
        *("all depthwise", "all max_pool", "random"),
    ]
    assert set(written["history"][0]) == {"step", "loss", "top1"}
    assert written["setting"]["search_epochs"] == 2
    assert read_run(tmp_path / "cut").kind == "nas"

    other = replace(TINY, search=replace(TINY.search, seed=1))
    with pytest.raises(SurgeryError, match=r"search_seed \(then 0, now 1\)"):
        nas_study(train, val, tmp_path / "cut", setting=other)


def test_one_image_a_class_is_too_few(tmp_path):
    pixels, val = torch.randn(3, 3, 16, 16), test_study_layer.batches(12)
    with pytest.raises(DataError, match="at least two images of a class"):
        nas_study([(pixels, torch.arange(3))], val, tmp_path, setting=TINY)


def test_a_diverging_search_says_so(tmp_path):
    train = test_study_layer.batches(24)
    train[0][0][:] = float("nan")
    with pytest.raises(SurgeryError, match="The loss is nan in epoch 1 of the search"):
        nas_study(train, test_study_layer.batches(12), tmp_path, setting=TINY)


def test_choices_are_counted_by_depth():
    ops = ("a", "b", "b", "a", "a", "b")
    cells = tuple(Cell(i, i / 5, "normal", op, {}) for i, op in enumerate(ops))
    made = nas.Trained("found", 1.0, 1, 1, 1.0)
    counts = nas.NasResult({}, {}, ("a", "b"), cells, (), made, ()).counts()
    assert [dict(part) for part in counts.values()] == [
        {"a": 1, "b": 1},
        {"b": 1, "a": 1},
        {"a": 1, "b": 1},
    ]


def test_digits_are_learnt_and_choices_differ(cli, tmp_path, monkeypatch):
    setting = replace(
        *(TINY,),
        images=480,
        val_images=200,
        size=32,
        width=8,
        stem_stride=4,
        epochs=3,
        batch_size=16,
        candidates=("depthwise", "max_pool"),
        search=SearchSetting(epochs=4, warmup=1, choice_lr=1.0),
    )
    monkeypatch.setattr(import_module("pfsurgery.cli.study.nas"), "SMALL", setting)
    result = cli("study", "nas", "--search-epochs", 5, "--out", tmp_path)
    assert result.code == 0, result.err
    assert "What each bottleneck chose" in result.out
    made = json.loads((tmp_path / "nas.json").read_text())
    assert min(entry["top1"] for entry in (made["found"], *made["baselines"])) > 20
    assert made["history"][-1]["top1"] > 20
    assert made["history"][-1]["loss"] < made["history"][0]["loss"]
    assert made["cells"][0]["weights"] != made["cells"][1]["weights"]
    assert max(made["cells"][0]["weights"].values()) > 0.52
    assert made["setting"]["search_warmup"] == 1
    assert "Example: pfsurgery" in " ".join(cli("study", "nas", "--help").out.split())
