"""Sensitivity, search by a programme and by Optuna, and the drop that may be allowed."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from pfsurgery import budget, convert, list_policies, load, plan, record, search, sensitivity
from pfsurgery.cli import app
from pfsurgery.digests import digest_of_images
from pfsurgery.errors import PolicyError, SurgeryError, TrainingError
from pfsurgery.measure import count
from pfsurgery.recover.budget import Budget
from pfsurgery.recover.device import closest
from pfsurgery.recover.hull import spend
from pfsurgery.recover.options import Option
from pfsurgery.report import write_report
from pfsurgery.run_folder import read_run
from pfsurgery.study.known import LINES as NETWORKS
from pfsurgery.study.optuna_search import explore, open_study
from pfsurgery.study.programme import programme
from pfsurgery.study.search import search_front
from pfsurgery.study.sensitivity import LINES, read_sensitivity
from tests import zoo
from tests.test_budget import distance, trained_like

OPS = ("max_pool",)
POINTS = st.lists(
    st.lists(
        st.tuples(st.integers(0, 40).map(float), st.integers(0, 40).map(float)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(48, 3, 16, 16, generator=generator) for _ in range(2)]


@settings(max_examples=40, deadline=None)
@given(POINTS, st.integers(0, 100))
def test_the_programme_finds_the_best_choice(sites, budget_):
    options = {str(i): points for i, points in enumerate(sites)}
    allowed = [
        (sum(d for _, d in choice), choice)
        for choice in product(*sites)
        if sum(c for c, _ in choice) <= budget_
    ]
    if not allowed:
        with pytest.raises(PolicyError, match="cannot be met"):
            programme(options, budget_)
        return
    places = programme(options, budget_)
    chosen = [options[name][place] for name, place in places.items()]
    assert sum(cost for cost, _ in chosen) <= budget_
    assert sum(damage for _, damage in chosen) == pytest.approx(min(allowed)[0], abs=1e-4)
    greedy = [options[name][place] for name, place in spend(options, budget_).items()]
    assert sum(d for _, d in chosen) <= sum(d for _, d in greedy) + 1e-4


@given(
    st.lists(st.floats(0.1, 2), min_size=1, max_size=30).map(sorted),
    st.floats(0.2, 1.5),
    st.floats(0, 1),
)
def test_a_time_that_the_fastest_choice_takes_is_met(shares, asked, least):
    tried = []

    def trial(left: float) -> tuple[float, dict[str, int]]:
        tried.append(left)
        place = round((left - least) / max(1e-9, 1 - least) * (len(shares) - 1))
        return shares[place], {"site": place}

    share, places = closest(trial, least, 1.0, 1.0, asked)
    assert len(tried) <= 5
    assert all(least <= left <= 1 for left in tried)
    assert shares[places["site"]] == share
    assert share <= 1.1 * asked or shares[0] > asked


def test_a_choice_that_does_not_meet_the_budget_leaves_those_that_do(images):
    class Fickle(Budget):
        """As a loaded clock may have it: what is chosen by measured damage takes too long."""

        def choose(self, choices, tell, damage=None, *rest):
            if damage is not None:
                raise PolicyError("it cannot be met")
            return super().choose(choices, tell)

    told = []
    found = search(trained_like(), Fickle(macs="70%"), images, ops=OPS, tell=told.append)
    assert {point.origin for point in found.points} == {"budget"}
    assert found.chosen.macs < found.original.macs
    assert "measured damage: it cannot be met" in told


def test_each_site_is_measured_alone_and_a_stopped_run_goes_on(images, tmp_path):
    model = trained_like()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = sensitivity(model, images, ops=OPS, fitted=2, out=tmp_path, batch=2)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {row.site for row in rows} == {"conv1", "conv2", "down.0"}
    assert {row.op for row in rows if " " not in row.op} == {"max_pool"}
    fitted = [row for row in rows if row.op != "max_pool"]
    assert all(row.damage >= 0 and row.macs > 0 for row in rows)
    assert min(row.damage for row in fitted) < min(
        row.damage for row in rows if row.op == "max_pool"
    )
    assert [row.damage / row.macs for row in rows] == sorted(row.damage / row.macs for row in rows)
    one = next(row for row in rows if row.op == "max_pool" and row.site == "down.0")
    alone = plan(model, "maxpool_all", example=images[0][:1], include="down.0")
    assert one.macs == alone["down.0"].macs_saved
    assert one.params == alone["down.0"].parameters_saved

    lines = (tmp_path / LINES).read_text().splitlines(keepends=True)
    gone = [line for line in lines if json.loads(line)["site"] == "conv1"]
    kept = [line for line in lines if line not in gone]
    (tmp_path / LINES).write_text("".join(kept) + gone[0][:40])  # as a kill would leave it
    told: list[str] = []
    again = sensitivity(model, images, ops=OPS, fitted=2, out=tmp_path, batch=2, tell=told.append)
    assert [line.split(":")[0] for line in told[-1:]] == ["conv1"]
    assert {(r.site, r.op, round(r.damage, 6)) for r in again} == {
        (r.site, r.op, round(r.damage, 6)) for r in rows
    }
    assert read_run(tmp_path).kind == "sensitivity"
    assert "down.0" in write_report(tmp_path).read_text(encoding="utf-8")
    with pytest.raises(SurgeryError, match=r"batch \(then 2, now 4\)"):
        sensitivity(model, images, ops=OPS, fitted=2, out=tmp_path, batch=4)
    (tmp_path / LINES).write_text('{"site": 1}\n')
    with pytest.raises(SurgeryError, match="line 1"):
        read_sensitivity(tmp_path)


def test_a_run_is_not_touched_by_one_that_is_refused(images, tmp_path):
    model = trained_like()
    sensitivity(model, images, ops=OPS, fitted=0, include="conv1", out=tmp_path)
    before = (tmp_path / "run.json").read_text()
    told = []
    with pytest.raises(TrainingError, match="another setting; different are: timed"):
        search(model, budget(macs="60%"), images, ops=OPS, out=tmp_path, tell=told.append)
    assert not told  # it is refused before anything is read
    with pytest.raises(PolicyError, match="Ask for more"):
        search(model, budget(macs=1), images, ops=OPS, out=tmp_path / "other")
    assert not (tmp_path / "other" / "run.json").exists()
    assert (tmp_path / "run.json").read_text() == before
    write_report(tmp_path)


@pytest.mark.parametrize("line", ["5", "{}", '{"what": 1}'])
def test_damaged_lines_are_named(images, tmp_path, line):
    (tmp_path / NETWORKS).write_text(f"{line}\n")
    with pytest.raises(SurgeryError, match=rf"{NETWORKS}, line 1, is"):
        search(trained_like(), budget(macs="60%"), images, ops=(), out=tmp_path)


def test_labels_give_accuracies(images):
    rows = sensitivity(
        trained_like(),
        images,
        ops=OPS,
        fitted=0,
        batch=2,
        include="conv1",
        validate=lambda model: 12.5,
    )
    assert [(row.site, row.op, row.top1) for row in rows] == [("conv1", "max_pool", 12.5)]


def test_a_search_is_within_budget_and_no_further_off_than_equal_errors(images, tmp_path):
    model = trained_like()
    only = {"ops": OPS, "out": tmp_path, "include": ["conv1", "conv2"]}
    found = search(model, budget(macs="50%"), images, **only)
    one = images[0][:1]
    assert count(found.model, one).macs <= 0.5 * count(model, one).macs
    assert found.chosen.damage == min(point.damage for point in found.points)
    assert {"budget", "sensitivity"} <= {point.origin for point in found.points}
    assert record(found.model).plans[-1] == found.plan
    assert all("nats and saves" in decision.reason for decision in found.plan.replaced)
    assert found.chosen.macs == count(found.model, one).macs
    values = json.loads((tmp_path / "search.json").read_text())
    assert values["unit"] == "macs"
    assert [point["chosen"] for point in values["points"]].count(True) == 1
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert all(point.name in page for point in found.points)
    told: list[str] = []
    again = search(model, budget(macs="50%"), images, tell=told.append, **only)
    assert not any("costs" in line for line in told), "what was measured is not measured again"
    forms = [[(d.site, d.op, d.structure) for d in made.plan] for made in (found, again)]
    assert forms[0] == forms[1]
    assert [point.damage for point in again.points] == [point.damage for point in found.points]
    torch.testing.assert_close(again.model(one), found.model(one))

    lines = (tmp_path / NETWORKS).read_text().splitlines(keepends=True)
    assert any('"inside"' in line for line in lines)
    (tmp_path / NETWORKS).write_text("".join(lines[:-2]) + lines[-1][:30])  # as a kill leaves it
    search(model, budget(macs="50%"), images, **only)
    after = (tmp_path / NETWORKS).read_text().splitlines(keepends=True)
    assert after[: len(lines) - 2] == lines[:-2]
    known = [json.loads(line)["what"] for line in after]
    assert known == [json.loads(line)["what"] for line in lines], "nothing is measured twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_known_again_in_any_dtype_and_layout(images, dtype):
    batch = images[0].to(dtype)
    known = digest_of_images([batch])
    assert known == digest_of_images([batch.contiguous(memory_format=torch.channels_last)])
    assert known != digest_of_images([batch.flip(0)])


def test_a_search_needs_something_to_choose(images):
    with pytest.raises(PolicyError, match="No convolution of Net can be converted"):
        search(trained_like(), budget(macs="90%"), images, exclude="*")


def test_bare_forms_compete_where_a_pointwise_follows(images):
    torch.manual_seed(0)
    model = nn.Sequential(
        zoo.conv_norm_act(3, 8),
        zoo.conv_norm_act(8, 8),
        nn.Conv2d(8, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    rows = sensitivity(model.eval(), images, ops=OPS, fitted=1, batch=2)
    assert {"bare 8", "max_pool"} <= {row.op for row in rows}


def test_optuna_keeps_its_front_and_repeats_nothing(images, tmp_path):
    model = trained_like()
    policy = budget(macs="60%")
    only = {"trials": 6, "out": tmp_path, "include": ["conv1", "conv2"]}
    found = search_front(model, policy, images, ops=OPS, **only)
    one = images[0][:1]
    assert count(found.model, one).macs <= 0.6 * count(model, one).macs
    front = sorted((p.macs, p.damage) for p in found.points)
    assert [damage for _, damage in front] == sorted((d for _, d in front), reverse=True)
    told: list[str] = []
    again = search_front(model, policy, images, ops=OPS, tell=told.append, **only)
    assert not any(line.startswith("tried") for line in told)
    assert {p.macs for p in again.points} == {p.macs for p in found.points}
    assert "damage (nats)" in (tmp_path / "optuna.html").read_text()
    with pytest.raises(SurgeryError, match="another"):
        search_front(model, policy, images, ops=(), **only)


SITES = {
    "a": [None, Option("columns", (2,), 2.0, 0.5), Option("thin", (1, 2), 3.0, 0.1)],
    "b": [None, Option("op", (), 0.0, 0.0, "shift")],
}


def _share_a_study(storage: str, log: str) -> None:
    def evaluate(places):
        with Path(log).open("a") as file:
            file.write(f"{places['a']} {places['b']}\n")
        return float(places["a"]), float(2 - places["a"] + places["b"]), {}

    study, options = open_study(storage, SITES, {"unit": "macs"})
    assert options == SITES
    explore(study, options, evaluate, [], trials=60)  # none of six choices is missed by chance


@pytest.mark.parametrize("kind", ["db", "log"])
def test_two_processes_share_a_study(tmp_path, kind):
    storage, log = tmp_path / f"study.{kind}", tmp_path / "evaluated"
    code = (
        f"from tests.test_search import _share_a_study as share; share({str(storage)!r}, "
        f"{str(log)!r})"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    evaluated = log.read_text().split("\n")[:-1]
    # Both may begin with the same choice at the same moment; afterwards nothing is repeated.
    assert len(set(evaluated)) <= len(evaluated) <= len(set(evaluated)) + 2
    study, options = open_study(storage, SITES, {"unit": "macs"})
    front = explore(study, options, lambda places: pytest.fail("it is complete"), [], trials=60)
    assert (0.0, 2.0) in {(trial.damage, trial.cost) for trial in front}


@pytest.mark.parametrize("name", ["a #1?b=c {d} %20.db", "a #1?b=c {d} %20.log"])
def test_a_study_is_in_the_file_that_was_named(tmp_path, name):
    open_study(tmp_path / name, SITES, {"unit": "macs"})
    assert (tmp_path / name).stat().st_size > 0


def test_the_cheapest_within_a_drop(images):
    model, one = trained_like(), images[0][:1]

    def likeness(network):
        return 100 - 100 * distance(model, network, images)

    macs = {}
    for drop in (0.23, 0.6):
        fast = convert(model, budget(max_drop=drop, validate=likeness), images=images)
        assert likeness(fast) >= 100 - drop
        macs[drop] = count(fast, one).macs
    assert macs[0.6] < macs[0.23] < count(model, one).macs
    accuracies = iter([100.0] + 10 * [0.0])
    with pytest.raises(PolicyError, match="mildest loses 100"):
        convert(model, budget(max_drop=1, validate=lambda network: next(accuracies)), images=images)
    with pytest.raises(PolicyError, match="go together"):
        budget(max_drop=1)
    with pytest.raises(PolicyError, match="percent, not nan"):
        convert(model, budget(max_drop=1, validate=lambda network: float("nan")), images=images)


def test_a_drop_is_a_number_of_points():
    with pytest.raises(PolicyError, match=r"number of points .* not '1%'"):
        budget(max_drop="1%", validate=lambda network: 50.0)


def test_a_drop_with_no_site_to_change_keeps_the_model(images):
    model = trained_like()
    policy = budget(max_drop=1.0, validate=lambda network: 50.0)
    same = convert(model, policy, images=images, exclude="*")
    assert torch.equal(same(images[0]), model(images[0]))
    assert not record(same).replaced


def test_fastest_changes_only_what_is_measured_faster():
    model = trained_like()
    assert "fastest" in list_policies()
    chosen = plan(model, "fastest", example=torch.zeros(1, 3, 16, 16))
    for decision in chosen:
        if decision.site.stem:
            assert not decision.replaced
            continue
        after, _, before = decision.reason.partition(" ms in place of ")
        assert decision.replaced == (float(after) < 0.97 * float(before))


def test_command_line(tmp_path):
    run = CliRunner().invoke
    small = ["--images", "64", "--batch", "1", "--include", "layer4*", "--op", "max_pool"]
    model = ["--model", "resnet10t", "--no-pretrained", "--num-classes", "10"]
    model += ["--model-kwarg", "channels=[8,8,8,16]", "--data", "digits"]
    study, out = tmp_path / "study", tmp_path / "run"
    studied = run(
        app, ["study", "sensitivity", *model, *small, "--out", str(study), "--fitted", "1"]
    )
    assert studied.exit_code == 0, studied.output
    assert (study / "sensitivity.png").stat().st_size > 10_000
    found = run(
        app,
        ["search", *model, *small, "--out", str(out), "--budget", "params=95%", "--top1"],
    )
    assert found.exit_code == 0, found.output
    assert "chosen" in found.output
    assert "%" in found.output
    assert record(load(out / "model")).plans[-1].policy == "search(params=95%)"
    for wrong in ("accuracy=3", "macs"):
        bad = run(app, ["search", *model, "--out", str(tmp_path / "x"), "--budget", wrong])
        assert isinstance(bad.exception, PolicyError)
        assert "macs=25%" in str(bad.exception)
