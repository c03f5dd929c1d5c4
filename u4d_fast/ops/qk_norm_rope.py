"""RMS norm of queries or keys, then 3-D rotary positions, in attention's layout: checks, dispatch, gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from u4d_fast import backend as backends
from u4d_fast.checks import check_floating, check_match, check_shape
from u4d_fast.ops.rms_norm import check_norm, gradient_fits, has_kernel, partial_sums, readable_by_kernel, type_codes
from u4d_fast.reference.ada_layer_norm import compute_dtype
from u4d_fast.reference.qk_norm_rope import qk_norm_rope as reference_qk_norm_rope
from u4d_fast.reference.qk_norm_rope import rotate_grad
from u4d_fast.reference.rms_norm import rms_norm_grad


def qk_norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float = 1e-6,
    *,
    backend: backends.Backend = "auto",
) -> Tensor:
    """Make projected tokens the queries or keys of attention: RMS norm over the full width, rotary positions, layout.

    The norm is `u4d_fast.rms_norm`; then each pair of neighbouring channels of a head is turned by its angle, the same
    in all heads and streams. The arithmetic is float32 (float64 for float64), with one rounding at the end.

    Differentiable in x and weight; the tables are constants.

    Args:
        x: [S,B,T,D], any strides; a view whose last dimension is dense (such as q, k, v side by side) is read in place.
        weight: [S,D], of any floating dtype.
        cos, sin: [T,d/2] with d = D/heads: cosine and sine of every token's angles. float32 whatever x's dtype is.
        heads: a divisor of D; d is even.
        eps: added to the mean square.
        backend: "auto", "reference", "cpu" or "cuda".
    Returns:
        [B,S*T,heads,d], contiguous, in x's dtype: what `u4d_fast.multi_stream_attention` takes.
    Raises:
        ValueError: shapes disagree, heads do not divide D into even parts, a table requires a gradient, or the backend
            can't be had.
        TypeError: a dtype is not floating.
    Source:
        Su et al., "RoFormer", 2021, equation 34; the seed, section "Base"; spec.md section 2.
    """
    check_turned_norm(x, weight, cos, sin, heads)
    if backends.resolve("qk_norm_rope", backend, x, weight, cos, sin, dtypes=backends.SINGLE_AND_HALF) == "reference":
        return reference_qk_norm_rope(x, weight, cos, sin, heads, eps)
    rotated: Tensor = _launch(x, weight, cos, sin, heads, float(eps))
    return rotated


def check_turned_norm(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Check activations `[S,B,T,D]`, the norm's weight `[S,D]`, and the tables `[T,d/2]` of angles.

    Raises:
        ValueError: shapes disagree, heads do not divide D into even parts, or a table requires a gradient.
        TypeError: a dtype is not floating.
    """
    check_norm(x, weight)
    width = x.shape[3]
    if heads < 1 or width % (2 * heads):
        raise ValueError(f"heads: expected a divisor of D = {width} that leaves an even d, got {heads}")
    check_floating(cos=cos, sin=sin)
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape(name, table, ("T", "d/2"))
        check_match(name, table, (x.shape[2], width // heads // 2), "x", x)
        if table.requires_grad:
            raise ValueError(f"{name}: expected a constant table, got one that requires a gradient; detach() it")


def _kernel(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    x, weight = readable_by_kernel(x, weight)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    out = _output(x, heads)
    backends.call(
        "qk_norm_rope",
        x.device,
        *(tensor.data_ptr() for tensor in (x, weight, cos, sin, out)),
        *type_codes(x, weight),
        *x.shape[:3],
        *out.shape[2:],
        *x.stride()[:3],
        eps,
    )
    return out


def _output(x: Tensor, heads: int) -> Tensor:
    streams, batch, tokens, width = x.shape
    return x.new_empty(batch, streams * tokens, heads, width // heads)


def _reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    return reference_qk_norm_rope(x, weight, cos, sin, heads, eps).contiguous()


def _fake(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    return _output(x, heads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, cos, sin, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight, cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, cos, sin = ctx.saved_tensors
    if has_kernel("qk_norm_rope_grad", x):
        grad_x, grad_weight = _launch_grad(grad, x, weight, cos, sin, ctx.eps)
    else:
        grad_x, grad_weight = _grad_reference(grad, x, weight, cos, sin, ctx.eps)
    return grad_x, grad_weight, None, None, None, None


def _grad_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x, _ = readable_by_kernel(x, weight)
    grad = grad.contiguous()
    scale, cos, sin = (tensor.float().contiguous() for tensor in (weight, cos, sin))
    if not gradient_fits(grad.shape[3], x, grad, scale, cos, sin):
        return _grad_reference(grad, x, weight, cos, sin, eps)
    grad_x, partial = x.new_empty(x.shape), partial_sums(x)
    backends.call(
        "qk_norm_rope_grad",
        x.device,
        *(tensor.data_ptr() for tensor in (grad, x, scale, cos, sin, grad_x, partial)),
        backends.DTYPE_CODES[x.dtype],
        *x.shape[:3],
        *grad.shape[2:],
        *x.stride()[:3],
        partial.shape[0],
        eps,
    )
    return grad_x, partial.sum(0).to(weight.dtype)


def _grad_reference(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    normed = rotate_grad(grad.to(compute_dtype(x)), cos, sin, x.shape[0])
    grad_x, grad_weight = rms_norm_grad(normed, x, weight, eps)
    return grad_x.contiguous(), grad_weight


def _grad_fake(grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_launch_grad = backends.register(
    "qk_norm_rope_grad",
    "(Tensor grad, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
    kernel=_grad_kernel,
    reference=_grad_reference,
    fake=_grad_fake,
    dtypes=backends.SINGLE_AND_HALF,
    reference_backward=True,
)
_launch = backends.register(
    "qk_norm_rope",
    "(Tensor x, Tensor weight, Tensor cos, Tensor sin, SymInt heads, float eps) -> Tensor",
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    dtypes=backends.SINGLE_AND_HALF,
)
