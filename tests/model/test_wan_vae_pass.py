"""The VAE in large chunks against diffusers' own frame by frame, and when it steps aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from wan_vaes import relative, restless_vae, small_vae

from u4d.live_bytes import LiveBytes
from u4d.model import wan_codec, wan_vae_pass
from u4d.model.wan_codec import WanCodec
from u4d.model.wan_vae_parts import wan_vae_kept
from u4d.model.wan_vae_pass import decode_clip, encode_clip

SIZES = ((16, 24), (24, 8))
SEVERAL_CHUNKS = {"each latent frame": 1, "two or three": 20_000, "all at once": 3 * 2**28}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    """With Wan's number of blocks."""
    return restless_vae(num_res_blocks=2)


def clip_of(frames: int, size: tuple[int, int] = (16, 24), batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return 2 * torch.rand(batch, 3, frames, *size, generator=generator) - 1


def latents_of(frames: int, size: tuple[int, int] = (16, 24), batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 16, 1 + frames // 4, size[0] // 8, size[1] // 8, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limit", SEVERAL_CHUNKS.values(), ids=SEVERAL_CHUNKS)
@pytest.mark.parametrize("frames", (1, 5, 9, 13))
def test_equals_diffusers(
    vae: AutoencoderKLWan, frames: int, limit: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wan_vae_pass, "LARGEST_PICTURES", limit)
    images, latents = clip_of(frames, size), latents_of(frames, size)
    posterior, decoded = vae.encode(images).latent_dist, vae.decode(latents).sample
    assert decoded.std() > 0.1 and decoded.shape[2] == frames
    assert relative(encode_clip(vae, images), posterior.parameters) < 1e-5
    assert relative(decode_clip(vae, latents), decoded) < 1e-5


@torch.no_grad()
def test_chunks_are_as_large_as_allowed(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent frame of 16x24 makes 4 pictures of 4 channels in float32: 24,576 bytes of features in full size."""
    sizes: list[int] = []
    for name in ("encode_chunk", "decode_chunk"):
        chunk = getattr(wan_vae_pass, name)
        monkeypatch.setattr(
            wan_vae_pass, name, lambda part, x, past, chunk=chunk: (sizes.append(x.shape[1]), chunk(part, x, past))[1]
        )
    for limit, encoded, decoded in (
        (3 * 24_576 - 1, [5, 8], [2, 2]),
        (3 * 24_576, [9, 4], [3, 1]),
        (4 * 24_576, [13], [4]),
    ):
        monkeypatch.setattr(wan_vae_pass, "LARGEST_PICTURES", limit)
        encode_clip(vae, clip_of(13, batch=1))
        decode_clip(vae, latents_of(13, batch=1))
        assert sizes == encoded + decoded
        sizes.clear()


@torch.no_grad()
def test_bfloat16_is_no_less_exact(vae: AutoencoderKLWan) -> None:
    """Against float64: the error is at most that of diffusers' own, and a bit."""
    wide, half = restless_vae(num_res_blocks=2).double(), restless_vae(num_res_blocks=2).bfloat16()
    images, latents = clip_of(9).bfloat16(), latents_of(9).bfloat16()
    for truth, theirs, ours in (
        (wide.encode(images.double()).latent_dist.mean, half.encode(images).latent_dist.mean, encode_clip),
        (wide.decode(latents.double()).sample, half.decode(latents).sample, decode_clip),
    ):
        found = ours(half, images if ours is encode_clip else latents)[:, : truth.shape[1]]
        assert found.dtype == torch.bfloat16
        assert relative(found.double(), truth) < 1.15 * relative(theirs.double(), truth) < 0.1


def test_gradients_agree(vae: AutoencoderKLWan) -> None:
    """Through encoder and decoder, to the images and to every weight."""

    def gradients(code: Callable[[Tensor], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        images = clip_of(5, batch=1).requires_grad_()
        vae.zero_grad()
        moments, decoded = code(images)
        (moments.square().mean() + decoded.square().mean()).backward()
        found = {name: weight.grad for name, weight in vae.named_parameters()} | {"images": images.grad}
        assert all(grad is not None for grad in found.values())
        return {name: grad.clone() for name, grad in found.items() if grad is not None}

    def theirs(images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(images).latent_dist
        return posterior.parameters, vae.decode(posterior.mode()).sample

    def ours(images: Tensor) -> tuple[Tensor, Tensor]:
        moments = encode_clip(vae, images)
        return moments, decode_clip(vae, moments.chunk(2, dim=1)[0])

    expected, found = gradients(theirs), gradients(ours)
    vae.zero_grad()
    assert len(expected) > 100
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item(), msg=name)


@torch.no_grad()
def test_nothing_is_left_behind(vae: AutoencoderKLWan) -> None:
    """Neither in the VAE nor in memory, beside the results; inputs are not written to."""
    images, latents = clip_of(9), latents_of(9)
    given = images.clone(), latents.clone()
    before = {name: (weight.data_ptr(), weight._version) for name, weight in vae.state_dict().items()}
    kept = {name: dict(vars(module)) for name, module in vae.named_modules()}
    with LiveBytes() as counted:
        results = encode_clip(vae, images), decode_clip(vae, latents)
        assert counted.live == sum(result.nbytes for result in results)
    assert torch.equal(images, given[0]) and torch.equal(latents, given[1])
    assert before == {name: (weight.data_ptr(), weight._version) for name, weight in vae.state_dict().items()}
    assert all(vars(module).keys() == kept[name].keys() for name, module in vae.named_modules())


@torch.no_grad()
def test_memory_is_bounded() -> None:
    """The full VAE in bfloat16: longer clips and larger pictures take more chunks, not more memory."""
    with torch.device("meta"):
        vae = AutoencoderKLWan().bfloat16()

    def peaks(frames: int, height: int, width: int) -> tuple[int, int]:
        images = torch.empty(1, 3, frames, height, width, dtype=torch.bfloat16, device="meta")
        found = []
        for call in (encode_clip, decode_clip):
            given = images if call is encode_clip else images.new_empty(1, 16, 1 + frames // 4, height // 8, width // 8)
            with LiveBytes() as counted:
                result = call(vae, given)
            found.append(counted.peak - result.nbytes)
        return found[0], found[1]

    one_chunk = peaks(49, 240, 320)
    assert max(one_chunk) < 3.1e9
    assert max(peaks(97, 240, 320)) < 1.2 * max(one_chunk)
    assert max(peaks(21, 480, 832)) < 4.7e9


class Operations(TorchDispatchMode):
    """Counts the operations that make new tensors: on a GPU a launch each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("call", (encode_clip, decode_clip))
def test_a_longer_clip_takes_no_more_operations(call: Callable[..., Tensor]) -> None:
    """diffusers takes some thousand for 49 frames."""
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=4)
    counts = []
    for frames in (9, 49):
        images = torch.empty(1, 3, frames, 16, 24, device="meta")
        with Operations() as counted:
            call(vae, images if call is encode_clip else images.new_empty(1, 16, 1 + frames // 4, 2, 3))
        counts.append(counted.count)
    assert counts[0] == counts[1] < 200


def hooked(vae: AutoencoderKLWan) -> None:
    vae.decoder.conv_out.register_forward_hook(lambda *_: None)


def with_own_forward(vae: AutoencoderKLWan) -> None:
    vae.encoder.forward = vae.encoder.forward


def with_another_layer(vae: AutoencoderKLWan) -> None:
    vae.decoder.up_blocks[0].resnets[0].nonlinearity = nn.ReLU()


def with_another_kernel(vae: AutoencoderKLWan) -> None:
    vae.encoder.conv_in = WanCausalConv3d(3, 4, (5, 3, 3), padding=(2, 1, 1))


def with_a_norms_bias(vae: AutoencoderKLWan) -> None:
    vae.encoder.norm_out.bias = nn.Parameter(torch.zeros(16, 1, 1, 1))


def dropping(vae: AutoencoderKLWan) -> None:
    vae.train()
    for module in vae.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1


def partly_half(vae: AutoencoderKLWan) -> None:
    vae.decoder.norm_out.gamma = nn.Parameter(vae.decoder.norm_out.gamma.bfloat16())


def compiled(vae: AutoencoderKLWan) -> None:
    """What `mid_block.compile()` sets, without a compiler."""
    vae.decoder.mid_block._compiled_call_impl = vae.decoder.mid_block._call_impl


def tiled(vae: AutoencoderKLWan) -> None:
    vae.enable_tiling()


def moved(vae: AutoencoderKLWan) -> None:
    vae._hf_hook = object()


def with_own_decode(vae: AutoencoderKLWan) -> None:
    vae._decode = vae._decode


CHANGES: dict[Callable[[AutoencoderKLWan], None], str] = {
    hooked: "decoder.conv_out was hooked to, replaced or compiled",
    with_own_forward: "encoder was hooked to, replaced or compiled",
    compiled: "decoder.mid_block was hooked to, replaced or compiled",
    with_another_layer: "decoder.up_blocks.0.resnets.0.nonlinearity is a ReLU",
    with_another_kernel: r"encoder.conv_in has a kernel of (5, 3, 3)",
    with_a_norms_bias: "encoder.norm_out has a bias, or channels in another place",
    dropping: "encoder.down_blocks.0.dropout drops features",
    partly_half: "decoder.norm_out.gamma is of another kind, type or device than other weights",
    with_own_decode: "its encode or decode was replaced",
    moved: "accelerate moves its weights",
    tiled: "it works in tiles",
}


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_what_was_changed_runs_as_diffusers_wrote_it(
    change: Callable[[AutoencoderKLWan], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = small_vae()
    codec = WanCodec(vae)
    assert codec.kept == ""
    change(vae)
    assert codec.kept == wan_vae_kept(vae) == CHANGES[change]
    called: list[str] = []
    for name in ("encode", "decode"):
        method = getattr(AutoencoderKLWan, name)
        monkeypatch.setattr(AutoencoderKLWan, name, lambda *given, m=method, n=name: (called.append(n), m(*given))[1])
    with torch.no_grad():
        codec.decode(codec.encode(clip_of(1, batch=1).transpose(1, 2), "rgb"), "rgb", 1)
    assert called == ["encode", "decode"]


def test_autocast_and_attention_between_blocks_are_left_to_diffusers() -> None:
    vae = small_vae()
    with torch.autocast("cpu", torch.bfloat16):
        assert wan_vae_kept(vae) == "autocast is on"
    assert wan_vae_kept(vae) == ""
    assert wan_vae_kept(small_vae(attn_scales=[0.5])) == "its encoder attends between its blocks"


@torch.no_grad()
def test_ours_runs_where_nothing_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook to the VAE's forward is no change: encoding and decoding don't call it."""
    codec = WanCodec(small_vae())
    codec.vae.register_forward_pre_hook(lambda *_: pytest.fail("forward was called"))
    for name in ("encode", "decode"):
        monkeypatch.setattr(AutoencoderKLWan, name, None)
    codec.decode(codec.encode(clip_of(6, batch=1).transpose(1, 2), "rgb"), "rgb", 6)


@torch.no_grad()
def test_diffusers_own_passes_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = WanCodec(small_vae(), in_chunks=False)
    monkeypatch.setattr(wan_codec, "decode_clip", None)
    codec.decode(torch.zeros(1, 16, 1, 2, 3), "rgb", 1)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_on_a_gpu_it_is_no_less_exact_than_diffusers(dtype: torch.dtype) -> None:
    """Against float64 on the CPU, at a size where cuDNN takes its fast kernels."""
    changes: dict[str, Any] = {"base_dim": 32, "num_res_blocks": 2}
    wide, vae = restless_vae(**changes).double(), restless_vae(**changes).to("cuda", dtype)
    images, latents = (given.to(dtype) for given in (clip_of(9, (64, 64), 1), latents_of(9, (64, 64), 1)))
    truth = wide.encode(images.double()).latent_dist.mean, wide.decode(latents.double()).sample
    images, latents = images.cuda(), latents.cuda()
    with torch.backends.cudnn.flags(allow_tf32=False):
        theirs = vae.encode(images).latent_dist.mean, vae.decode(latents).sample
        ours = encode_clip(vae, images)[:, :16], decode_clip(vae, latents)
        again = encode_clip(vae, images)[:, :16], decode_clip(vae, latents)
    for exact, plain, found, second in zip(truth, theirs, ours, again, strict=True):
        assert relative(found.double().cpu(), exact) < 2 * relative(plain.double().cpu(), exact) + 1e-6
        assert relative(second, found) < 1e-6
