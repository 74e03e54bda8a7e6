"""What README and docs say can be done: the code blocks run, commands and links exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn
from typer.main import get_command

import pfsurgery
from pfsurgery.base import Base, set_base
from pfsurgery.cli import app
from pfsurgery.measure import count
from pfsurgery.policy import Policy

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
    + list((ROOT / "docs").glob("*.md"))
    + list((ROOT / "examples").glob("*.md"))
)
SIZE = 32

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line that a page shows, and the page's name."""
    for page in [*PAGES, ROOT / ".github" / "workflows" / "tests.yml"]:
        shown = [line for block in blocks(page, "(?:bash|)") for line in block.splitlines()]
        shown += page.read_text(encoding="utf-8").splitlines() if page.suffix == ".yml" else []
        shown += re.findall(r"`(pfsurgery [^`\n]+)`", page.read_text(encoding="utf-8"))
        for line in shown:
            for part in line.split("&&"):
                if part.strip().startswith("pfsurgery "):
                    yield page.name, shlex.split(part, comments=True)[1:]


@pytest.mark.parametrize(("page", "words"), list(commands()), ids=lambda value: str(value)[:60])
def test_commands_exist_with_their_options(page: str, words: list[str]) -> None:
    if words[0].isupper() or "..." in words:
        pytest.skip("a placeholder")
    known = get_command(app).commands  # type: ignore[attr-defined]
    assert words[0] in known, page
    command = known[words[0]]
    if hasattr(command, "commands"):
        assert words[1] in command.commands, page
        command = command.commands[words[1]]
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    for word in words[1:]:
        if word.startswith("--"):
            assert word in options | {"--help"}, f"{page}: {' '.join(words)}"
    if "--policy" in words:
        policy = words[words.index("--policy") + 1]
        assert policy in [*pfsurgery.list_policies(), "budget", "bare"], page


@pages
def test_names_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\bpfsurgery\.([A-Za-z_]\w*)", text):
        assert hasattr(pfsurgery, name) or (ROOT / "pfsurgery" / f"{name}.py").is_file(), name
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), target


def test_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: pfsurgery\.[\w.]*?(\w+)$", text, re.MULTILINE)
    assert sorted({*documented} - {"explain", "disabled", "zoo"}) == sorted(
        {*pfsurgery.__all__} - {"kernels"}
    )


@pages
def test_yaml_blocks_are_policies(page: Path) -> None:
    for block in blocks(page, "yaml"):
        assert Policy.from_dict(yaml.safe_load(block)).rules


def resnet(block: str, layers: list[int]) -> nn.Module:
    """A narrow network with the names of a ResNet-50, which it stands in for."""
    kwargs = {
        "num_classes": 2,
        "channels": [8, 8, 16, 16],
        "layers": layers,
        "stem_type": "deep",
        "stem_width": 4,  # else the stem has most of the multiply-adds
    }
    torch.manual_seed(0)
    model = timm.create_model(block, **kwargs)
    set_base(model, Base("timm", block, kwargs))
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, SIZE, SIZE)}
    return model.eval()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the pages name: an image folder, and the README's policy."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, number in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "imagenet" / part / label
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "mine.yaml").write_text(blocks(ROOT / "README.md", "yaml")[0])
    return tmp_path


def run(page: str, make: Callable[[], nn.Module], **given: Any) -> dict[str, Any]:
    """Run a page's Python blocks in turn; a small network stands for ResNet-50."""
    loader = [torch.randn(32, 3, SIZE, SIZE) for _ in range(2)]
    scope: dict[str, Any] = {
        "pfsurgery": pfsurgery,
        "model": make(),
        "loader": loader,
        "small": make,
        **given,
    }
    for block in blocks(ROOT / page, "python"):
        code = block.replace('timm.create_model("resnet50", pretrained=True)', "small()")
        code = re.sub(r'latency="\d+%"', 'latency="100%"', code)  # a busy machine is no judge
        exec(compile(code, page, "exec"), scope)
    return scope


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_quick_starts_run(page: str) -> None:
    scope = run(page, lambda: resnet("resnet26d", [1, 1, 3, 3]))
    fast = scope["fast"]
    assert pfsurgery.record(fast).plans[-1].replaced
    assert type(fast) is type(scope["model"])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("page", ["docs/concepts.md", "docs/policies.md"])
def test_guides_run(page: str) -> None:
    scope = run(page, lambda: resnet("resnet26d", [1, 1, 3, 3]))
    assert pfsurgery.record(scope["fast"]).plans[-1].replaced


def test_recovery_page_runs() -> None:
    scope = run("docs/recovery.md", lambda: resnet("resnet18", [1, 1, 1, 2]))
    assert pfsurgery.record(scope["fast"]).plans[-1].policy.startswith("budget(latency")


def test_table_of_what_works_on_what_is_what_plan_says() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \|.*?\| (\d+) of (\d+) \| (\d+) % \| (\d+) % \|$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) >= 5
    for name, replaced, sites, parameters, macs in rows:
        model = timm.create_model(name)
        plan = pfsurgery.plan(model, "maxpool_all")
        whole = count(model)
        saved = (sum(d.parameters_saved for d in plan), sum(d.macs_saved for d in plan))
        assert (len(plan.replaced), len(plan)) == (int(replaced), int(sites)), name
        assert round(100 * saved[0] / whole.parameters) == int(parameters), name
        assert round(100 * saved[1] / whole.macs) == int(macs), name


def test_figures_of_the_demo_are_those_of_its_result_file() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"(\d+) % of the multiply-adds are left; top-1 is ([\d.]+) % before, ([\d.]+) % right "
        r"after surgery, ([\d.]+) % refitted without labels, ([\d.]+) % fine-tuned",
        text,
    )
    assert said is not None
    assert int(said[1]) == round(100 * found["comparison"]["ratios"]["macs"])
    top1 = {step["name"]: step["accuracy"]["top1"] for step in found["steps"]}
    for place, name in enumerate(("original", "after surgery", "refitted", "fine-tuned"), start=2):
        assert float(said[place]) == round(top1[name], 1), name


def test_the_op_of_contributing_can_be_converted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from pfsurgery.ops import base

    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    (block,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    exec(compile(block, "CONTRIBUTING.md", "exec"), {})
    model = resnet("resnet26d", [1, 1, 1, 1])
    fast = pfsurgery.convert(model, lambda site: "min_pool" if site.bottleneck else None)
    pool = fast.get_submodule("layer1.0.conv2")
    x = torch.randn(2, 8, SIZE, SIZE)
    torch.testing.assert_close(pool(x), -nn.functional.max_pool2d(-x, 3, 1, 1))


def test_sites_can_become_a_blur() -> None:
    """Shadows live on a device that has no autocast to ask."""
    model = resnet("resnet26d", [1, 1, 1, 1])
    fast = pfsurgery.convert(model, lambda site: "blur" if site.bottleneck else None)
    assert len(pfsurgery.record(fast).plans[-1].replaced) == 4


def test_tables_print_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich takes a notebook for its output, whatever file it is given."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "layer1.0.conv2" in str(pfsurgery.plan(resnet("resnet26d", [1, 1, 1, 1]), "eff_max"))
