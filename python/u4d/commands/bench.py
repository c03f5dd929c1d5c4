"""`u4d bench`: what the parts of u4d reach on this machine."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from u4d.commands.arguments import add_device, torch_device, whole_number
from u4d.commands.console import Bars, format_facts, format_table, use_all_cores
from u4d.errors import UserError
from u4d.presets import PRESETS, TransformerConfig

if TYPE_CHECKING:
    from u4d.commands.attention_times import Shape, Timed
    from u4d.commands.op_cases import Sizes

SUMMARY = "measure what this machine reaches, and choose the fastest attention by it"
INTERRUPTED = "nothing was saved"
MEASURED = {
    "attention": "dense attention by every library that is here, against the GPU's peak",
    "ops": "every op's kernel, beside the same in eager torch and under torch.compile",
}
HALF = ("bfloat16", "float16")
DTYPES = (*HALF, "float32", "float64")
BACKWARD_PRODUCTS = 2.5
EPILOG = """\
examples:
  u4d bench
        lists what can be measured
  u4d bench attention
        the attention of wan-1.3b on a GPU, of tiny on a CPU
  u4d bench attention --save
        the same; from now on u4d_fast.dense_attention takes what was fastest here
  u4d bench attention --preset wan-1.3b --batch 2 --dtype float16 --json
        another shape, as JSON for other programs
  u4d bench attention --tokens 4096 --heads 24 --head-dim 64
        any shape
  u4d bench ops
        all ops at the sizes of wan-1.3b on a GPU, of tiny on a CPU
  u4d bench ops --op rms_norm --op bias_gelu --no-compile
        two of them, without the minutes that torch.compile may take

attention: the error is the relative L2 distance from attention in float64, over a sample of the queries. TFLOP/s count
the products of attention itself: 4 batch heads tokens^2 head-dim forward, 2.5 times as many backward. The peak is the
maker's figure for dense bfloat16 products.

ops: forward alone. x is how many times as long as the kernel a version takes, the error the relative L2 distance of
the kernel's result from eager torch's in the same dtype. Ops that round to 8 bits stand beside exact ones where there
are any."""
ATTENTION_ONLY = ("tokens", "heads", "head_dim", "save")
OPS_ONLY = ("op", "no_compile")


def epilog() -> str:
    """Examples, and how to read the table."""
    return EPILOG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("what", nargs="?", metavar="WHAT", help=f"what to measure: {', '.join(MEASURED)}")
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="whose shape to take (default wan-1.3b on a GPU, else tiny)"
    )
    size = whole_number(1)
    parser.add_argument("--batch", type=size, metavar="N", help="clips in one call (default 1)")
    parser.add_argument("--tokens", type=size, metavar="N", help="tokens of a clip (default the preset's)")
    parser.add_argument("--heads", type=size, metavar="N", help="attention heads (default the preset's)")
    parser.add_argument("--head-dim", type=size, metavar="N", help="channels of a head (default the preset's)")
    parser.add_argument("--dtype", choices=DTYPES, help="default bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--repeats", type=size, default=20, metavar="N", help="timed calls (default 20; fewer if they are long)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--save", action="store_true", help="keep the times for u4d_fast.dense_attention to choose by")
    parser.add_argument("--op", action="append", metavar="NAME", help="with ops: this one alone; may be repeated")
    parser.add_argument("--no-compile", action="store_true", help="with ops: leave torch.compile out")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for, or list what can be."""
    if args.what is None:
        print("u4d bench WHAT measures:\n" + format_facts([(f"  {name}", text) for name, text in MEASURED.items()]))
        return
    if args.what not in MEASURED:
        raise UserError(f"WHAT: expected one of {', '.join(MEASURED)}, got {args.what!r}")
    others, owner = (OPS_ONLY, "ops") if args.what == "attention" else (ATTENTION_ONLY, "attention")
    for name in others:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: expected it with '{owner}', got it with {args.what!r}")
    device = torch_device(args.device)
    use_all_cores()
    {"attention": bench_attention, "ops": bench_ops}[args.what](args, device)


def bench_attention(args: argparse.Namespace, device: str) -> None:
    """Measure every backend, print, and save if asked."""
    from u4d.commands.attention_times import as_json, as_measured, measure_attention
    from u4d.train.cost.peaks import peak_flops
    from u4d_fast.attention_table import save_measured

    shape = attention_shape(args, device)
    peak = peak_flops(device) if shape.dtype in HALF else None
    with Bars("backend") as bars:
        timed = measure_attention(shape, device, args.repeats, lambda name, done, total: bars("attention", done, total))
    if args.json:
        print(json.dumps(as_json(shape, timed, device, peak), indent=1))
    else:
        print(attention_report(shape, timed, device, peak))
    if args.save:
        file = save_measured(as_measured(shape, timed, device))
        if not args.json:
            print(f"saved to {file}: u4d_fast.dense_attention takes the fastest for lengths like this one")


def bench_ops(args: argparse.Namespace, device: str) -> None:
    """Measure every op, or those that were asked for, and print."""
    import torch

    from u4d.commands.op_cases import CASES
    from u4d.commands.op_times import as_json, measure_ops, report
    from u4d_fast.attention_table import device_name

    ops = args.op or list(CASES)
    for op in ops:
        if op not in CASES:
            raise UserError(f"--op: expected one of {', '.join(CASES)}, got {op!r}")
    sizes, machine = op_sizes(args, device), device_name(torch.device(device))
    with Bars("op") as bars:
        timed = measure_ops(
            ops,
            sizes,
            args.repeats,
            lambda op, done, total: bars("ops", done, total),
            compiled=not args.no_compile,
        )
    print(json.dumps(as_json(sizes, timed, machine), indent=1) if args.json else report(sizes, timed, machine))


def op_sizes(args: argparse.Namespace, device: str) -> Sizes:
    """The preset's."""
    import torch

    from u4d.commands.op_cases import Sizes

    dtype = getattr(torch, args.dtype or default_dtype(device))
    return Sizes.of(preset_config(args, device), args.batch or 1, dtype, device)


def preset_config(args: argparse.Namespace, device: str) -> TransformerConfig:
    """The sizes of the preset that was asked for, or of the device's usual one."""
    return PRESETS[args.preset or ("wan-1.3b" if device == "cuda" else "tiny")]().transformer


def default_dtype(device: str) -> str:
    """What models run in there."""
    return "bfloat16" if device == "cuda" else "float32"


def attention_shape(args: argparse.Namespace, device: str) -> Shape:
    """The preset's shape, with what was given in its place."""
    from u4d.commands.attention_times import Shape
    from u4d_fast.time_layout import latent_frames

    config = preset_config(args, device)
    tokens = 4 * latent_frames(config.num_frames) * (config.image_size[0] // 16) * (config.image_size[1] // 16)
    return Shape(
        batch=args.batch or 1,
        tokens=args.tokens or tokens,
        heads=args.heads or config.num_attention_heads,
        head_dim=args.head_dim or config.attention_head_dim,
        dtype=args.dtype or default_dtype(device),
    )


def attention_report(shape: Shape, timed: list[Timed], device: str, peak: float | None) -> str:
    """The table, and why backends are missing from it."""
    import torch

    from u4d_fast.attention_table import device_name

    name = device_name(torch.device(device))
    limit = f", {peak / 1e12:.0f} TFLOP/s at most" if peak else ""
    lines = [f"attention of {shape.words()} on {name}{limit}, torch {torch.__version__}", ""]
    measured = [one for one in timed if one.forward_ms and one.backward_ms]
    header = ["backend", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "error"]
    if peak:
        header[3:3] = header[6:6] = ["of peak"]
    lines.append(format_table([header, *(table_row(one, shape, peak) for one in measured)]))
    if measured:
        fastest = min(measured, key=lambda one: one.forward_ms or ())
        lines += ["", f"fastest forward: {fastest.backend}"]
    missing = [(f"  {one.backend}", one.reason) for one in timed if one.reason]
    if missing:
        lines += ["", "not measured:", format_facts(missing)]
    return "\n".join(lines)


def table_row(one: Timed, shape: Shape, peak: float | None) -> list[str]:
    """The cells of one backend."""
    cells = [one.backend]
    for times, work in ((one.forward_ms, shape.flops), (one.backward_ms, BACKWARD_PRODUCTS * shape.flops)):
        assert times is not None
        rate = work / (times[0] * 1e-3)
        spread = (times[2] - times[1]) / 2
        cells += [
            f"{times[0]:.3f} ± {spread:.3f}",
            f"{rate / 1e12:.3g}",
            *([f"{100 * rate / peak:.0f} %"] if peak else []),
        ]
    return [*cells, f"{one.error:.1e}"]
