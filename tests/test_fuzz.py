"""A saved directory that was damaged or forged: a clear error or the model, and no code is run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfsurgery import Base, convert, load, save
from pfsurgery.checkpoint import CONFIG, WEIGHTS, _digest
from pfsurgery.errors import RecordMismatchError, SurgeryError
from tests import zoo

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Files:
    torch.manual_seed(0)
    model = convert(zoo.Plain().eval(), "maxpool_all", example=zoo.EXAMPLE)
    folder = save(model, tmp_path_factory.mktemp("saved"))
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("forged")


def put(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def sealed(files: Files, edit: Callable[[dict[str, Any]], Any], weights: bytes = b"") -> Files:
    """The files as someone would write them who knows how the digests are made."""
    weights = weights or files[WEIGHTS]
    config = json.loads(files[CONFIG])
    content = config["pfsurgery"]
    content["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    edit(content)
    content["sha256"] = _digest(content)
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: weights}


@QUICK
@given(st.sampled_from([CONFIG, WEIGHTS]), st.integers(0, 2**31), st.integers(0, 7))
def test_a_flipped_bit_is_noticed(saved, folder, name, place, bit):
    content = bytearray(saved[name])
    content[place % len(content)] ^= 1 << bit
    put(folder, {**saved, name: bytes(content)})
    with pytest.raises(SurgeryError, match=r"config\.json|model\.safetensors"):
        load(folder, base=zoo.Plain)


@QUICK
@given(st.sampled_from([CONFIG, WEIGHTS]), st.integers(0, 2**31))
def test_a_truncated_file_is_noticed(saved, folder, name, size):
    put(folder, {**saved, name: saved[name][: size % len(saved[name])]})
    with pytest.raises(RecordMismatchError, match=name):
        load(folder, base=zoo.Plain)


@QUICK
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_noise_is_refused(folder, config, weights):
    put(folder, {CONFIG: config, WEIGHTS: weights})
    with pytest.raises(RecordMismatchError, match=CONFIG):
        load(folder, base=zoo.Plain)


def header_of(weights: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def with_header(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_tensors_that_changed_places_are_noticed(saved, folder):
    header, data = header_of(saved[WEIGHTS])
    first, second = "dense.1.weight", "stem.1.weight"
    header[first], header[second] = header[second], header[first]
    weights = with_header(header, data)
    put(folder, {**saved, WEIGHTS: weights})
    with pytest.raises(RecordMismatchError, match=r"model\.safetensors.*changed"):
        load(folder, base=zoo.Plain)
    header[first], header["head.weight"] = header["head.weight"], header[first]
    put(folder, sealed(saved, lambda content: None, with_header(header, data)))
    with pytest.raises(RecordMismatchError, match=r"has shape"):
        load(folder, base=zoo.Plain)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**40]},
        {"shape": [2**62, 2**62]},
        {"shape": [-1]},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [40, 8]},
        {"dtype": "F128"},
        {"dtype": "../../x"},
    ],
)
def test_impossible_tensors_are_refused_before_any_memory_is_taken(saved, folder, change):
    header, data = header_of(saved[WEIGHTS])
    header["head.bias"] |= change
    put(folder, sealed(saved, lambda content: None, with_header(header, data)))
    with pytest.raises(RecordMismatchError, match=WEIGHTS):
        load(folder, base=zoo.Plain)


@pytest.mark.parametrize("size", [0, 2**31, 2**63 - 1, 2**64 - 1])
def test_a_header_of_impossible_length_is_refused(saved, folder, size):
    weights = struct.pack("<Q", size) + saved[WEIGHTS][8:]
    put(folder, sealed(saved, lambda content: None, weights))
    with pytest.raises(RecordMismatchError, match=WEIGHTS):
        load(folder, base=zoo.Plain)


NAMES = (
    "../../etc/passwd",
    "/etc/passwd",
    "__class__",
    "forward",
    "",
    ".",
    "dense.0.__init__",
    "0",
)


@pytest.mark.parametrize("name", NAMES)
def test_names_lead_to_modules_of_the_model_only(saved, folder, name):
    def edit(content: dict[str, Any]) -> None:
        site = content["record"]["plans"][0]["decisions"][0]["site"]
        site["name"], site["names"] = name, [name]

    files = sealed(saved, edit)
    put(folder, files)
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(SurgeryError):
        load(folder, base=zoo.Plain)
    assert sorted(folder.parent.rglob("*")) == before
    header, data = header_of(saved[WEIGHTS])
    header[name or "x"] = header.pop("head.bias")
    put(folder, sealed(saved, lambda content: None, with_header(header, data)))
    with pytest.raises(SurgeryError, match=r"head\.bias"):
        load(folder, base=zoo.Plain)


FORGED = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.integers(-4, 2**33), max_size=5),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested dicts and lists."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    return [at, *(place for key in keys for place in places(value[key], (*at, key)))][
        bool(not at) :
    ]


@settings(QUICK, max_examples=60)
@given(st.data())
def test_any_forged_value_is_an_error_or_changes_nothing(saved, folder, data):
    content = json.loads(saved[CONFIG])["pfsurgery"]
    place = data.draw(st.sampled_from(places(content)))
    value = data.draw(FORGED)

    def edit(content: dict[str, Any]) -> None:
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    put(folder, sealed(saved, edit))
    with contextlib.suppress(SurgeryError):
        model = load(folder, base=zoo.Plain)
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5)


@pytest.mark.parametrize("images", ["abc", 3, [1, 2]])
def test_forged_images_are_named(saved, folder, images):
    put(folder, sealed(saved, lambda content: content.update(images=images)))
    with pytest.raises(RecordMismatchError, match=CONFIG):
        load(folder, base=zoo.Plain)


def test_forged_images_reach_nothing_else_of_a_configuration(saved, folder):
    forged = {"input_size": [3, 16, 16], "architecture": "resnet50", "url": "file:///etc/passwd"}
    put(folder, sealed(saved, lambda content: content.update(images=forged)))
    assert load(folder, base=zoo.Plain).pretrained_cfg == {"input_size": (3, 16, 16)}


def test_nesting_without_end_is_refused(saved, folder):
    put(folder, {**saved, CONFIG: b"[" * 200_000})
    with pytest.raises(RecordMismatchError, match=CONFIG):
        load(folder, base=zoo.Plain)


class Evil:
    """A pickle of this writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


LOADING = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained", "cache_dir")


@pytest.mark.parametrize("key", LOADING)
def test_a_base_cannot_ask_for_files_of_its_own(saved, folder, key):
    torch.save({"state_dict": Evil(folder / "ran")}, folder / "evil.pth")
    model = convert(timm.create_model("test_resnet"), "maxpool_all")
    save(model, folder, base=Base("timm", "test_resnet"))
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    value = {"file": str(folder / "evil.pth")} if "cfg" in key else str(folder / "evil.pth")
    put(folder, sealed(files, lambda content: content["base"]["kwargs"].update({key: value})))
    with pytest.raises(RecordMismatchError, match=key):
        load(folder)
    assert not (folder / "ran").exists()


def test_a_base_cannot_ask_for_weights_from_elsewhere(saved, folder):
    def edit(content: dict[str, Any]) -> None:
        kwargs = {"weights_backbone": "DEFAULT"}
        content["base"] = {"library": "torchvision", "name": "fcn_resnet50", "kwargs": kwargs}

    put(folder, sealed(saved, edit))
    with pytest.raises(RecordMismatchError, match="weights_backbone"):
        load(folder)


@pytest.mark.parametrize(
    "kwargs", [{"num_classes": 2**36}, {"in_chans": 2**30}, {"channels": [2**20, 8, 8, 8]}]
)
def test_a_base_larger_than_its_weights_is_refused_before_it_is_built(folder, kwargs):
    model = convert(timm.create_model("test_resnet"), "maxpool_all")
    save(model, folder, base=Base("timm", "test_resnet"))
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    put(folder, sealed(files, lambda content: content["base"]["kwargs"].update(kwargs)))
    with pytest.raises(SurgeryError):
        load(folder)


def test_a_structure_larger_than_its_weights_is_refused(folder):
    from pfsurgery import budget

    torch.manual_seed(0)
    model = convert(zoo.Plain().eval(), budget(macs="60%"), images=torch.randn(32, 3, 16, 16))
    save(model, folder)
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    def widen(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            if key in ("reduce", "waist") and value[key]:
                value[key] = 2**40
            elif isinstance(value[key], dict | list):
                widen(value[key])

    put(folder, sealed(files, lambda content: widen(content["record"])))
    with pytest.raises(SurgeryError):
        load(folder, base=zoo.Plain)
