"""Layer norm with a scale and a shift per latent frame, as rows of e4m3: checks, dispatch and tracing."""

from __future__ import annotations

from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.fp8 import Fp8Rows, new_rows, refuse_gradients
from u4d_fast.frame_tables import check_frame_tables, kernel_tables, resolve, row_sizes, table_strides
from u4d_fast.reference.ada_layer_norm_fp8 import ada_layer_norm_fp8 as reference_ada_layer_norm_fp8


def ada_layer_norm_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: backends.Backend = "auto"
) -> Fp8Rows:
    """`ada_layer_norm` in float32 and the `quantize_rows` of its result in one pass over memory.

    There are no gradients.

    Args:
        x: [S,B,T,D], T = F*P, tokens ordered frame by frame. D <= 8192 for the kernels.
        shift, scale: [S,B,F,D], any floating dtype (float32 is read in place); any strides.
        eps: added to the variance.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        values [S,B,T,D] float8_e4m3fn and scale [S,B,T] float32, both contiguous.
    Raises:
        ValueError: shapes disagree, T is no multiple of F, a gradient is wanted, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2 (adaLN); spec.md section 2.
    """
    check_frame_tables(x, shift=shift, scale=scale)
    refuse_gradients("ada_layer_norm_fp8", x=x, shift=shift, scale=scale)
    if resolve("ada_layer_norm_fp8", backend, x, shift, scale) == "reference":
        return reference_ada_layer_norm_fp8(x, shift, scale, eps)
    return Fp8Rows(*_launch(x, shift, scale, float(eps)))


def _kernel(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    tables = kernel_tables(shift, scale)
    rows = new_rows(x)
    pointers = [tensor.data_ptr() for tensor in (x, *tables, *rows)]
    backends.call("ada_layer_norm_fp8", x.device, *pointers, *row_sizes(x, scale), *table_strides(*tables), eps)
    return rows


def _reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values, row_scale = reference_ada_layer_norm_fp8(x, shift, scale, eps)
    return values.contiguous(), row_scale.contiguous()


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return new_rows(x)


_launch = backends.register(
    "ada_layer_norm_fp8",
    "(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor values, Tensor row_scale)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    dtypes=backends.SINGLE_AND_HALF,
)
