"""Which implementation of an op runs, and how a tensor reaches it.

Three implementations of every op give the same answer: `reference` (plain torch, the specification), `cpu` and
`cuda` (compiled, float32; some ops take half precision too). `auto` takes the kernel of the device that the tensors
are on, and the reference where no kernel can run: no compiled module, a dtype that the kernel does not take, a GPU that
the module was not compiled for. A choice made by name is met or is an error.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

Backend: TypeAlias = Literal["auto", "reference", "cpu", "cuda"]
BACKENDS: tuple[str, ...] = get_args(Backend)
BACKEND_VARIABLE = "U4D_BACKEND"
FLOAT32 = (torch.float32,)
# How a kernel that takes several dtypes is told which; the same numbers as in csrc/kernels/common/half_types.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SINGLE_AND_HALF = tuple(DTYPE_CODES)
PORTABLE_FROM = (8, 0)  # compute capability that kernels without Hopper's own instructions need; csrc/CMakeLists.txt
COPY_ALIGNMENT = 16  # bytes, of addresses and strides that Hopper's copy engine takes; csrc/kernels/common/tensor_map.h


class BackendError(ValueError):
    """A backend was asked for by name and cannot run here, or is not one of `BACKENDS`."""


def _load_kernels() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("u4d_fast._kernels"), ""
    except ImportError as error:
        return None, f"u4d_fast._kernels is not usable ({error}); build it with: pip install -e ."


kernels, missing_reason = _load_kernels()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_default: str = _checked(os.environ.get(BACKEND_VARIABLE, "auto"), BACKEND_VARIABLE)


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Make `backend` what "auto" means inside a `with` block, for the whole process (not per thread).

    Raises:
        BackendError: the name is not known. A backend that cannot run raises where an op is called.
    """
    global _default
    previous, _default = _default, _checked(backend, "use_backend")
    try:
        yield
    finally:
        _default = previous


def default_backend() -> str:
    """What "auto" stands for now: the environment variable U4D_BACKEND, or the innermost `use_backend`."""
    return _default


def is_auto(backend: str) -> bool:
    """Whether the implementation of a call is ours to choose: nobody has asked for one by name."""
    return backend == "auto" and _default == "auto"


def unavailable(op: str, device_type: str, device_index: int) -> str:
    """Why no compiled kernel of `op` can run on this device; the empty string where one can."""
    known = _availability.get((op, device_type, device_index))
    if known is None:
        known = _availability[op, device_type, device_index] = _find_unavailable(op, device_type, device_index)
    return known


_availability: dict[tuple[str, str, int], str] = {}

# What torch.compiler.assume_constant_result does, without the second that importing torch._dynamo takes: machine and
# build do not change while a graph is traced.
vars(unavailable)["_dynamo_marked_constant"] = True


def _find_unavailable(op: str, device_type: str, device_index: int) -> str:
    if device_type not in ("cpu", "cuda"):
        return f"there are no kernels for device type {device_type!r}"
    if kernels is None:
        return missing_reason
    if device_type == "cpu":
        return "" if hasattr(kernels, f"{op}_cpu") else f"the compiled module has no CPU kernel of {op}"
    if kernels.cuda_arch is None:
        return "the compiled module was built without CUDA"
    if not hasattr(kernels, f"{op}_cuda"):
        return f"the compiled module has no CUDA kernel of {op}"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    capability = torch.cuda.get_device_capability(device_index)
    have = "sm_{}{}".format(*capability)
    # Code for sm_90a (with the "a") runs on compute capability 9.0 and on no other.
    if kernels.cuda_arch.rstrip("a") == have:
        return ""
    # A folder is named there; all kernels of it begin with its name.
    if any(f"{op}_".startswith(f"{folder}_") for folder in kernels.hopper_ops):
        return f"the kernel is compiled for {kernels.cuda_arch}, this GPU is {have}"
    if capability < PORTABLE_FROM:
        return "the kernel is compiled for compute capability {}.{} and newer, this GPU is {}".format(
            *PORTABLE_FROM, have
        )
    return ""


def resolve(op: str, requested: str, *tensors: Tensor, dtypes: tuple[torch.dtype, ...] = FLOAT32) -> str:
    """The implementation that a call of `op` takes: "reference", "cpu" or "cuda".

    Args:
        op: the op's name, as in `u4d_fast.<op>`.
        requested: the op's `backend` argument.
        tensors: every tensor of the call; all on one device. Those of integers may have any dtype.
        dtypes: what the kernels take. Every floating tensor must have one of them; they may differ, so that float32
            tables can stand beside bfloat16 activations.
    Raises:
        BackendError: a backend was asked for by name and cannot run these tensors.
        ValueError: the tensors are on different devices.
    """
    asked = _default if requested == "auto" else requested
    first = tensors[0].device
    for tensor in tensors:
        if tensor.device != first:
            raise ValueError(f"{op}: expected all tensors on one device, got {first} and {tensor.device}")
    if asked == "reference":
        return asked
    if asked == "auto" and first.type == "meta":
        return "meta"  # shapes alone, as the kernels give them: what is counted there is what a kernel takes
    reason = _refused_dtype(dtypes, tensors) or unavailable(op, first.type, -1 if first.index is None else first.index)
    if asked == "auto":
        return "reference" if reason else first.type
    if asked not in BACKENDS:
        raise BackendError(f"{op}: backend: expected one of {', '.join(BACKENDS)}, got {asked!r}")
    if asked != first.type:
        raise BackendError(f"{op}: backend {asked!r} was asked for, but the tensors are on {first}")
    if reason:
        raise BackendError(f"{op}: backend {asked!r} cannot run: {reason}")
    return asked


def _refused_dtype(dtypes: tuple[torch.dtype, ...], tensors: tuple[Tensor, ...]) -> str:
    reason = ""
    for tensor in tensors:
        if tensor.dtype.is_floating_point and tensor.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            reason = f"the kernels {'compute in' if len(dtypes) == 1 else 'take'} {names}, got {tensor.dtype}"
    return reason


def call(op: str, device: torch.device, *arguments: int | float) -> None:
    """Run the compiled kernel of `op` for a device: pointers (`tensor.data_ptr()`), sizes and numbers, all positional.

    The CPU kernel gets torch's number of threads before them, the CUDA kernel the device index and the current stream.
    """
    if device.type == "cpu":
        getattr(kernels, f"{op}_cpu")(torch.get_num_threads(), *arguments)
    else:
        stream = torch.cuda.current_stream(device)
        getattr(kernels, f"{op}_cuda")(stream.device_index, stream.cuda_stream, *arguments)


def loadable(x: Tensor) -> Tensor:
    """The tensor, or a copy of it where Hopper's copy engine could not read it in place."""
    in_place = x.stride(-1) == 1 and x.data_ptr() % COPY_ALIGNMENT == 0
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        in_place = in_place and (size == 1 or (stride > 0 and stride * x.element_size() % COPY_ALIGNMENT == 0))
    return x if in_place else x.clone(memory_format=torch.contiguous_format)


_library = torch.library.Library("u4d_fast", "FRAGMENT")


def register(
    name: str,
    schema: str,
    *,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOAT32,
    reference_backward: bool = False,
) -> Callable[..., Any]:
    """Make an op known to torch as `torch.ops.u4d_fast.<name>` and return the function that runs its kernel.

    Args:
        name: the op's name.
        schema: torch's schema after the name, "(Tensor a, int n) -> Tensor"; no default values.
        kernel: allocates the outputs and runs the compiled kernel of the tensors' device. Same arguments as the schema.
        reference: the same in plain torch, for a saved program that runs where there is no kernel.
        fake: the outputs' shapes and dtypes, for tracing.
        setup_context: `(ctx, inputs, output)`, saves what `backward` needs.
        backward: `(ctx, *grads)` -> one gradient (or None) for each input. Without it the op is not differentiable and
            its results are constants.
        dtypes: what the kernel takes, as in `resolve`.
        reference_backward: where a gradient is wanted run `reference`, which torch differentiates. For an op that is
            itself a gradient: few want one of that (`create_graph=True`), and who does must not get a constant.
    Returns:
        A function with the schema's arguments. It takes the cheapest way that is right: straight to `kernel` when
        nothing is traced and no gradient is wanted, through `torch.autograd.Function` in eager mode with gradients,
        and the registered op under torch.compile and torch.export (which costs about 10 us more per call).
    """

    def implementation(*arguments: Any) -> Any:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        chosen = resolve(name, "auto", *tensors, dtypes=dtypes)
        return (reference if chosen == "reference" else kernel)(*arguments)

    _library.define(name + schema)
    _library.impl(name, implementation, "CPU")
    _library.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"u4d_fast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"u4d_fast::{name}", backward, setup_context=setup_context, lib=_library)
    registered = getattr(torch.ops.u4d_fast, name).default
    apply = None if backward is None else _autograd_function(name, kernel, setup_context, backward)

    def launch(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return registered(*arguments)
        wants_grad = False
        for argument in arguments:
            if isinstance(argument, Tensor):
                if type(argument) not in (Tensor, torch.nn.Parameter) or argument.is_meta:
                    return registered(*arguments)  # fake and meta tensors and other subclasses hold no memory
                wants_grad = wants_grad or argument.requires_grad
        if wants_grad and torch.is_grad_enabled():
            if apply is not None:
                return apply(*arguments)
            if reference_backward:
                return reference(*arguments)
        return kernel(*arguments)

    return launch


def _autograd_function(
    name: str, kernel: Callable[..., Any], setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    members = {
        "forward": staticmethod(kernel),
        "setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        "backward": staticmethod(backward),
    }
    function: Any = type(name, (torch.autograd.Function,), members)
    return cast("Callable[..., Any]", function.apply)
