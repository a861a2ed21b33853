"""`apply`, `remove` and `summary` on small hand-made modules: which layers, why not, and that nothing is lost."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rtlynx
from rtlynx import DeviceError, InvalidArgumentError, SparseLinear, SparsityConfig, eligibility, launch
from rtlynx.checks import SUPPORTED_DTYPES
from tiny_models import TINY


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.ff = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.ff(self.to_q(x) * self.to_k(x))))


def model(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(width), Block(width))


EVERYTHING = SparsityConfig(include=("**",))


def reasons(module: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in rtlynx.summary(module) if not row.sparse}


def test_apply_then_remove_gives_the_same_objects_back() -> None:
    original = model()
    before = dict(original.named_parameters())
    modules = {name: type(module) for name, module in original.named_modules()}
    x = torch.randn(3, 64)
    want = original(x)
    assert rtlynx.apply(original, EVERYTHING) is original
    assert sum(isinstance(m, SparseLinear) for m in original.modules()) == 8
    assert all(dict(original.named_parameters())[name] is parameter for name, parameter in before.items())
    assert not torch.equal(original(x), want)
    assert rtlynx.remove(original) is original
    after = dict(original.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert {name: type(module) for name, module in original.named_modules()} == modules
    assert "rtlynx_config" not in original.__dict__
    assert torch.equal(original(x), want)
    rtlynx.remove(original)  # once more does nothing


def test_include_and_skip() -> None:
    module = rtlynx.apply(model(), SparsityConfig(include=("*.{to_q,to_k}",), skip=("1.to_k",)))
    assert {name for name, m in module.named_modules() if isinstance(m, SparseLinear)} == {"0.to_q", "0.to_k", "1.to_q"}
    assert "'1.to_k'" in reasons(module)["1.to_k"]
    assert "included patterns" in reasons(module)["0.ff"]


def test_applying_again_applies_the_new_configuration_instead() -> None:
    module = rtlynx.apply(model(), EVERYTHING)
    first = module[0].to_q
    rtlynx.apply(module, SparsityConfig(include=("0.**",), norm_compensation=False, selection="weight"))
    assert module[0].to_q is first and type(first.weight) is nn.Parameter
    assert not first.norm_compensation and first.score is not None
    assert type(module[1].to_q) is nn.Linear


def test_applying_again_keeps_a_compensation_only_where_it_is_right(caplog: pytest.LogCaptureFixture) -> None:
    config = SparsityConfig(include=("**",), rank=16)
    module = rtlynx.apply(model(), config)
    module[0].to_q.set_compensation(torch.ones(64, 16), torch.ones(64, 16))
    rtlynx.apply(module, SparsityConfig(include=("**",), skip=("1.**",), rank=16))
    assert module[0].to_q.rank == 16
    with caplog.at_level(logging.WARNING, "rtlynx"):
        rtlynx.apply(module, SparsityConfig(include=("**",), branch="input", rank=16))
    assert module[0].to_q.rank == 0
    assert "dropped the compensation of 1 layers" in caplog.text


def test_layers_that_cannot_be_sparse_stay_dense_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    class Subclass(nn.Linear): ...

    module = nn.ModuleDict(
        {
            "good": nn.Linear(64, 64),
            "k": nn.Linear(96, 64),
            "n": nn.Linear(64, 12),
            "subclass": Subclass(64, 64),
            "lazy": nn.LazyLinear(64),
            "wide": nn.Linear(64, 64, dtype=torch.float64),
            "wrapped": nn.Linear(64, 64),
            "strided": nn.Linear(64, 64),
            "computed": nn.Linear(64, 64),
            "quantized": nn.Linear(64, 64).requires_grad_(False).to(torch.float8_e4m3fn),
            "norm": nn.LayerNorm(64),
        }
    )
    module["wrapped"].forward = module["wrapped"].forward  # what offloading hooks do
    module["strided"].weight = nn.Parameter(torch.zeros(64, 64).T)
    nn.utils.parametrizations.weight_norm(module["computed"])
    with caplog.at_level(logging.WARNING, "rtlynx"):
        rtlynx.apply(module, EVERYTHING)
    why = reasons(module)
    assert [row.name for row in rtlynx.summary(module) if row.sparse] == ["good"]
    for name, piece in {
        "k": "in_features = 96 is not a positive multiple of 64",
        "n": "out_features = 12 is not a positive multiple of 8",
        "subclass": "Subclass",
        "lazy": "LazyLinear",
        "wide": "float64 on cpu",
        "wrapped": "hook",
        "strided": "contiguous",
        "computed": "ParametrizedLinear",
        "quantized": "float8_e4m3fn on cpu",
    }.items():
        assert piece in why[name], (name, why[name])
        assert piece in caplog.text


def test_float32_is_for_the_cpu() -> None:
    assert torch.float32 in SUPPORTED_DTYPES["cpu"]
    assert set(SUPPORTED_DTYPES["cuda"]) == {torch.bfloat16, torch.float16}


def test_no_layer_at_all_is_an_error_that_names_the_patterns() -> None:
    module = model()
    with pytest.raises(InvalidArgumentError, match=r"blocks\.\*\.attn") as error:
        rtlynx.apply(module, SparsityConfig(include=("blocks.*.attn",)))
    assert "Sequential" in str(error.value)
    with pytest.raises(InvalidArgumentError, match="minus"):
        rtlynx.apply(module, SparsityConfig(include=("0.to_q",), skip=("**",)))
    assert not any(isinstance(m, SparseLinear) for m in module.modules())


def test_a_skip_pattern_that_names_nothing_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rtlynx"):
        rtlynx.apply(model(), SparsityConfig(include=("**",), skip=("2.to_q", "0.to_q")))
    assert "'2.to_q' names no linear layer" in caplog.text
    assert "'0.to_q' names no" not in caplog.text


@pytest.mark.parametrize("attribute", ["transformer", "unet"])
def test_a_pipeline_is_anything_with_a_transformer_or_unet(attribute: str) -> None:
    pipe = SimpleNamespace(**{attribute: model()})
    assert rtlynx.apply(pipe, EVERYTHING) is pipe
    assert len([row for row in rtlynx.summary(pipe) if row.sparse]) == 8
    rtlynx.remove(pipe)
    assert not [row for row in rtlynx.summary(pipe) if row.sparse]


@pytest.mark.parametrize("function", [rtlynx.apply, rtlynx.remove, rtlynx.summary])
def test_anything_else_is_refused(function: object) -> None:
    with pytest.raises(InvalidArgumentError, match="pipe_or_module"):
        function("a string")  # type: ignore[operator]


def test_a_layer_with_two_names_stays_one_layer() -> None:
    module = model()
    module[1].to_q = module[0].to_q
    rtlynx.apply(module, EVERYTHING)
    assert isinstance(module[0].to_q, SparseLinear)
    assert module[1].to_q is module[0].to_q
    rtlynx.remove(module)
    assert type(module[1].to_q) is nn.Linear
    assert module[1].to_q is module[0].to_q


def test_summary_rows_and_share() -> None:
    module = rtlynx.apply(model(), SparsityConfig(include=("*.{ff,out}",)))
    summary = rtlynx.summary(module, tokens=100)
    assert [row.name for row in summary] == [f"{i}.{name}" for i in (0, 1) for name in ("to_q", "to_k", "ff", "out")]
    ff = next(row for row in summary if row.name == "0.ff")
    assert (ff.sparse, ff.reason, ff.in_features, ff.out_features, ff.rank, ff.kernel) == (True, "", 64, 128, 0, "reference (CPU)")
    assert ff.flops == 2 * 100 * 64 * 128
    assert summary.sparse_flops_share == pytest.approx(4 / 6)
    assert "4 of 8 linear layers are sparse, 66.7% of their FLOPs at 100 tokens" in str(summary)
    module[0].ff.dense = True
    assert reasons(module)["0.ff"] == "its `dense` switch is on"
    assert rtlynx.summary(module).sparse_flops_share == pytest.approx(3 / 6)


def test_summary_before_apply_and_after_changes() -> None:
    module = model()
    assert set(reasons(module).values()) == {"rtlynx.apply was not called on this model", "not named by the generic recipe"}
    rtlynx.apply(module, EVERYTHING)
    module[0].to_q = nn.Linear(64, 64)
    assert reasons(module) == {"0.to_q": "added or replaced since rtlynx.apply"}


def test_layers_that_see_one_row_per_sample_hardly_count() -> None:
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.ModuleDict({"linear": nn.Linear(64, 640)})
            self.attn = Block()

    rows = {row.name: row.tokens for row in rtlynx.summary(nn.Sequential(Modulated()), tokens=500)}
    assert rows["0.norm1.linear"] == 1
    assert rows["0.attn.to_q"] == 500


def test_a_copy_of_an_applied_model_can_be_removed() -> None:
    module = model()
    x = torch.randn(2, 64)
    want = module(x)
    twin = copy.deepcopy(rtlynx.apply(module, EVERYTHING))
    assert torch.equal(rtlynx.remove(twin)(x), want)
    assert isinstance(module[0].to_q, SparseLinear)


def test_a_compiled_wrapper_is_looked_through() -> None:
    module = model()
    compiled = torch.compile(module, backend="eager")
    assert rtlynx.apply(compiled, SparsityConfig(include=("0.to_q",))) is compiled
    assert isinstance(module[0].to_q, SparseLinear)


def test_a_block_by_itself() -> None:
    block = TINY["flux"].build("cpu", torch.float32).transformer_blocks[0]  # type: ignore[index, union-attr]
    layers = {row.name: row.sparse for row in rtlynx.summary(rtlynx.apply(block))}
    assert [name for name, sparse in layers.items() if not sparse] == ["norm1.linear", "norm1_context.linear"]
    assert sum(layers.values()) == 8 + 2 * 2


@pytest.mark.parametrize("name", ["transformer_2", "unconditional_transformer"])
def test_a_second_transformer_is_served_too(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = SimpleNamespace(transformer=model(), **{name: model()})
    assert rtlynx.apply(pipe, SparsityConfig(include=("**",), skip=("1.**",))) is pipe
    rows = {row.name: row.sparse for row in rtlynx.summary(pipe)}
    assert [name for name, sparse in rows.items() if sparse] == [
        f"{p}0.{n}" for p in ("", f"{name}.") for n in ("to_q", "to_k", "ff", "out")
    ]
    assert len(rows) == 16
    rtlynx.remove(pipe)
    assert not any(isinstance(m, SparseLinear) for m in (*pipe.transformer.modules(), *getattr(pipe, name).modules()))
    # one that has nothing to offer is not passed over in silence, and an error only where no other has
    setattr(pipe, name, nn.Conv2d(3, 3, 3))
    with caplog.at_level(logging.WARNING, "rtlynx"):
        rtlynx.apply(pipe, EVERYTHING)
    assert "Conv2d has no layer that the configuration names" in caplog.text
    for shared in (pipe.transformer, torch.compile(pipe.transformer, backend="eager"), None):
        setattr(pipe, name, shared)
        assert len(rtlynx.summary(pipe)) == 8


@pytest.mark.parametrize("config", [{"rank": 32}, True, 64])
def test_a_config_of_another_kind_is_refused(config: object) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a SparsityConfig"):
        rtlynx.apply(nn.Sequential(nn.Linear(64, 64)), config)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_channels_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 0), nn.Linear(0, 64))
    rtlynx.apply(model, SparsityConfig(include=("*",)))
    assert [type(layer) for layer in model] == [SparseLinear, nn.Linear, nn.Linear]


def test_what_refuses_leaves_both_transformers_as_they_were() -> None:
    pipe = SimpleNamespace(transformer=model(), transformer_2=model())
    rtlynx.apply(pipe, EVERYTHING)
    wrapped = pipe.transformer_2[1].out
    wrapped.forward = wrapped.forward  # what offloading hooks do
    with pytest.raises(InvalidArgumentError, match="hook"):
        rtlynx.remove(pipe)
    assert all(row.sparse for row in rtlynx.summary(pipe))


def extension(capability: tuple[int, int] = (9, 0), targets: tuple[str, ...] = ("sm_80",), driver: tuple[int, int] = (13, 0)) -> Any:
    def plan(capability: tuple[int, int], sms: int, **problem: Any) -> str:
        if capability < (8, 0):
            raise DeviceError("sparse_linear", "device", "7.0", "8.0", "compute capability 7.0 has no sparse tensor cores")
        return "spmm"

    return SimpleNamespace(
        devices=lambda: [{"capability": capability, "sms": 80}],
        plan_sparse_linear=plan,
        device_code=lambda: {"targets": list(targets), "min_driver": (13, 0)},
        driver_version=lambda: driver,
    )


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (extension(), ""),
        (extension(capability=(7, 0)), "compute capability 7.0 has no sparse tensor cores"),
        (extension(targets=()), "this build of rtlynx has no device code"),
        (extension(driver=(12, 4)), "the driver supports CUDA 12.4, and the kernels need 13.0"),
    ],
)
def test_a_layer_stays_dense_where_no_kernel_can_run(core: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "core", lambda: core)
    on_gpu = launch.why_no_kernels.__wrapped__(torch.device("cuda:0"))
    monkeypatch.setattr(eligibility, "why_no_kernels", lambda device: on_gpu)
    model = rtlynx.apply(nn.Sequential(nn.Linear(128, 64)), SparsityConfig(include=("0",)))
    (row,) = rtlynx.summary(model)
    assert (row.sparse, row.reason) == (not reason, reason)
    assert model(torch.randn(3, 128)).shape == (3, 64)
