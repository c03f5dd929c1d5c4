"""A gated residual update, and the adaptive layer norm of its result as rows of e4m3: checks, dispatch and tracing."""

from __future__ import annotations

from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.fp8 import Fp8Rows, new_rows, refuse_gradients
from u4d_fast.frame_tables import check_frame_tables, kernel_tables, resolve, row_sizes, table_strides
from u4d_fast.reference.gated_residual_norm_fp8 import gated_residual_norm_fp8 as reference_gated_residual_norm_fp8


def gated_residual_norm_fp8(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    backend: backends.Backend = "auto",
) -> tuple[Tensor, Fp8Rows]:
    """`gated_residual` and the `ada_layer_norm_fp8` of its result in one pass over memory.

    The norm is of the result as it was rounded, so all outputs are those of the two ops one after the other.

    There are no gradients.

    Args:
        x: [S,B,T,D], T = F*P, tokens ordered frame by frame. D <= 8192 for the kernels.
        update: like x, in its dtype.
        gate, shift, scale: [S,B,F,D], any floating dtype (float32 is read in place); any strides.
        eps: added to the variance.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        x_new = x + update * gate, [S,B,T,D] in x's dtype, and its norm: values [S,B,T,D] float8_e4m3fn and scale
        [S,B,T] float32; all contiguous.
    Raises:
        ValueError: shapes disagree, T is no multiple of F, a gradient is wanted, or the backend can't be had.
        TypeError: a dtype is wrong.
    Source:
        Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2; spec.md section 2.
    """
    check_frame_tables(x, update=update, gate=gate, shift=shift, scale=scale)
    refuse_gradients("gated_residual_norm_fp8", x=x, update=update, gate=gate, shift=shift, scale=scale)
    if resolve("gated_residual_norm_fp8", backend, x, update, gate, shift, scale) == "reference":
        return reference_gated_residual_norm_fp8(x, update, gate, shift, scale, eps)
    x_new, values, row_scale = _launch(x, update, gate, shift, scale, float(eps))
    return x_new, Fp8Rows(values, row_scale)


def _kernel(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, update = x.contiguous(), update.contiguous()
    tables = kernel_tables(gate, shift, scale)
    outputs = _outputs(x)
    pointers = [tensor.data_ptr() for tensor in (x, update, *tables, *outputs)]
    backends.call("gated_residual_norm_fp8", x.device, *pointers, *row_sizes(x, gate), *table_strides(*tables), eps)
    return outputs


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape), *new_rows(x))


def _reference(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x_new, (values, row_scale) = reference_gated_residual_norm_fp8(x, update, gate, shift, scale, eps)
    return x_new.contiguous(), values.contiguous(), row_scale.contiguous()


def _fake(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x)


_launch = backends.register(
    "gated_residual_norm_fp8",
    "(Tensor x, Tensor update, Tensor gate, Tensor shift, Tensor scale, float eps) "
    "-> (Tensor x_new, Tensor values, Tensor row_scale)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    dtypes=backends.SINGLE_AND_HALF,
)
