"""What the tests of the attention kernels on a GPU share: their tensors, and how they may be called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from group_masks import BATCH, GROUPS, MASKS, as_pairs, random_mask, random_qkv
from torch import Tensor

DIMS = (64, 128)
TILE_ROWS = 128


def random_heads(seed: int, batch: int, tokens: int, heads: int, dim: int) -> list[Tensor]:
    """q, k and v, `[B,T,heads,d]` in bfloat16."""
    return [x.cuda() for x in random_qkv(seed, torch.bfloat16, (batch, tokens, heads, dim))]


def visible_keys(q: Tensor, size: int, mask: Tensor | None) -> Tensor:
    """Which key (last) each query sees, beside q `[B,T,heads,d]`: `[B,1 or T,T]`."""
    if mask is None:
        return torch.ones(len(q), 1, q.shape[1], dtype=torch.bool, device=q.device)
    seen = (mask if mask.ndim == 3 else mask[:, None]).to(q.device).repeat_interleave(size, 2)
    return seen.repeat_interleave(size, 1) if mask.ndim == 3 else seen


def tile_maxima(error: Tensor) -> Tensor:
    """The largest error of each tile of 128 rows of a head."""
    return torch.stack([tile.abs().amax((1, 3)) for tile in error.split(TILE_ROWS, 1)], 1)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The same bits."""
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises; what was under way before is not meant."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class CallTests:
    """How each kernel may be called. A subclass in the kernel's own file says which one."""

    def make(self, seed: int, batch: int, tokens: int, heads: int, dim: int) -> list[Tensor]:
        """The kernel's tensors, `[B,T,heads,d]`."""
        return random_heads(seed, batch, tokens, heads, dim)

    def run(self, given: list[Tensor], size: int, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Its results."""
        raise NotImplementedError

    @pytest.mark.parametrize("dim", DIMS)
    def test_the_same_call_gives_the_same_bits(self, dim: int) -> None:
        given, mask = self.make(9, BATCH, GROUPS * 300, 12, dim), random_mask(1)
        expected = self.run(given, 300, mask)
        for _ in range(5):
            assert_same(self.run(given, 300, mask), expected)

    def test_runs_on_the_current_stream(self) -> None:
        given, mask = self.make(10, BATCH, GROUPS * 300, 4, 128), random_mask(2)
        expected = self.run(given, 300, mask)
        later = [torch.zeros_like(x) for x in given]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # what runs on another stream reads zeros
            for x, y in zip(later, given, strict=True):
                x.copy_(y)
            found = self.run(later, 300, mask)
        stream.synchronize()
        assert_same(found, expected)

    def test_a_captured_graph_follows_the_mask(self) -> None:
        given, mask = self.make(11, BATCH, GROUPS * 300, 2, 128), random_mask(3).cuda()
        self.run(given, 300, mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.run(given, 300, mask)
        for seed in (3, 4):
            mask.copy_(random_mask(seed))
            graph.replay()
            assert_same(found, self.run(given, 300, mask))


class ForwardTests(CallTests):
    """What each forward kernel must get right, too."""

    def check(self, given: list[Tensor], size: int, mask: Tensor | None) -> None:
        """Its results by its rule."""
        raise NotImplementedError

    @pytest.mark.parametrize("dim", DIMS)
    @pytest.mark.parametrize("size", [300, 48, 17, 1])
    @pytest.mark.parametrize("name", MASKS)
    @pytest.mark.usefixtures("outputs_start_as_nan")
    def test_every_mask_and_group_size(self, name: str, size: int, dim: int) -> None:
        self.check(self.make(1, BATCH, GROUPS * size, 2, dim), size, MASKS[name]())

    @pytest.mark.parametrize("dim", DIMS)
    @pytest.mark.usefixtures("outputs_start_as_nan")
    def test_more_tiles_than_multiprocessors(self, dim: int) -> None:
        """Each block of the persistent grid works on several tiles, some of which see nothing."""
        groups, size = 8, 300
        mask = torch.rand(3, groups, groups, generator=torch.Generator().manual_seed(3)) < 0.3
        mask[0, :4], mask[2, 7] = False, False
        self.check(self.make(3, 3, groups * size, 12, dim), size, mask)

    @pytest.mark.parametrize("factor", [0.0, 1.0, 30.0])
    def test_scores_of_any_size(self, factor: float) -> None:
        q, k, v = self.make(5, 1, 500, 2, 128)
        self.check([q * factor, k, v], 500, None)

    @pytest.mark.parametrize("dim", DIMS)
    @pytest.mark.parametrize("name", ["none", "existing", "pairs 0"])
    def test_strided_inputs(self, name: str, dim: int) -> None:
        given, mask = self.make(6, BATCH, GROUPS * 60, 2, dim), MASKS[name]()
        expected = self.run(given, 60, mask)
        q, k, v = given
        side_by_side = torch.stack((q, k), 3)
        by_head = v.transpose(1, 2).contiguous().transpose(1, 2)
        every_other = torch.stack((v, v), -1).flatten(-2)[..., ::2]  # can't be read in place
        odd_address = q.new_zeros(q.numel() + 1)[1:].view_as(q).copy_(q)
        assert_same(self.run([*side_by_side.unbind(3), by_head], 60, mask), expected)
        assert_same(self.run([odd_address, k, every_other], 60, mask), expected)
        shared = k[:1].expand(BATCH, -1, -1, -1)  # a stride of 0
        assert_same(self.run([q, shared, v], 60, mask), self.run([q, shared.clone(), v], 60, mask))

    @pytest.mark.parametrize("dim", DIMS)
    @pytest.mark.parametrize("size", [100, 300])
    @pytest.mark.parametrize("name", ["existing", "pairs 0", "pairs 1"])
    def test_what_nobody_sees_has_no_influence(self, name: str, size: int, dim: int) -> None:
        (q, k, v), mask = self.make(7, BATCH, GROUPS * size, 2, dim), MASKS[name]()
        expected = self.run([q, k, v], size, mask)
        hidden = ~as_pairs(mask).any(1).repeat_interleave(size, 1).cuda()[..., None, None]
        assert hidden.any()
        k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf)
        assert_same(self.run([q, k, v], size, mask), expected)
