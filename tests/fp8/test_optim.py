"""Laws of Float8AdamW: what its 8-bit moments may lose, and what they may not."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fp8.adamw import Factors, Operands, float8_adamw_step, reference_steps
from fp8.moments import (
    GROUP,
    decode_first,
    decode_second,
    dither,
    encode_first,
    encode_second,
    groups_of,
    round_stochastically,
)
from fp8.optim import Float8AdamW, check_state, state_bytes

CPU = torch.device("cpu")


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter((torch.randn(shape) * 0.1).to(dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def walk(optimizer: torch.optim.Optimizer, steps: range, scale: float = 1.0) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        give_gradients(params, step, scale)
        torch.manual_seed(step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


KEYS = ("exp_avg", "exp_avg_sq")
SHAPES = ((64, 70), (33, 200), (70,), (8, 8))


# The codes


def test_every_code_of_the_first_moment_is_read_as_e4m3_and_written_back() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F].view(2, 127)
    for exponent in (-126, -20, 0, 90):
        scale = torch.full((2,), 2.0**exponent)
        values = decode_first(codes, scale)
        assert torch.equal(values, codes.view(torch.float8_e4m3fn).float() * 2.0**exponent)
        if exponent > -126:
            again, scale_again = encode_first(values)
            assert torch.equal(again, codes)
            assert torch.equal(scale_again, scale)


def test_every_code_of_the_second_moment_is_a_number_of_three_bits_and_written_back() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    values = decode_second(codes, torch.tensor([2.0**-40]))
    c = torch.arange(256)
    assert torch.equal(values[0], 2.0 ** (c // 8 - 40) * (1 + (c % 8) / 8))
    for step in range(50):
        again, scale = encode_second(values, dither(step, CPU).repeat(2))
        assert torch.equal(again, codes)
        assert float(scale) == 2.0**-40


def test_what_a_code_restores_is_within_its_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, GROUP, generator=generator)
    x = x * 10 ** (torch.rand(400, GROUP, generator=generator) * 14 - 7)
    codes, scale = encode_first(x)
    bound = torch.maximum(x.abs() * 2**-4, scale[:, None] * 2**-10)
    assert bool(((decode_first(codes, scale) - x).abs() <= bound).all())
    v, d = x * x, dither(7, CPU)
    codes, scale = encode_second(v, d)
    floor = scale[:, None]
    restored = decode_second(codes, scale)
    assert bool(((restored - v).abs() <= torch.maximum(v / 8, floor)).all())
    assert bool((restored >= floor).all())
    assert bool((floor[:, 0] <= v.amax(-1) * 2.0**-30).all())


def test_the_second_moment_is_rounded_without_bias_over_the_steps() -> None:
    v = torch.rand(4, GROUP, generator=torch.Generator().manual_seed(0)) + 0.01
    total, steps = torch.zeros_like(v).double(), 1000
    for step in range(steps):
        total += decode_second(*encode_second(v, dither(step, CPU)))
    spacing = torch.exp2(v.log2().floor()) / 8
    chance = (v / spacing) % 1
    sigma = (chance * (1 - chance) / steps).sqrt() * spacing
    assert bool(((total / steps - v).abs() < 4 * sigma + 1e-4 * spacing).all())


def test_a_second_moment_without_gradients_is_forgotten_as_fast_as_it_should_be() -> None:
    """Rounded to nearest it would stay for ever: 5 % a step never reaches the next code."""
    kept = []
    for start in range(0, 20_000, 1000):
        v = torch.rand(4, GROUP, generator=torch.Generator().manual_seed(start)) + 0.1
        now = v
        for step in range(start, start + 100):
            now = decode_second(*encode_second(now * 0.95, dither(step, CPU)))
        kept.append(float((now / (v * 0.95**100)).mean()))
    assert abs(sum(kept) / len(kept) - 1) < 0.05
    assert max(abs(x - 1) for x in kept) < 0.3


def test_zero_infinity_and_nan_stay_what_they_are() -> None:
    x = torch.zeros(3, GROUP)
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    m = decode_first(*encode_first(x))
    assert not bool(m[0].any())
    assert bool(m[1:].isnan().all())
    v = decode_second(*encode_second(x.abs(), dither(1, CPU)))
    assert not bool(v[0].any())
    assert float(v[1, 5]) == torch.inf


def test_stochastic_rounding_gives_a_neighbour_and_no_bias() -> None:
    n = 1 << 16
    for value in (1 + 2**-10, -3.7, 1e-30, 0.1):
        x = torch.full((n,), value)
        rounded = round_stochastically(x, torch.tensor([12345], dtype=torch.int32)).double()
        low, high = sorted(rounded.unique().tolist())
        assert low < float(x[0]) < high
        chance = (float(x[0]) - low) / (high - low)
        sigma = (chance * (1 - chance) / n) ** 0.5
        assert abs(float((rounded == high).double().mean()) - chance) < 4 * sigma
    exact = torch.tensor([0.0, 1.5, -2.0, torch.inf, -torch.inf])
    assert torch.equal(round_stochastically(exact, torch.tensor([1], dtype=torch.int32)), exact)
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert bool(round_stochastically(nan, torch.tensor([1], dtype=torch.int32)).isnan())


def test_seeds_give_noise_that_has_nothing_to_do_with_one_another() -> None:
    x = torch.full((1 << 16,), 1 + 2**-8)
    ups = [
        (round_stochastically(x, torch.tensor([seed], dtype=torch.int32)) > 1).double() - 0.5
        for seed in (1, 2, 3, -77)
    ]
    for i, a in enumerate(ups):
        for b in ups[:i]:
            assert abs(float((a * b).mean())) * 4 < 4 / 2**8


# The step


def test_with_fp32_moments_it_is_the_adamw_of_torch() -> None:
    ours, theirs, slow = (weights(*SHAPES) for _ in range(3))
    settings = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = [
        Float8AdamW(ours, **settings, moments="float32"),
        torch.optim.AdamW(theirs, **settings, fused=True),
        torch.optim.AdamW(slow, **settings, foreach=False),
    ]
    for step in range(6):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 3e-3 / (step + 1)
            walk(optimizer, range(step, step + 1))
    assert all_equal([*ours], [*theirs])
    for a, b in zip(ours, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_first_step_is_the_one_of_torch_for_it_reads_no_rounded_moment() -> None:
    ours, theirs = weights((64, 70)), weights((64, 70))
    a = walk(Float8AdamW(ours, lr=1e-2), range(1))
    b = walk(torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1), range(1))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_quadratic_is_minimised_as_by_fp32_moments() -> None:
    curvature = torch.logspace(-3, 1, 64 * 128).view(64, 128)

    def final(**options: Any) -> float:
        [p] = weights((64, 128))
        optimizer = Float8AdamW([p], lr=3e-3, weight_decay=0.0, **options)
        for _ in range(60):
            p.grad = curvature * p.detach()
            optimizer.step()
        return float((curvature * p.detach() ** 2).sum())

    fp32 = final(moments="float32")
    assert fp32 < 0.1 * float((curvature * weights((64, 128))[0].detach() ** 2).sum())
    assert abs(final() / fp32 - 1) < 0.05


def test_a_language_model_learns_as_with_fp32_moments(
    tiny_model: Callable[..., nn.Module],
) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 256, (64,), generator=generator).repeat(40)

    def final(**options: Any) -> float:
        model = tiny_model()
        optimizer = Float8AdamW(model.parameters(), lr=2e-3, **options)
        losses = []
        for step in range(40):
            starts = torch.randint(0, 2000, (4,), generator=torch.Generator().manual_seed(step))
            ids = torch.stack([base[s : s + 33] for s in starts])
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.7 * losses[0]
        return sum(losses[-5:]) / 5

    fp32 = final(moments="float32")
    float8 = final()
    assert float8 != fp32
    assert abs(float8 / fp32 - 1) < 0.01


def test_the_second_moment_is_never_zero_where_the_first_is_not() -> None:
    """Or else a step would divide by eps alone."""
    [p] = weights((64, 130))
    optimizer = Float8AdamW([p], lr=1.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        magnitude = 10 ** (torch.rand(p.shape, generator=generator) * 12 - 12)
        p.grad = torch.randn(p.shape, generator=generator) * magnitude * (step % 3 != 2)
        before = p.detach().clone()
        optimizer.step()
        assert float((p.detach() - before).abs().max()) < 8
    state = optimizer.state[p]
    whole = p.numel() // GROUP * GROUP
    m_codes, v_codes = (state[key].flatten()[:whole].view(-1, GROUP) for key in KEYS)
    m = decode_first(m_codes, state["exp_avg_scale"][: len(m_codes)])
    v = decode_second(v_codes, state["exp_avg_sq_scale"][: len(v_codes)])
    assert bool((m != 0).any())
    assert bool((v[m != 0] > 0).all())


@pytest.mark.parametrize("exponent", [-20, 12])
def test_gradients_times_a_power_of_two_give_the_same_codes_and_weights(exponent: int) -> None:
    one, other = weights(*SHAPES), weights(*SHAPES)
    a = Float8AdamW(one, lr=1e-2, eps=1e-30)
    b = Float8AdamW(other, lr=1e-2, eps=1e-30)
    assert all_equal(walk(a, range(5)), walk(b, range(5), scale=2.0**exponent))
    for p, q in zip(one[:2], other[:2], strict=True):
        x, y = a.state[p], b.state[q]
        assert torch.equal(x["exp_avg"], y["exp_avg"])
        assert torch.equal(x["exp_avg_sq"], y["exp_avg_sq"])
        assert torch.equal(x["exp_avg_scale"] * 2.0**exponent, y["exp_avg_scale"])
        assert torch.equal(x["exp_avg_sq_scale"] * 4.0**exponent, y["exp_avg_sq_scale"])


def test_a_tensor_moves_alike_alone_in_company_and_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def moved(together: bool) -> list[Tensor]:
        params = weights((64, 128), (40, 128), (3, 1500), (70, 66))
        rounded = weights((64, 128), dtype=torch.bfloat16)
        groups = [[*params, *rounded]] if together else [rounded, *([p] for p in params)]
        optimizers = [Float8AdamW(ps, lr=1e-2, master="bfloat16_stochastic") for ps in groups]
        for step in range(3):
            give_gradients([*params, *rounded], step)
            torch.manual_seed(step)
            for optimizer in optimizers:
                optimizer.step()
        return [*params, *rounded]

    alone = moved(together=False)
    assert all_equal(alone, moved(together=True))
    monkeypatch.setattr("fp8.adamw._BATCH", 5 * GROUP)
    assert all_equal(alone, moved(together=True))


def test_a_transposed_parameter_moves_as_a_contiguous_one() -> None:
    straight = weights((64, 80))
    turned = [nn.Parameter(straight[0].detach().t().contiguous().t())]
    assert not turned[0].is_contiguous()
    a, b = Float8AdamW(straight), Float8AdamW(turned)
    assert all_equal(walk(a, range(3)), walk(b, range(3)))


def test_bfloat16_with_a_master_is_the_rounded_fp32_run() -> None:
    in_bf16 = weights((64, 80), (80,), dtype=torch.bfloat16)
    in_fp32 = [nn.Parameter(p.detach().float()) for p in in_bf16]
    a, b = Float8AdamW(in_bf16, lr=1e-3), Float8AdamW(in_fp32, lr=1e-3)
    for step in range(8):
        for p, q in zip(in_bf16, in_fp32, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
            q.grad = p.grad.float()
        a.step()
        b.step()
    for p, q in zip(in_bf16, in_fp32, strict=True):
        assert torch.equal(a.state[p]["master"], q)
        assert torch.equal(p, q.bfloat16())
    elements = sum(p.numel() for p in in_bf16)
    assert state_bytes(a).masters == 4 * elements
    assert state_bytes(a).moments == state_bytes(b).moments


@pytest.mark.parametrize("shape", [(256, 256), (256 * 256,)])
def test_steps_too_small_for_bfloat16_are_taken_on_average(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    [p] = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))]
    optimizer = Float8AdamW([p], lr=2.0**-13, weight_decay=0.0, master="bfloat16_stochastic")
    p.grad = -torch.ones_like(p)
    for _ in range(8):  # each asks for 2**-13; the next bfloat16 above 1 is 2**-7 away
        optimizer.step()
    assert "master" not in optimizer.state[p]
    chance = 8 * 2.0**-13 / 2.0**-7
    sigma = (chance * (1 - chance) / p.numel()) ** 0.5 * 2.0**-7
    assert abs(float(p.detach().double().mean()) - 1 - 8 * 2.0**-13) < 4 * sigma


def test_moments_weigh_two_bytes_a_parameter(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model(hidden=128)
    optimizer = Float8AdamW(model.parameters())
    assert state_bytes(optimizer).moments_per_parameter == 0
    params = list(model.parameters())
    give_gradients(params, 0)
    optimizer.step()
    weighed = state_bytes(optimizer)
    assert weighed.parameters == sum(p.numel() for p in params)
    assert weighed.masters == 0
    assert 2 < weighed.moments_per_parameter <= 2.1
    for p, state in optimizer.state.items():
        small = p.ndim < 2 or p.numel() < 4096
        assert (state["exp_avg"].dtype == torch.float32) == small


def test_vectors_and_small_matrices_keep_fp32_moments() -> None:
    params = weights((5000,), (63, 65), (64, 64), (2, 2, 1024))
    optimizer = Float8AdamW(params)
    walk(optimizer, range(1))
    dtypes = [optimizer.state[p]["exp_avg"].dtype for p in params]
    assert dtypes == [torch.float32, torch.float32, torch.uint8, torch.uint8]


def test_the_first_steps_may_have_fp32_moments() -> None:
    ours, theirs = weights((64, 70)), weights((64, 70))
    a = Float8AdamW(ours, quantize_after=3)
    b = Float8AdamW(theirs, moments="float32")
    assert all_equal(walk(a, range(3)), walk(b, range(3)))
    assert a.state[ours[0]]["exp_avg"].dtype == torch.float32
    assert not all_equal(walk(a, range(3, 4)), walk(b, range(3, 4)))
    assert a.state[ours[0]]["exp_avg"].dtype == torch.uint8
    check_state(ours[0], a.state[ours[0]])


# Saving and resuming


def through_state_dict(old: Float8AdamW, new: Float8AdamW) -> None:
    new.load_state_dict(copy.deepcopy(old.state_dict()))


def through_safetensors(old: Float8AdamW, new: Float8AdamW) -> None:
    for p, q in zip(old.param_groups[0]["params"], new.param_groups[0]["params"], strict=True):
        for key, value in load(save(old.state[p])).items():
            new.state[q][key] = value


def through_pickle(old: Float8AdamW, new: Float8AdamW) -> None:
    new.load_state_dict(pickle.loads(pickle.dumps(old.state_dict())))


@pytest.mark.parametrize("carry", [through_state_dict, through_safetensors, through_pickle])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"quantize_after": 5}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"master": "bfloat16_stochastic"}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    carry: Callable[[Float8AdamW, Float8AdamW], None], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    whole = walk(Float8AdamW(weights(*SHAPES, dtype=dtype), **options), range(8))
    first = weights(*SHAPES, dtype=dtype)
    before = Float8AdamW(first, **options)
    walk(before, range(4))
    second = [nn.Parameter(p.detach().clone()) for p in first]
    after = Float8AdamW(second, **options)
    carry(before, after)
    walk(before, range(90, 92))  # the old one goes on and must not be heard
    assert all_equal(walk(after, range(4, 8)), whole)


def test_loading_keeps_the_dtypes_that_torch_would_cast() -> None:
    params = weights(*SHAPES, dtype=torch.bfloat16)
    optimizer = Float8AdamW(params)
    walk(optimizer, range(2))
    other = Float8AdamW(params)
    other.load_state_dict(optimizer.state_dict())
    for p in params:
        for key, value in optimizer.state[p].items():
            loaded = other.state[p][key]
            assert loaded.dtype == value.dtype
            assert loaded.data_ptr() != value.data_ptr()
            assert torch.equal(loaded, value)


def test_the_state_of_torchs_adamw_is_taken_and_becomes_codes() -> None:
    params = weights(*SHAPES)
    theirs = torch.optim.AdamW(params, lr=1e-2)
    walk(theirs, range(2))
    ours = Float8AdamW(params)
    ours.load_state_dict(theirs.state_dict())
    walk(ours, range(2, 3))
    assert float(ours.state[params[0]]["step"]) == 3
    assert ours.state[params[0]]["exp_avg"].dtype == torch.uint8
    assert ours.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("damage", ["exp_avg_scale", "exp_avg", "step", "shape", "stranger"])
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(damage: str) -> None:
    params = weights(*SHAPES)
    optimizer = Float8AdamW(params)
    walk(optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    if damage == "shape":
        saved["state"][0]["exp_avg_sq_scale"] = torch.ones(3)
    elif damage == "stranger":
        saved["state"][0]["max_exp_avg_sq"] = torch.ones(64, 70)
    else:
        del saved["state"][0][damage]
    expected = walk(copy.deepcopy(optimizer), range(2, 4))
    with pytest.raises(ValueError, match=r"optimizer state .* wanted"):
        optimizer.load_state_dict(saved)
    assert all_equal(walk(optimizer, range(2, 4)), expected)


def test_a_copy_and_a_pickle_go_on_like_the_original() -> None:
    optimizer = Float8AdamW(weights(*SHAPES), weight_decay=0.3)
    walk(optimizer, range(2))
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    expected = walk(optimizer, range(2, 4))
    for other in copies:
        assert all_equal(walk(other, range(2, 4)), expected)


# Bad input


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("where", [0, 2])
def test_a_gradient_that_is_not_finite_is_refused_and_nothing_changes(
    bad: float, where: int
) -> None:
    params = weights(*SHAPES)
    optimizer = Float8AdamW(params)
    before = walk(optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    give_gradients(params, 2)
    grad = params[where].grad
    assert grad is not None
    grad.view(-1)[5] = bad
    with pytest.raises(FloatingPointError, match=rf"parameter {where} of group 0.*skip this step"):
        optimizer.step()
    assert all_equal(before, [*params])
    state = optimizer.state_dict()["state"]
    assert all_equal([x for s in saved["state"].values() for x in s.values()],
                     [x for s in state.values() for x in s.values()])  # fmt: skip


def test_unchecked_a_gradient_of_nan_shows_in_the_whole_group_and_nowhere_else() -> None:
    for bad in (torch.nan, torch.inf):
        [p] = weights((64, 128))
        optimizer = Float8AdamW([p], check_finite=False)
        give_gradients([p], 0)
        assert p.grad is not None
        p.grad[3, 7] = bad
        optimizer.step()
        give_gradients([p], 1)
        optimizer.step()
        assert bool(p[3].isnan().all())
        assert bool(p[:3].isfinite().all())
        assert bool(p[4:].isfinite().all())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, -0.1)),
        ("betas", (0.9,)),
        ("eps", 0.0),
        ("eps", float("inf")),
        ("weight_decay", -0.1),
        ("moments", "int8"),
        ("master", "bfloat16"),
        ("quantize_after", -1),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        Float8AdamW(weights((4, 4)), **settings)
    with pytest.raises(ValueError, match=name):
        Float8AdamW([{"params": weights((4, 4)), **settings}])


def test_other_dtypes_and_sparse_gradients_are_refused() -> None:
    optimizer = Float8AdamW(weights((4, 4)))
    with pytest.raises(ValueError, match=r"float64.*convert"):
        optimizer.add_param_group({"params": weights((4, 4), dtype=torch.float64)})
    assert len(optimizer.param_groups) == 1
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = Float8AdamW(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"weight of group 0.*sparse=False"):
        optimizer.step()


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    [p] = weights((64, 70))
    optimizer = Float8AdamW([p])

    def closure() -> float:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return float(loss.detach())

    before = float((p.detach() ** 2).sum())
    assert optimizer.step(closure) == before
    assert float((p.detach() ** 2).sum()) < before


def test_groups_have_settings_of_their_own_and_a_parameter_without_gradient_rests() -> None:
    first, second, idle = weights((64, 70), (64, 70), (64, 70))
    optimizer = Float8AdamW(
        [{"params": [first, idle]}, {"params": [second], "lr": 0.0, "moments": "float32"}]
    )
    before = idle.detach().clone(), second.detach().clone()
    give_gradients([first, second], 0)
    optimizer.step()
    assert torch.equal(idle, before[0])
    assert torch.equal(second, before[1])
    assert idle not in optimizer.state
    assert optimizer.state[first]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[second]["exp_avg"].dtype == torch.float32


# Where it runs


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_sharded_parameter_is_stepped_by_its_shard() -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    plain = weights(*SHAPES[:2])
    sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    a, b = Float8AdamW(plain), Float8AdamW(sharded)
    for step in range(3):
        give_gradients(plain, step)
        for p, q in zip(plain, sharded, strict=True):
            assert p.grad is not None
            q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])  # type: ignore[assignment]
        a.step()
        b.step()
    for p, q in zip(plain, sharded, strict=True):
        local = q.detach()
        assert isinstance(local, DTensor)
        assert torch.equal(p, local.to_local())
        assert all(type(value) is Tensor for value in b.state[q].values())
        check_state(q, b.state[q])


def test_an_empty_shard_is_counted_and_left_alone() -> None:
    params = weights((0,), (0, 128), (64, 70))
    optimizer = Float8AdamW(params)
    walk(optimizer, range(3))
    assert all(float(optimizer.state[p]["step"]) == 3 for p in params)
    walk(Float8AdamW(params[:2], moments="float32"), range(2))


def operands(n: int, kind: str) -> Operands:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    param = torch.randn(n, generator=generator).to(dtype)
    groups = groups_of(n)
    return Operands(
        param,
        param.float() if kind == "master" else None,
        torch.tensor([77], dtype=torch.int32) if kind == "seed" else None,
        torch.randn(n, generator=generator).to(dtype),
        torch.zeros(n, dtype=torch.uint8),
        torch.ones(groups),
        torch.zeros(n, dtype=torch.uint8),
        torch.zeros(groups),
    )


@pytest.mark.parametrize("kind", ["float32", "master", "seed"])
def test_the_op_is_sound_and_does_what_the_reference_does(kind: str) -> None:
    factors = Factors.of_step(3, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    a, b = operands(300, kind), operands(300, kind)
    float8_adamw_step(*a, list(factors), 3)
    reference_steps([b], factors, 3)
    for x, y in zip(a, b, strict=True):
        assert x is y is None or torch.equal(x, y)
    torch.library.opcheck(float8_adamw_step, (*operands(300, kind), list(factors), 3))
