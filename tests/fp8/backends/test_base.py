import torch

from fp8.backends.base import pack_scale, unpack_scale


def test_every_scale_that_a_power_of_two_can_be_takes_a_byte_and_comes_back() -> None:
    exponents = torch.arange(-126, 128)
    scale = torch.cat([torch.exp2(exponents.double()).float(), torch.tensor([float("nan")])])
    packed = pack_scale(scale)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed.view(torch.float8_e8m0fnu).float()[:-1], scale[:-1])
    assert torch.equal(unpack_scale(packed)[:-1], scale[:-1])
    assert bool(unpack_scale(packed)[-1].isnan())


def test_the_layout_stays() -> None:
    by_blocks = torch.ones(3, 5).t()  # strides (1, 5), as the scaled GEMM reads scales
    assert unpack_scale(pack_scale(by_blocks)).stride() == by_blocks.stride()
