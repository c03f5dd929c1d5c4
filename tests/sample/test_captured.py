"""The step as a function that a CUDA graph can record: no host in it, fixed buffers, a counter on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.model_samples import random_transformer
from u4d.diffusion.flow import channel_mask, draw_noise
from u4d.diffusion.unipc import UniPCState, UniPCTable, unipc_start, unipc_step, unipc_table
from u4d.sample import captured
from u4d.sample.captured import CaptureError, Denoiser, Launching, copied, prevents_capture
from u4d.sample.denoise import denoise
from u4d.sample.step import Conditions, conditions, denoising_step

FRAMES, HEIGHT, WIDTH = 3, 4, 6
SHAPE = (4, 16, FRAMES, HEIGHT, WIDTH)
SOME = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.bool)
NONE = torch.zeros_like(SOME)
# What makes the host wait for a GPU, or hands it a value: nothing of it may be in a step.
# `lift_fresh` is torch.tensor of numbers; `index` may come with a list, which is copied over each time.
HOST = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "lift_fresh", "index"}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy_velocity(latents: Tensor, times: Tensor) -> Tensor:
    """Some function of both that mixes neighbours."""
    mixed = latents + 0.3 * latents.roll(1, dims=3).sin() - 0.2 * latents.roll(1, dims=1)
    return mixed * (1 + times[:, :, None, :, None, None].to(latents)) + 0.1


def by_hand(
    velocity: Callable[[Tensor, Tensor], Tensor],
    held: Tensor,
    observed: Tensor,
    table: UniPCTable,
    noise: Tensor,
    w: float,
) -> Tensor:
    """The loop written out with numbers of the host."""
    observed = observed.expand(len(noise), 4, FRAMES)
    cells = observed[:, :, None, :, None, None]
    alive = channel_mask(dtype=noise.dtype)[None, :, :, None, None, None]
    state = unipc_start(noise * alive, table)
    for step in range(table.steps):
        times = torch.full(observed.shape, float(table.times[step]))
        latents = torch.where(cells, held, state.sample)
        answer = velocity(latents, times.masked_fill(observed, 0))
        if w != 1 and bool(observed.any()):
            blind = velocity(torch.where(cells, noise * alive, state.sample), times.masked_fill(observed, 1))
            answer = blind + w * (answer - blind)
        state = unipc_step(state, torch.where(cells, 0, answer * alive).to(noise), table, step)
    return torch.where(cells, held, state.sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("observed", [SOME, NONE])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("steps", "order"), [(1, 2), (2, 2), (3, 1), (5, 3), (12, 2)])
def test_a_step_by_the_devices_table_is_the_hosts_bit_for_bit(
    dtype: torch.dtype, observed: Tensor, guidance: float, steps: int, order: int
) -> None:
    noise = draw_noise((2, *SHAPE), seeded(1), dtype=dtype)
    held = torch.randn(2, *SHAPE, generator=seeded(2)).to(dtype)
    table = unipc_table(steps, order=order)
    wanted = by_hand(toy_velocity, held, observed, table, noise, guidance)
    found = denoise(toy_velocity, held, observed, table, noise=noise, guidance=guidance)
    assert found.dtype == dtype and torch.equal(found, wanted)


def run(denoiser: Denoiser, noise: Tensor, state: UniPCState, first: int, stop: int) -> UniPCState:
    """A copy of the state that a run ends with."""
    denoiser.run(noise, state, first, stop)
    return copied(denoiser.state)


def given_for(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int = 6) -> Conditions:
    held = torch.zeros_like(noise)
    observed = SOME.to(noise.device).expand(len(noise), 4, FRAMES)
    return conditions(velocity, held, observed, unipc_table(steps), like=noise, guidance=2.0)


def test_a_run_in_parts_is_the_run_in_one() -> None:
    """A trajectory can stop at any step, go on in other buffers, and with fewer clips."""
    noise = draw_noise((3, *SHAPE), seeded(1))
    given = given_for(toy_velocity, noise)
    start = unipc_start(noise, unipc_table(6))
    whole = run(Denoiser(given, noise), noise, start, 0, 6)
    part = Denoiser(given, noise)
    state = run(part, noise, run(part, noise, start, 0, 2), 2, 4)
    kept = slice(1, 2)
    few = given_for(toy_velocity, noise[kept])
    taken = UniPCState(state.sample[kept], state.last[kept], tuple(x[kept] for x in state.clean))
    rest = run(Denoiser(few, noise[kept]), noise[kept], taken, 4, 6)
    assert torch.equal(rest.sample, whole.sample[kept])


def test_buffers_stay_and_the_counter_drives_the_step() -> None:
    """Whatever ran before: a batch that is loaded anew gives the same, in the same memory."""
    noise = draw_noise((2, *SHAPE), seeded(1))
    denoiser = Denoiser(given_for(toy_velocity, noise), noise)
    start = unipc_start(noise, unipc_table(6))
    places = [x.data_ptr() for x in (denoiser.counter, denoiser.noise, *tree_leaves(vars(denoiser.state)))]
    first = run(denoiser, noise, start, 0, 6)
    assert denoiser.counter.tolist() == [6]
    denoiser.run(2 * noise, unipc_start(torch.full_like(noise, 1e30), unipc_table(6)), 0, 3)
    assert denoiser.counter.tolist() == [3]
    again = run(denoiser, noise, start, 0, 6)
    assert torch.equal(first.sample, again.sample) and torch.equal(first.clean[1], again.clean[1])
    assert places == [x.data_ptr() for x in (denoiser.counter, denoiser.noise, *tree_leaves(vars(denoiser.state)))]


class NoHost(TorchDispatchMode):
    """Refuses what would make the host wait, and counts the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in HOST, f"{func}: the host takes part in the step"
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("small", [False, True])
def test_the_host_takes_no_part_in_a_step(small: bool) -> None:
    noise = draw_noise((2, *SHAPE), seeded(1))
    model = random_transformer(motion_features=small, rgb_to_geometry=small)
    text = model.text_keys(None)
    denoiser = Denoiser(given_for(lambda latents, times: model(latents, times, text), noise), noise)
    denoiser.load(noise, unipc_start(noise, unipc_table(6)), 0)
    counts = []
    for _ in range(3):
        with torch.no_grad(), NoHost() as watched:
            denoiser.advance()
        counts.append(watched.count)
    assert counts[0] == counts[1] == counts[2] > 50, "every step is the same work"
    host = (
        lambda: float(noise.sum()),
        lambda: noise[:, [0, 2]],
        lambda: noise.new_tensor([1.0, 2.0]),
        lambda: noise[noise > 0],
    )
    for asks in host:
        with pytest.raises(AssertionError, match="host"), NoHost():
            asks()


class Elsewhere(TorchDispatchMode):
    """Refuses tensors of the host, and copies from and to it; numbers are arguments of a kernel and may be there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        assert all(x.device.type == "meta" for x in tensors), f"{func}: a tensor of the host in the step"
        return result


def test_nothing_of_a_step_is_made_on_the_host() -> None:
    """On another device than the host's, the meta device in place of a GPU: a copy could not be recorded."""
    model = random_transformer().to("meta")
    text = model.text_keys(None)
    noise = torch.zeros(2, *SHAPE, device="meta")
    observed = torch.zeros(2, 4, FRAMES, dtype=torch.bool, device="meta")
    given = replace(
        given_for(lambda latents, times: model(latents, times, text), torch.zeros(2, *SHAPE)),
        **{"held": noise, "observed": observed, "alive": torch.zeros(1, 4, 16, 1, 1, 1, device="meta")},
        table=torch.zeros(6, 9, device="meta"),
    )
    counter = torch.zeros(1, dtype=torch.int64, device="meta")
    with Elsewhere():
        after = denoising_step(given, counter, noise, unipc_start(noise, unipc_table(6)))
    assert given.guided and after.sample.shape == noise.shape
    with pytest.raises(AssertionError, match="host"), Elsewhere():
        noise + torch.ones(1).to("meta")


def test_on_the_cpu_steps_run_as_ever_and_capture_cannot_be_had() -> None:
    noise = draw_noise((2, *SHAPE), seeded(1))
    given = given_for(toy_velocity, noise)
    denoiser = Denoiser(given, noise)
    denoiser.run(noise, unipc_start(noise, unipc_table(6)), 0, 6)
    assert denoiser.launching == Launching(False, "it runs on the CPU")
    assert str(denoiser.launching) == "eager: it runs on the CPU" and str(Launching(True)) == "captured graph"
    with pytest.raises(CaptureError, match="it runs on the CPU"):
        Denoiser(given, noise, capture=True)
    with pytest.raises(CaptureError, match="it runs on the CPU"):
        denoise(toy_velocity, noise, SOME, unipc_table(6), noise=noise, capture=True)


class PretendGraph:
    """Stands for a CUDA graph on the CPU: what it recorded is what it does again."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work, self.replays = work, 0

    def replay(self) -> None:
        self.replays += 1
        self.work()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[PretendGraph]:
    graphs: list[PretendGraph] = []

    def record(work: Callable[[], None]) -> PretendGraph:
        graphs.append(PretendGraph(work))
        return graphs[-1]

    monkeypatch.setattr(captured, "record", record)
    monkeypatch.setattr(captured, "wait_for", lambda device: None)
    return graphs


def test_the_first_step_warms_up_the_second_is_recorded_and_batches_share_the_graph(
    pretended: list[PretendGraph],
) -> None:
    noise, table = draw_noise((2, *SHAPE), seeded(1)), unipc_table(6)
    given = given_for(toy_velocity, noise)
    wanted = run(Denoiser(given, noise), noise, unipc_start(noise, table), 0, 6)
    denoiser = Denoiser(given, noise)
    denoiser.prevented = ""  # as if there were a GPU
    found = run(denoiser, noise, unipc_start(noise, table), 0, 6)
    assert denoiser.launching == Launching(True) and torch.equal(found.sample, wanted.sample)
    assert len(pretended) == 1 and pretended[0].replays == 5
    again = run(denoiser, noise, unipc_start(noise, table), 0, 2)
    denoiser.run(noise, again, 2, 6)
    assert len(pretended) == 1 and pretended[0].replays == 11 and torch.equal(denoiser.state.sample, wanted.sample)


def test_short_runs_are_not_recorded_and_it_can_be_switched_off(pretended: list[PretendGraph]) -> None:
    noise, table = draw_noise((2, *SHAPE), seeded(1)), unipc_table(6)
    cases = ((None, 2, "fewer than 3 steps"), (True, 1, "fewer than 2 steps"), (False, 6, "switched off"))
    for capture, stop, reason in cases:
        denoiser = Denoiser(given_for(toy_velocity, noise), noise)
        denoiser.capture, denoiser.prevented = capture, ""
        denoiser.run(noise, unipc_start(noise, table), 0, stop)
        assert denoiser.launching == Launching(False, reason) and not pretended


def test_a_recording_that_fails_is_told_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(work: Callable[[], None]) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error

    monkeypatch.setattr(captured, "record", fail)
    noise, table = draw_noise((2, *SHAPE), seeded(1)), unipc_table(6)
    given = given_for(toy_velocity, noise)
    wanted = run(Denoiser(given, noise), noise, unipc_start(noise, table), 0, 6)
    denoiser = Denoiser(given, noise)
    denoiser.prevented = ""
    found = run(denoiser, noise, unipc_start(noise, table), 0, 6)
    assert torch.equal(found.sample, wanted.sample)
    assert str(denoiser.launching) == "eager: recording failed: operation not permitted when stream is capturing"
    denoiser.capture = True
    denoiser.prevented = ""
    with pytest.raises(CaptureError, match="recording the step failed: operation not permitted"):
        denoiser.run(noise, unipc_start(noise, table), 0, 6)


def test_what_prevents_capture_is_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert prevents_capture(model) == "its weights are not on a GPU"
    model[1]._hf_hook = object()
    assert prevents_capture(model) == "accelerate's hooks move its weights"


def test_progress_is_told_step_by_step() -> None:
    noise, told = draw_noise((2, *SHAPE), seeded(1)), []
    denoiser = Denoiser(given_for(toy_velocity, noise), noise)
    denoiser.run(
        noise, unipc_start(noise, unipc_table(6)), 2, 5, lambda step: told.append((step, int(denoiser.counter)))
    )
    assert told == [(2, 3), (3, 4), (4, 5)]


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_replayed_steps_are_the_eager_ones_bit_for_bit(guidance: float) -> None:
    """Without a model that splits its sums by chance, a graph launches the very same kernels."""
    table, model = unipc_table(8), random_transformer().to("cuda")
    text = model.text_keys(None)
    noise = draw_noise((2, *SHAPE), seeded(1), device="cuda")
    held = torch.randn(2, *SHAPE, generator=seeded(2)).to("cuda")

    def result(capture: bool, progress: Callable[[int, int], None] | None = None) -> Tensor:
        return denoise(
            lambda latents, times: model(latents, times, text), held, SOME, table,
            noise=noise, guidance=guidance, capture=capture, progress=progress,
        )  # fmt: skip

    wanted, told = result(False), []
    assert torch.equal(result(True), wanted)
    assert torch.equal(result(True, lambda done, total: told.append((done, total))), wanted)
    assert told == [(step + 1, 8) for step in range(8)]
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(result(True), wanted)


@pytest.mark.gpu
def test_a_graph_serves_other_batches_and_later_steps() -> None:
    noise, table = draw_noise((2, *SHAPE), seeded(1), device="cuda"), unipc_table(6)
    given = given_for(toy_velocity, noise)
    denoiser, eager = Denoiser(given, noise, capture=True), Denoiser(given, noise, capture=False)
    for batch in (noise, 2 * noise, noise.flip(0)):
        start = unipc_start(batch, table)
        halfway = run(denoiser, batch, start, 0, 3)
        found, wanted = run(denoiser, batch, halfway, 3, 6), run(eager, batch, start, 0, 6)
        assert torch.equal(found.sample, wanted.sample) and denoiser.launching == Launching(True)


@pytest.mark.gpu
def test_a_step_that_asks_the_host_is_not_recorded_and_still_right() -> None:
    noise, table = draw_noise((2, *SHAPE), seeded(1), device="cuda"), unipc_table(6)

    def velocity(latents: Tensor, times: Tensor) -> Tensor:
        return toy_velocity(latents, times) * (1 + float(times.max()))

    given = given_for(velocity, noise)
    denoiser, start = Denoiser(given, noise), unipc_start(noise, table)
    found = run(denoiser, noise, start, 0, 6)
    assert denoiser.launching is not None and "recording failed" in denoiser.launching.reason
    assert torch.equal(found.sample, run(Denoiser(given, noise, capture=False), noise, start, 0, 6).sample)
    with pytest.raises(CaptureError, match="recording"):
        Denoiser(given, noise, capture=True).run(noise, start, 0, 6)
    torch.cuda.synchronize()
    assert float(torch.ones(3, device="cuda").sum()) == 3, "the device works on"
