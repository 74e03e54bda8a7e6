"""Policies and plans as values: YAML, JSON, edits."""

from __future__ import annotations

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

from pfsurgery import Plan, Policy, Rule, get_policy, list_ops, list_policies, plan, register_policy
from pfsurgery.errors import PatternError, PolicyError, UnknownNameError, UnsupportedSiteError
from pfsurgery.policy import _REGISTRY
from tests import zoo

MODEL = timm.create_model("test_resnet")


def test_the_named_policies_are_there_with_a_summary():
    expected = {
        *(f"{op}pool_{where}" for op in ("max", "avg") for where in ("deep", "all", "depthwise")),
        *("shift_all", "eff_max", "eff_hybrid", "eff_transformer"),
    }
    assert expected <= set(list_policies())
    assert all(get_policy(name).summary for name in expected)
    assert list_policies("eff_*") == ["eff_hybrid", "eff_max", "eff_transformer"]


def test_a_yaml_policy(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "summary: test\nrules:\n"
        "  - {name: 'layer1.*', op: keep}\n"
        "  - {name: ['layer2.*', 're:layer3.*'], op: blur, tail: drop}\n"
        "  - {stride: true, op: avg_down}\n"
    )
    policy = get_policy(path)
    assert policy.name == "mine"
    assert get_policy(str(path)) == policy
    ops = {d.site.name: d.op for d in plan(MODEL, policy)}
    assert ops["layer1.0.conv1"] == "keep"
    assert ops["layer2.0.conv1"] == "blur"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: []", "list of rules"),
        ("- 1", "not a policy"),
        ("rules: [{kind: dense}]", "needs the key op"),
        ("rules: [{op: max_pool, colour: red}]", "no key 'colour'"),
        ("rules: [{op: max_pool, kind: depthwize}]", "kind must be one of"),
        ("rules: [{op: max_pool, tail: cut}]", "tail must be one of"),
        ("rules: [{op: max_pool, why: 5}]", "why is text .* not 5"),
        ("rule: [", "cannot be read"),
        ("summry: x\nrules: [{op: keep}]", "no key 'summry'"),
    ],
)
def test_a_wrong_yaml_policy_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message):
        get_policy(path)


def test_missing_policies_and_ops_are_named(tmp_path):
    with pytest.raises(PolicyError, match="cannot be read"):
        get_policy(tmp_path / "none.yaml")
    with pytest.raises(UnknownNameError, match="eff_max"):
        get_policy("eff_mx")
    with pytest.raises(UnknownNameError, match="avg_pool"):
        Rule("average_pool")
    with pytest.raises(PolicyError, match="not int"):
        get_policy(3)


@pytest.mark.parametrize("answer", [True, False, 3])
def test_a_function_that_returns_no_name_is_an_error(answer):
    with pytest.raises(PolicyError, match=f"must return the name of an op.* not {answer}"):
        plan(MODEL, lambda site: answer)


def test_policies_can_be_registered_once():
    policy = Policy("test_registered", (Rule("keep"),))
    try:
        register_policy(policy)
        assert get_policy("test_registered") is policy
        with pytest.raises(UnknownNameError, match="exists already"):
            register_policy(policy)
        with pytest.raises(UnknownNameError, match="exists already"):
            register_policy(Policy("eff_max", (Rule("keep"),)))
    finally:
        _REGISTRY.pop("test_registered", None)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([d.site.name for d in plan(MODEL, "maxpool_all")]),
        st.sampled_from([*list_ops("*pool"), "shift", "identity", "blur", "keep"]),
    )
)
def test_plans_survive_json_whatever_the_edits(edits):
    chosen = plan(MODEL, "maxpool_all")
    for name, op in edits.items():
        chosen = chosen.keep(name) if op == "keep" else chosen.set(name, op)
    assert Plan.from_json(chosen.to_json()) == chosen
    for name, op in edits.items():
        assert chosen[name].op == op


def test_editing_returns_a_new_plan():
    chosen = plan(MODEL, "maxpool_all")
    edited = chosen.keep("layer4.*").set("conv1.0", "avg_pool")
    assert chosen["layer4.0.conv1"].replaced
    assert not edited["layer4.0.conv1"].replaced
    assert edited["conv1.0"].label == "avg_pool+pointwise"
    with pytest.raises(PatternError, match="matches no site"):
        chosen.keep("layer7.*")
    with pytest.raises(UnsupportedSiteError, match="stride of 2"):
        chosen.set("layer1.0.conv2", "avg_down")


def test_a_plan_prints_what_it_does_and_why():
    text = str(plan(zoo.Plain(), "maxpool_all", example=zoo.EXAMPLE))
    assert "max_pool+pointwise" in text
    assert "stem: it reads the model's input" in text
    assert "8 channels become 16" in text


@pytest.mark.parametrize("why", ["[/foo] x", "see [ticket] 5", ":smile:"])
def test_a_reason_is_no_markup(why):
    text = str(plan(MODEL, Policy(why, (Rule("max_pool", why=why),))))
    assert text.splitlines()[0].startswith(f"Plan of policy {why}: ")
    assert sum(line.endswith(why) for line in text.splitlines()) > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("policy"), "policy"),
        (lambda d: d.update(format=7), "format"),
        (lambda d: d["decisions"][0].pop("site"), "site"),
        (lambda d: d["decisions"][0]["site"].update(colour="red"), "colour"),
        (lambda d: d["decisions"][0]["site"].pop("geometry"), "geometry"),
        (lambda d: d.update(decisions=3), "wrong form"),
        (lambda d: d["decisions"][1].update(op=5), "op of conv1.3 must be text, not 5"),
        (lambda d: d["decisions"][1].update(pointwise="yes"), "pointwise of .* not 'yes'"),
        (lambda d: d["decisions"][1].update(tail="dropp"), "tail of .* not 'dropp'"),
        (lambda d: d["decisions"][1].update(tail=["drop"]), "tail of"),
        (lambda d: d["decisions"][1].update(reason=5), "reason of .* must be text"),
    ],
)
def test_a_damaged_plan_is_refused(change, message):
    values = plan(MODEL, "maxpool_all").to_dict()
    change(values)
    with pytest.raises(PolicyError, match=message):
        Plan.from_dict(values)
