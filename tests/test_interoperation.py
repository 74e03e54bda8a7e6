"""A converted model does what a model does: every op, on three kinds of networks, with each tool.

Converted attentions, of a ViT, are here too; what else they do is in `test_attention.py`.

By default one network of each kind carries all ops at once; `-m slow` takes every op on its own,
and adds what compiles to machine code.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from pfsurgery import bare, budget, convert, plan, record

pytestmark = [
    # other libraries' own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

KINDS = {
    "ResNet": "test_resnet",
    "MobileNet": "test_efficientnet",  # inverted residuals
    "ConvNeXt": "test_convnext",
}
PLAIN = ("max_pool", "avg_pool", "shift", "identity", "blur", "avg_down")
SIZE = 64


def fits(op: str, site) -> bool:
    return not site.stem and (op != "avg_down" or site.geometry.stride == (2, 2))


def all_ops(model: nn.Module) -> nn.Module:
    """The plain ops in turns."""
    left: list[str] = []

    def policy(site) -> str | None:
        nonlocal left
        left = left or list(PLAIN)
        op = next((op for op in left if fits(op, site)), None)
        if op is not None:
            left.remove(op)
        return op

    return convert(model, policy)


def all_ops_but_blur(site) -> str | None:
    if site.stem:
        return None
    return "avg_down" if fits("avg_down", site) else PLAIN[len(site.name) % 4]


def fitted(model: nn.Module, policy) -> nn.Module:
    """Fitted to images of many contrasts: all alike, they would teach the classifier noise."""
    contrasts = torch.logspace(-1, 1, 128).view(-1, 1, 1, 1)
    seen = contrasts * torch.randn(128, 3, SIZE, SIZE)
    return convert(model, policy, images=list(seen[torch.randperm(128)].split(32)))


def share(model: nn.Module) -> str:
    """What of the MACs may be left: four fifths of a ConvNeXt's are in layers that are no sites."""
    return "90%" if isinstance(model, timm.models.ConvNeXt) else "50%"


MADE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "all": all_ops,
    **{
        op: lambda model, op=op: convert(model, lambda site: op if fits(op, site) else None)
        for op in PLAIN
    },
    "columns": lambda model: fitted(model, budget(macs=share(model), thin=False)),
    "thin": lambda model: fitted(model, budget(macs=share(model))),
    "bare": lambda model: fitted(model, bare()),
}
EVERYDAY = [*((kind, "all") for kind in KINDS), ("ResNet", "columns")]
OTHERS = [
    (kind, made)
    for kind in KINDS
    for made in MADE
    if (kind, made) not in EVERYDAY and (kind, made) != ("ConvNeXt", "avg_down")
]
CASES = [
    *(pytest.param(kind, made, id=f"{kind}-{made}") for kind, made in EVERYDAY),
    *(
        pytest.param(kind, made, id=f"{kind}-{made}", marks=pytest.mark.slow)
        for kind, made in OTHERS
    ),
]
every_op = pytest.mark.parametrize(("kind", "made"), CASES)

ATTENTION = {"eff_attention": lambda model: convert(model, "eff_transformer")}
every_op_and_attention = pytest.mark.parametrize(
    ("kind", "made"), [*CASES, pytest.param("ViT", "eff_attention", id="ViT-eff_attention")]
)


def original(kind: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    if kind == "ViT":
        return timm.create_model("test_vit", num_classes=7, img_size=SIZE, **kwargs).eval()
    model = timm.create_model(KINDS[kind], num_classes=7, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@lru_cache
def _converted(kind: str, made: str) -> nn.Module:
    model = original(kind)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, SIZE, SIZE)}
    fast = {**MADE, **ATTENTION}[made](model).eval()
    assert record(fast).plans[-1].replaced
    return fast


def converted(kind: str, made: str) -> nn.Module:
    return copy.deepcopy(_converted(kind, made))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(count))


def close(made: Tensor, meant: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(made, meant, rtol=tolerance, atol=tolerance)


def test_all_ops_are_there():
    from pfsurgery import list_ops

    used = {d.op for kind in KINDS for d in record(_converted(kind, "all")).plans[-1]}
    assert used >= set(PLAIN)
    assert set(list_ops()) == {*PLAIN, "mixed", "thin", "bare", "eff_attention"}


def test_the_strided_convolutions_of_a_convnext_do_not_average_first():
    """They have no padding, so what is left of them at stride 1 would cut the image."""
    decided = plan(original("ConvNeXt"), lambda site: "avg_down", example=images(1))
    strided = [d for d in decided if fits("avg_down", d.site)]
    assert len(strided) == 3
    assert all("its padding would change the size" in d.reason for d in strided)


@pytest.mark.parametrize("fullgraph", [True, pytest.param(False, marks=pytest.mark.slow)])
@every_op
def test_compile(kind, made, fullgraph):
    fast = converted(kind, made)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=fullgraph)
    x = images()
    close(compiled(x), fast(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in fast.parameters())


@pytest.mark.slow
@every_op
def test_compile_to_machine_code(kind, made):
    fast = converted(kind, made)
    torch._dynamo.reset()
    with torch.no_grad():
        close(torch.compile(fast)(images()), fast(images()))


@every_op
def test_export_with_a_dynamic_batch(kind, made):
    fast = converted(kind, made)
    program = torch.export.export(
        fast, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    for count in (1, 5):
        close(program.module()(images(count)), fast(images(count)))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    close(torch.export.load(file).module()(images(3)), fast(images(3)))


@every_op_and_attention
def test_onnx_runtime(kind, made, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    fast, path = converted(kind, made), tmp_path / "model.onnx"
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    torch.onnx.export(fast, (images(2),), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (tensor.name for tensor in session.get_inputs())
    (made_there,) = session.run(None, {name: images(3).numpy()})
    close(torch.from_numpy(made_there), fast(images(3)))


@every_op
def test_channels_last(kind, made):
    fast = converted(kind, made)
    meant = fast(images())
    last = fast.to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    close(last(x), meant)
    features = last.forward_features(x)
    if features.shape[-1] > 1:
        assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@every_op_and_attention
def test_autocast(kind, made, dtype):
    fast = converted(kind, made)
    with torch.autocast("cpu", dtype):
        y = fast(images())
    assert y.dtype == dtype
    assert cosine_similarity(y.float().flatten(), fast(images()).flatten(), dim=0) > 0.97
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fast.parameters())


@every_op
def test_deepcopy(kind, made):
    fast = _converted(kind, made)
    twin = copy.deepcopy(fast)
    close(twin(images()), fast(images()), 0)
    assert record(twin) == record(fast)
    own = {p.data_ptr() for p in fast.parameters()}
    assert not own & {p.data_ptr() for p in twin.parameters()}


@every_op
def test_safetensors(kind, made, tmp_path):
    from safetensors.torch import load_model, save_model

    fast, other = converted(kind, made), converted(kind, made)
    save_model(fast, tmp_path / "model.safetensors")
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    load_model(other, tmp_path / "model.safetensors")
    close(other(images()), fast(images()), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_features_only(kind):
    """Before conversion; afterwards, `forward_intermediates` gives the same."""
    whole = original(kind)
    features = timm.create_model(KINDS[kind], features_only=True).eval()
    names = {key.replace(".", "_"): key for key in whole.state_dict()}  # some names are flattened
    features.load_state_dict(
        {key: whole.state_dict()[names[key.replace(".", "_")]] for key in features.state_dict()}
    )

    def chosen(site) -> str | None:
        return None if site.stem else "max_pool"

    made = convert(features, chosen)(images())
    meant = features(images())
    assert [y.shape for y in made] == [y.shape for y in meant]
    assert [y.shape[1] for y in made] == features.feature_info.channels()
    if kind == "ConvNeXt":
        return  # shortcuts lead from the strided convolutions to outputs: they are kept there
    _, between = convert(whole, chosen).forward_intermediates(images())
    for y, z in zip(made[1:], between[1:], strict=True):
        close(y, z)


@every_op
def test_torchvision_feature_extractor(kind, made):
    from torchvision.models.feature_extraction import create_feature_extractor

    fast = converted(kind, made)
    node = {"ResNet": "layer3", "MobileNet": "blocks.1", "ConvNeXt": "stages.2"}[kind]
    seen = []
    watched = fast.get_submodule(node)
    handle = watched.register_forward_hook(lambda *args: seen.append(args[-1].clone()))
    fast(images())
    handle.remove()
    if made in ("columns", "thin"):
        # a fitted site looks at its input before it chooses its kernel
        with pytest.raises(torch.fx.proxy.TraceError):
            create_feature_extractor(fast, {node: "features"})
        return
    extractor = create_feature_extractor(fast, {node: "features"})
    close(extractor(images())["features"], seen[0])


def test_padding_that_follows_the_size_cannot_be_traced_symbolically():
    """TensorFlow's padding: the original cannot be traced either; features_only can be used."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=3).eval()
    fast = convert(model, "maxpool_deep", example=images(1))
    for network in (model, fast):
        with pytest.raises((TypeError, torch.fx.proxy.TraceError)):
            create_feature_extractor(network, {"blocks.3": "features"})


@every_op_and_attention
def test_lora(kind, made):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    fast = converted(kind, made)
    meant = fast(images())
    pointwise = [
        name
        for name, module in fast.named_modules()
        if isinstance(module, nn.Linear)
        or (type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1)
    ]
    tuned = peft.get_peft_model(
        fast, peft.LoraConfig(r=2, target_modules="|".join(map(re.escape, pointwise)))
    )
    close(tuned(images()), meant)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # the first step moves one factor of each product, which starts at zero
        tuned(images()).square().sum().backward()
        optimizer.step()
    trained = tuned(images())
    assert not torch.allclose(trained, meant)
    close(tuned.merge_and_unload()(images()), trained, 1e-3)


@every_op_and_attention
def test_int8_weights(kind, made):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    fast = converted(kind, made)
    meant = fast(images())
    quantization.quantize_(fast, quantization.Int8WeightOnlyConfig())
    linear = [m for m in fast.modules() if isinstance(m, nn.Linear)]
    assert linear
    assert all(
        type(m.weight) is not nn.Parameter or type(m.weight.data) is not Tensor for m in linear
    )
    with torch.no_grad():
        assert cosine_similarity(fast(images()).flatten(), meant.flatten(), dim=0) > 0.999


def statically_quantised(fast: nn.Module) -> nn.Module:
    pytest.importorskip("torchao.quantization.pt2e", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    with torch.no_grad():
        graph = torch.export.export(fast, (images(2),)).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)
        prepared(images(2))
        return convert_pt2e(prepared)


@every_op_and_attention
def test_static_quantisation_of_the_exported_graph(kind, made):
    fast = converted(kind, made)
    if (kind, made) in [("ResNet", "blur"), ("MobileNet", "blur"), ("MobileNet", "all")]:
        # torchao folds a batch norm into the convolution before it, whose weight it takes for a
        # parameter; a blur's is computed
        with pytest.raises(ValueError, match="Expected get_attr node"):
            statically_quantised(fast)
        fast = convert(original(kind), all_ops_but_blur, example=images(1)).eval()
    quantised = statically_quantised(fast)
    with torch.no_grad():
        y, z = quantised(images(2)), fast(images(2))
    targets = [str(node.target) for node in quantised.graph.nodes]
    assert any("quantize_per_tensor" in target for target in targets)
    assert cosine_similarity(y.flatten(), z.flatten(), dim=0) > 0.9


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    for path in sorted(Path(folder).glob("*.pt")):
        model = torch.load(path, weights_only=False)
        wrapped = nn.parallel.DistributedDataParallel(model)
        gradients(wrapped, images(4)[2 * rank : 2 * rank + 2])
        if rank == 0:
            torch.save({n: p.grad for n, p in model.named_parameters()}, path.with_suffix(".out"))
    torch.distributed.destroy_process_group()


def same_in_two_processes(cases: list[tuple[str, str]], folder: Path) -> None:
    for kind, made in cases:
        torch.save(_converted(kind, made), folder / f"{kind}-{made}.pt")
    torch.multiprocessing.spawn(_one_of_two, (str(folder),), nprocs=2)
    for kind, made in cases:
        found = torch.load(folder / f"{kind}-{made}.out", weights_only=True)
        meant = gradients(converted(kind, made), images(4))
        assert found.keys() == meant.keys()
        for name, gradient in meant.items():
            scale = gradient.abs().max()
            assert (found[name] - gradient).abs().max() <= 1e-3 * scale + 1e-7, (kind, name)


def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    same_in_two_processes(EVERYDAY, tmp_path)


@pytest.mark.slow
def test_two_processes_with_every_op(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    same_in_two_processes(EVERYDAY + OTHERS, tmp_path)
