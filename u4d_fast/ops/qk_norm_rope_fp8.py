"""RMS norm of queries or keys and 3-D rotary positions, as rows of e4m3 in attention's layout: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.fp8 import Fp8Rows, new_rows, refuse_gradients
from u4d_fast.ops.qk_norm_rope import check_turned_norm
from u4d_fast.ops.quantize_rows import check_rows
from u4d_fast.ops.rms_norm import readable_by_kernel, type_codes
from u4d_fast.reference.qk_norm_rope_fp8 import qk_norm_rope_fp8 as reference_qk_norm_rope_fp8


def qk_norm_rope_fp8(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float = 1e-6,
    *,
    backend: backends.Backend = "auto",
) -> Fp8Rows:
    """`qk_norm_rope` in float32 and the `quantize_rows` of its result in one pass over memory: a scale for each token
    and head.

    There are no gradients.

    Args:
        x: [S,B,T,D], any strides; a view whose last dimension is dense (such as q, k, v side by side) is read in place.
        weight: [S,D], of any floating dtype.
        cos, sin: [T,d/2] with d = D/heads: cosine and sine of every token's angles. float32 whatever x's dtype is.
        heads: a divisor of D; d is even.
        eps: added to the mean square.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        values [B,S*T,heads,d] float8_e4m3fn and scale [B,S*T,heads] float32, both contiguous.
    Raises:
        ValueError: shapes disagree, heads do not divide D into even parts, a gradient is wanted, or the backend can't
            be had.
        TypeError: a dtype is wrong.
    Source:
        Su et al., "RoFormer", 2021, equation 34; the seed, section "Base"; spec.md section 2.
    """
    check_turned_norm(x, weight, cos, sin, heads)
    check_rows("x", x)
    refuse_gradients("qk_norm_rope_fp8", x=x, weight=weight)
    tensors = (x, weight, cos, sin)
    if backends.resolve("qk_norm_rope_fp8", backend, *tensors, dtypes=backends.SINGLE_AND_HALF) == "reference":
        return reference_qk_norm_rope_fp8(x, weight, cos, sin, heads, eps)
    return Fp8Rows(*_launch(x, weight, cos, sin, heads, float(eps)))


def _kernel(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    x, weight = readable_by_kernel(x, weight)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    values, scale = _outputs(x, heads)
    backends.call(
        "qk_norm_rope_fp8",
        x.device,
        *(tensor.data_ptr() for tensor in (x, weight, cos, sin, values, scale)),
        *type_codes(x, weight),
        *x.shape[:3],
        *values.shape[2:],
        *x.stride()[:3],
        eps,
    )
    return values, scale


def _outputs(x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    streams, batch, tokens, width = x.shape
    return new_rows(x, (batch, streams * tokens, heads, width // heads))


def _reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    values, scale = reference_qk_norm_rope_fp8(x, weight, cos, sin, heads, eps)
    return values.contiguous(), scale.contiguous()


def _fake(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    return _outputs(x, heads)


_launch = backends.register(
    "qk_norm_rope_fp8",
    "(Tensor x, Tensor weight, Tensor cos, Tensor sin, SymInt heads, float eps) -> (Tensor values, Tensor scale)",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    dtypes=backends.SINGLE_AND_HALF,
)
