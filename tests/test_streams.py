"""WebDataset shards, and the command line in several processes."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from pfsurgery.data import open_data
from pfsurgery.recover import FinetuneConfig, finetune
from tests import test_cli

pytest.importorskip("webdataset")
pytestmark = pytest.mark.filterwarnings("ignore")  # WebDataset leaves files to the collector
cli = test_cli.cli


def shard(path: Path, first: int, number: int) -> None:
    """Images of two classes with their labels, as WebDataset wants them."""
    generator = np.random.default_rng(first)
    with tarfile.open(path, "w") as tar:
        for index in range(first, first + number):
            pixels = generator.integers(0, 255, (36, 36, 3), dtype=np.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "png")
            for ending, content in (("png", image.getvalue()), ("cls", str(index % 2).encode())):
                member = tarfile.TarInfo(f"{index:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    splits = {}
    for split, files in (("train", 4), ("validation", 2)):
        names = [f"{split}-{index}.tar" for index in range(files)]
        for index, name in enumerate(names):
            shard(root / name, first=16 * index, number=16)
        splits[split] = {
            "name": split,
            "num_samples": 16 * files,
            "filenames": names,
            "shard_lengths": [16] * files,
        }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    overlay = {"input_size": (3, 32, 32)}
    return timm.create_model("test_convnext", num_classes=2, pretrained_cfg_overlay=overlay)


class Stop(Exception):
    pass


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_continued_in_the_middle(shards, tmp_path, workers, monkeypatch):
    config = FinetuneConfig(epochs=2, batch_size=8, save_every=3)

    def trained(out: Path, resume: bool, broken: bool) -> dict[str, torch.Tensor]:
        model = small()
        train = open_data(f"wds/{shards}", model, batch_size=8, workers=workers).train
        if broken:
            take = model.forward_head
            calls = iter(range(13))

            def forward_head(*args, **kwargs):
                if next(calls, None) is None:
                    raise Stop
                return take(*args, **kwargs)

            monkeypatch.setattr(model, "forward_head", forward_head)
        finetune(model, train=train, config=config, out=out, resume=resume)
        return model.state_dict()

    whole = trained(tmp_path / "whole", resume=False, broken=False)
    with pytest.raises(Stop):
        trained(tmp_path / "run", resume=False, broken=True)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    continued = trained(tmp_path / "run", resume=True, broken=False)
    assert all(torch.equal(whole[name], value) for name, value in continued.items())
    assert not torch.equal(whole["head.fc.weight"], copy.deepcopy(small()).head.fc.weight)


JOB = (
    *("finetune", "--model", "test_resnet", "--num-classes", "2"),
    *("--model-kwarg", 'pretrained_cfg_overlay={"input_size": [3, 32, 32]}', "--policy"),
    *("maxpool_deep", "--batch-size", "4", "--workers", "1", "--epochs", "2", "--log-every", "1"),
    *("--norm-images", "8"),
)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="would need a GPU for each process")
def test_the_command_line_in_two_processes_on_shards(cli, shards, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    out, weights = tmp_path / "run", tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=2).state_dict(), weights)
    words = (
        *JOB,
        "--checkpoint",
        str(weights),
        "--data",
        f"wds/{shards}",
        "--out",
        str(out),
        "--resume",
    )
    for _ in range(2):  # the second time there is nothing left to do
        done = subprocess.run(
            [*launch, "-m", "pfsurgery.cli", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("pfsurgery.load") == 1
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sum(r["kind"] == "step" for r in records) == 16
    assert [r["val"]["images"] for r in records if r["kind"] == "epoch"] == [32, 32]
    assert json.loads((out / "report.json").read_text())["steps"][-1]["name"] == "fine-tuned"
    assert cli("eval", "--model", out / "model", "--data", f"wds/{shards}").code == 0
