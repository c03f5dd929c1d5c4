"""The grouped linear kernels for Hopper on the CPU, through the emulation of its instructions, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from block_rows import ORDERS, new_memory_is_nan
from linear_layers import Shape, check, check_fp8, make, make_fp8
from machine_code import machine_code
from shim_compiler import KERNELS, op_library
from torch import Tensor

from u4d_fast.fp8 import Fp8Rows
from u4d_fast.ops.grouped_linear import by_kernel, fp8_by_kernel
from u4d_fast.reference.quantize_rows import quantize_rows

HostShim = Callable[[str, str], AbstractContextManager[None]]
OP = "grouped_linear"
PRECISIONS = ["bf16", "fp8"]

# A tile is 128 rows by 256 (bf16) or 192 (fp8) columns and a stage 64 or 128 channels; the emulated GPU has 3 SMs.
SHAPES = [
    Shape(1, 1, 8, 16),  # one row
    Shape(2, 5, 40, 48),  # less than a tile
    Shape(1, 128, 384, 128),  # whole tiles
    Shape(1, 64, 256, 512),  # no rows for the second consumer, all stages
    Shape(2, 129, 264, 208),  # one row and a few columns more
    Shape(3, 260, 520, 80),  # several tiles for each block
    Shape(1, 2100, 264, 16),  # two panels, not alike
    Shape(4, 30, 72, 1040),  # many turns of the ring
]


def values(shape: Shape, precision: str) -> tuple[tuple[Tensor, ...], Callable[..., Tensor], Callable[..., None]]:
    """What the kernel multiplies, the op that runs it, and the check of its result."""
    if precision == "bf16":
        return make(shape), by_kernel, check
    x, weight, bias = make_fp8(shape)
    return (
        (*x, *weight, bias),
        fp8_by_kernel,
        lambda found, *given: check_fp8(found, Fp8Rows(*given[:2]), Fp8Rows(*given[2:4]), *given[4:]),
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_size(host_shim: HostShim, shape: Shape, precision: str) -> None:
    """With and without bias and GELU; the order of the threads changes nothing."""
    (*factors, bias), run, check_result = values(shape, precision)
    for one, gelu in ((bias, True), (bias.float(), False), (None, False)):
        found = []
        for order in ORDERS:
            with host_shim(OP, order), new_memory_is_nan():
                found.append(run(*factors, one, gelu))
        check_result(found[0], *factors, one, gelu)
        assert torch.equal(*found)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_order_in_which_copies_come_changes_nothing(host_shim: HostShim, precision: str) -> None:
    (*factors, bias), run, _ = values(Shape(2, 200, 328, 400), precision)
    results = []
    for seed in range(4):
        op_library(OP).u4d_shim_seed(seed)
        with host_shim(OP, ORDERS[seed % 2]):
            results.append(run(*factors, bias, True))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_strided_inputs(host_shim: HostShim, precision: str) -> None:
    """Rows apart, clips, streams side by side, and what the copy engine can't read in place; nothing around is read."""
    (*factors, bias), run, _ = values(Shape(2, 36, 56, 96), precision)
    x, weight = (0, 1) if precision == "bf16" else (0, 2)
    with host_shim(OP, "forward"):
        expected = run(*factors, bias, False)

        def with_factors(new_x: Tensor, new_weight: Tensor) -> Tensor:
            changed = list(factors)
            changed[x], changed[weight] = new_x, new_weight
            return run(*changed, bias.mT.contiguous().mT, False)

        for lay_out in (surrounded_by_nan, streams_side_by_side, columns_apart):
            assert torch.equal(with_factors(*map(lay_out, (factors[x], factors[weight]))), expected), lay_out
        in_clips = with_factors(factors[x].unflatten(1, (4, 9)), factors[weight])
        assert torch.equal(in_clips, expected.unflatten(1, (4, 9)))


def surrounded_by_nan(x: Tensor) -> Tensor:
    streams, rows, depth = x.shape
    wide = torch.full((streams, rows + 3, depth + 16), torch.nan).to(x.dtype)
    wide[:, 1:-2, :depth] = x
    return wide[:, 1:-2, :depth]


def streams_side_by_side(x: Tensor) -> Tensor:
    return torch.stack(x.unbind(0), 1).transpose(0, 1)


def columns_apart(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def test_a_nan_stays_in_its_row_and_its_column(host_shim: HostShim) -> None:
    x, weight, bias = make(Shape(2, 140, 264, 80))
    x[0, 130, 7], weight[1, 259, 3] = torch.nan, torch.inf
    expected = torch.zeros(2, 140, 264, dtype=torch.bool)
    expected[0, 130], expected[1, :, 259] = True, True
    with host_shim(OP, "forward"):
        assert torch.equal(~by_kernel(x, weight, bias, False).isfinite(), expected)
        rows, weights = quantize_rows(x), quantize_rows(weight)
        assert torch.equal(~fp8_by_kernel(*rows, *weights, bias, False).isfinite(), expected)


def test_gelus_tails(host_shim: HostShim) -> None:
    x, weight, _ = make(Shape(1, 4, 600, 16))
    bias = torch.cat((torch.linspace(-20, 20, 592), torch.tensor([1e30, -1e30, 1e4, -1e4, 0, -0.0, 1e-30, -1e-30])))[
        None
    ]
    with host_shim(OP, "forward"):
        found = by_kernel(0 * x, weight, bias, True)
    check(found, 0 * x, weight, bias, True)


def launch(name: str, tensors: list[Tensor | None], numbers: list[int]) -> tuple[int, str]:
    """Call a launcher as it is; tensors become pointers."""
    library = op_library(OP)
    library.u4d_shim_failure.restype = ctypes.c_char_p
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (None, *tensors)]
    return getattr(library, name)(*pointers, *map(ctypes.c_int64, numbers)), library.u4d_shim_failure().decode()


def test_nothing_is_written_beyond_the_result() -> None:
    shape = Shape(2, 100, 136, 64)
    x, weight, bias = make(shape)
    size = shape.streams * shape.rows * shape.columns
    guarded = torch.full((size + 4096,), torch.nan, dtype=torch.bfloat16)
    numbers = [1, *shape, *x.stride()[:2], *weight.stride()[:2], 0]
    assert launch("grouped_linear_cuda", [x, weight, bias, guarded[2048:]], numbers) == (0, "")
    assert guarded[:2048].isnan().all() and guarded[2048 + size :].isnan().all()
    check(guarded[2048 : 2048 + size].view(shape[:3]), x, weight, bias, False)


@pytest.mark.parametrize(
    ("sizes", "status"),
    [
        ((0, 4, 8, 8), 0),
        ((1, 0, 8, 8), 0),
        ((1, 4, 0, 8), 0),
        ((1, 4, 8, 0), -1),
        ((1, 4, 12, 8), -1),
        ((1, 4, 8, 12), -1),
        ((1, -4, 8, 8), -1),
        ((1, 2**31, 8, 8), -2),
    ],
)
def test_nothing_to_do_and_what_is_refused(sizes: tuple[int, ...], status: int) -> None:
    x = torch.zeros(64, dtype=torch.bfloat16)
    assert launch("grouped_linear_cuda", [x, x, None, x], [0, *sizes, 8, 8, 8, 8, 0])[0] == status
    if status == 0:
        return
    numbers = [0, *sizes[:3], 2 * sizes[3], 16, 16, 16, 16, 0]
    assert launch("grouped_linear_fp8_cuda", [x, x, x, x, None, x], numbers)[0] == status


def test_bad_strides_and_addresses_are_refused() -> None:
    x = torch.zeros(1000, dtype=torch.bfloat16)
    numbers = [0, 1, 4, 8, 8, 32, 8, 64, 8, 0]
    assert launch("grouped_linear_cuda", [x, x, None, x], numbers)[0] == 0
    assert launch("grouped_linear_cuda", [x[1:], x, None, x], numbers)[0] == 1
    numbers[6] = 12
    assert launch("grouped_linear_cuda", [x, x, None, x], numbers)[0] == 1


def test_the_machine_code_is_of_both_precisions() -> None:
    code = machine_code(KERNELS / OP / f"{OP}.cu")
    counts = {name: code.count(name) for name in ("HGMMA", "QGMMA", "UTMALDG", "UTMASTG", "LDL", "STL")}
    assert counts["HGMMA"] and counts["QGMMA"] and counts["UTMALDG"] and counts["UTMASTG"], counts
    assert counts["LDL"] == counts["STL"] == 0
