"""`u4d.Pipeline`: from a partly known scene to a complete one.

Data flows one way: scene -> streams -> latents -> transformer -> sampler -> latents -> streams -> scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from u4d.checkpoint import find_checkpoint, load_components, usual_dtype
from u4d.clips import Clips, join
from u4d.diffusion.flow import LATENT_CHANNELS, STREAMS
from u4d.diffusion.unipc import unipc_table
from u4d.errors import UserError
from u4d.geometry.cameras import invert_rigid
from u4d.model.codec import CELL
from u4d.model.latents import Codec, Statistics, decode_latents, encode_streams
from u4d.model.lora_folder import load_lora
from u4d.model.streams import to_clips, to_streams
from u4d.model.text import TextKeys
from u4d.model.transformer import Transformer
from u4d.model.wan_codec import as_codec
from u4d.sample.candidates import Drawn, Sampling, draw_candidates
from u4d.sample.captured import prevents_capture
from u4d.sample.clock import Clock
from u4d.sample.denoise import DEFAULT_GUIDANCE, Velocity
from u4d.sample.given import Given, hold_observed, keep_observed, lens_of, prepare
from u4d.sample.halving import plan_cuts, without_known_images
from u4d.sample.observation import Observation
from u4d.sample.report import consistency, describe, describe_search
from u4d.sample.search import CandidateScores, choose_candidate, score_candidates
from u4d.sample.window_plan import check_window
from u4d.sample.windows import complete_windows
from u4d.scene import Scene
from u4d.text_encoder import embed, encode_prompt

Progress = Callable[[str, int, int], None]
DEFAULT_STEPS = 40


class Pipeline(DiffusionPipeline):
    """Completes 4D scenes: whatever is observed is held fast, all else is denoised.

    Components are those of a diffusers folder: `transformer`, `vae` (a `TinyCodec` or Wan's `AutoencoderKLWan`),
    `scheduler`, and with text also `text_encoder` and `tokenizer`, which stay on disk until a prompt asks for them.
    `dense_steps` and `dense_guidance` are what the checkpoint recommends where all RGB is observed, and
    `camera_smoothing` (frames) where no camera is.
    """

    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]
    transformer: Transformer
    vae: ModelMixin
    text_folder: Path | None = None
    offload_device: torch.device | None = None

    def __init__(
        self,
        transformer: Transformer,
        vae: ModelMixin,
        scheduler: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        dense_steps: int = DEFAULT_STEPS,
        dense_guidance: float = DEFAULT_GUIDANCE,
        camera_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_to_config(
            dense_steps=dense_steps, dense_guidance=dense_guidance, camera_smoothing=camera_smoothing
        )
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        vae_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Pipeline:
        """Load a shipped preset ("tiny"), a folder in diffusers' layout, or a hub id.

        Args:
            name: what to load.
            device: where to run.
            dtype: of the transformer; by default float32 on a CPU for a model of less than 1 B parameters, and
                bfloat16 elsewhere.
            vae_dtype: of the VAE. float16 is faster on a GPU; bfloat16 has too few bits for depth.
            options: passed on to `DiffusionPipeline.from_pretrained`.
        Raises:
            UserError: nothing there, or a damaged checkpoint; the file is named.
        """
        source = find_checkpoint(name)
        dtype = dtype or usual_dtype(source, torch.device(device))
        on_disk = "text_encoder" not in options and (source / "text_encoder").is_dir()
        options = {"text_encoder": None, "tokenizer": None, **options}
        dtypes = {"vae": vae_dtype, "default": dtype}
        load = partial(super().from_pretrained, source, dtype=dtypes, use_safetensors=True, **options)
        placed: Pipeline = load_components(source, load).to(device)
        placed.text_folder = source if on_disk else None
        return placed

    def load_lora(self, folder: str | Path, scale: float = 1.0) -> None:
        """Add the adapters of a folder that `u4d train --lora` or peft wrote, at that strength.

        They stay beside the weights, since merging would round them away in bfloat16.

        Raises:
            UserError: see `u4d.model.lora_folder.load_lora`; the transformer is then as it was.
        """
        load_lora(self.transformer, folder, scale=scale)

    def enable_offload(self, device: torch.device | str = "cuda") -> None:
        """Keep weights on the CPU and bring each part to `device` for the time it works: never two at once.

        With 24 GB this is what makes the full-size model fit (docs/memory.md).
        """
        self.to("cpu")
        self.offload_device = torch.device(device)

    @property
    def work_device(self) -> torch.device:
        """Where tensors are and parts work."""
        return self.offload_device or self.device

    @contextmanager
    def at_work(self, part: nn.Module) -> Iterator[None]:
        """A part on the device it works on; under offload it goes back to the CPU afterwards."""
        if self.offload_device is None:
            yield
            return
        part.to(self.offload_device)
        try:
            yield
        finally:
            part.to("cpu")
            if self.offload_device.type == "cuda":
                torch.cuda.empty_cache()

    def recommended(self, observation: Observation) -> tuple[int, float]:
        """Steps and guidance that the checkpoint recommends: its `dense_` settings where all RGB is observed.

        Depth and cameras of a known video are then nearly determined, and a weak model answers best in few steps; what
        must be invented takes the sampler's full course.
        """
        if bool(observation.rgb.all()):
            return int(self.config.dense_steps), float(self.config.dense_guidance)
        return DEFAULT_STEPS, DEFAULT_GUIDANCE

    @property
    def codec(self) -> Codec:
        """The VAE as a codec of RGB and depth clips."""
        return as_codec(self.vae)

    @property
    def statistics(self) -> Statistics:
        """The checkpoint's latent statistics."""
        config = self.transformer.config
        if config.latents_mean is None or config.latents_std is None:
            raise UserError(
                "checkpoint: its transformer config holds no latents_mean and latents_std; it is not trained"
            )
        return Statistics(
            torch.tensor(config.latents_mean),
            torch.tensor(config.latents_std),
            config.reference_fov_rad,
            config.ray_basis,
        )

    @torch.no_grad()
    def complete(
        self,
        scene: Scene,
        observe: str = "rgb:all",
        steps: int = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        candidates: int = 1,
        seed: int = 0,
        prompt: str = "",
        *,
        frames: int | None = None,
        window: int | None = None,
        overlap: int | None = None,
        original_size: bool = False,
        shared_intrinsics: bool = True,
        camera_smoothing: float | None = None,
        halving: bool | Sequence[int] = False,
        capture: bool | None = None,
        progress: Progress | None = None,
    ) -> Scene:
        """Complete a scene from what is observed of it.

        Args:
            scene: N frames of any number and size; they are spread over the checkpoint's clip and resized to it,
                intrinsics following.
            observe: what is given, as in "rgb:all", "rgb:0,-1", "camera:all,rgb:0" (see `parse_observation`); indices
                are the scene's own frames.
            steps: UniPC steps.
            guidance: strength of history guidance; 1 switches it off and halves the time.
            candidates: L completions to draw; the one whose images agree best under its own geometry is returned.
            seed: reproduces the result; candidate k is the same for every L.
            prompt: description in words, for checkpoints with a text encoder.
            frames: frames of the result, when other than the scene's (up to the checkpoint's clip).
            window: complete every frame of a scene of any length, so many at a time, in one world frame and one scale;
                without it a longer scene is sampled down.
            overlap: frames that neighbouring windows share; None for the usual number (see `complete_windows`).
            original_size: return images, depth and intrinsics at the scene's own size.
            shared_intrinsics: the lens does not change during the clip.
            camera_smoothing: where no camera is observed, smooth the predicted path over so many frames; None:
                as the checkpoint recommends.
            halving: give up candidates between steps (see `plan_cuts`): True for 16 -> 4 -> 1 and the like.
            capture: run steps as a recorded CUDA graph; None: on a GPU, where nothing prevents it.
            progress: called as progress(stage, done, total).
        Returns:
            the complete scene with `report`. Observed images, depths and cameras are the input's own. Without any
            observed camera, poses are relative to the first frame; without observed depth or camera, lengths are
            relative (`scale` 1).
        Raises:
            UserError: the observation does not fit the scene, or a setting is out of range.
            CaptureError: capture was asked for and can't be had.
        """
        smoothing = float(self.config.camera_smoothing if camera_smoothing is None else camera_smoothing)
        check_settings(steps, candidates, guidance, smoothing)
        cuts = plan_cuts(candidates, steps, halving)
        if window is not None:
            config = self.transformer.config
            settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "candidates": candidates}
            settings |= {"prompt": prompt, "halving": halving, "capture": capture, "camera_smoothing": smoothing}
            return complete_windows(
                self.complete,
                scene,
                observe,
                window=window,
                overlap=check_window(window, overlap, config.num_frames, frames),
                image_size=(config.image_size[0], config.image_size[1]),
                original_size=original_size,
                seed=seed,
                progress=progress,
                shared_intrinsics=shared_intrinsics,
                **settings,
            )
        if overlap is not None:
            raise UserError(f"overlap: expected it together with window, got {overlap} alone; it is what windows share")
        clock = Clock()
        with clock.stage("prepare"):
            config = self.transformer.config
            given = prepare(scene, observe, frames, config.num_frames, tuple(config.image_size), self.work_device)
            text = self.encode_text(prompt)
            with self.at_work(self.vae):
                clean = self.encode(given)
        lens = lens_of(given.clip, given.observation) if shared_intrinsics else None

        def decoded(latents: Tensor) -> tuple[Clips, Tensor]:
            """Candidates as the user gets them, and the residuals of their cameras."""
            with self.at_work(self.vae):
                drawn, residual = self.decode(latents, given, shared_intrinsics, lens)
            return keep_observed(drawn, given, smoothing), residual

        def score(latents: Tensor) -> CandidateScores:
            with clock.stage("rank"):
                return score_candidates(*decoded(latents)[0].everything())

        with clock.stage("denoise"):
            table = unipc_table(steps, shift=self.scheduler.config.flow_shift)
            prevented = "" if self.offload_device is not None else prevents_capture(self.transformer)
            sampling = Sampling(clean, given.groups, table, guidance, seed, capture, prevented)
            tell = None if progress is None else partial(progress, "denoise")
            drawn = self.draw(sampling, text, candidates, cuts=cuts, score=score, progress=tell)
            if not bool(torch.isfinite(drawn.latents).all()):
                raise UserError(
                    f"checkpoint {self.config._name_or_path}: sampling gave values that are not finite: "
                    "its weights are damaged, or they overflow in this dtype; try float32"
                )
        with clock.stage("decode"):
            clips, residual = decoded(drawn.latents)
            rgb, depth, intrinsics, cam_to_world = clips.everything()
        with clock.stage("search"):
            scores = score_candidates(rgb, depth, intrinsics, cam_to_world)
            best = choose_candidate(scores).best
        report = {
            **describe(given),
            **{"steps": steps, "guidance": guidance, "seed": seed, "timings_s": clock.seconds},
            **{"sampler": drawn.launching, "drawn": candidates, "precision": self.transformer.precision},
            "camera_smoothing": smoothing if given.anchor is None else 0.0,
            **describe_search(scores, depth, best, drawn),
            "consistency": consistency(scores, residual, best),
        }
        result = Scene(
            rgb=rgb[best].cpu(),
            depth=depth[best].cpu(),
            intrinsics=intrinsics[best].cpu(),
            cam_to_world=cam_to_world[best].cpu(),
            caption=prompt or scene.caption,
            fps=given.fps,
            scale=given.scale,
            report=report,
        )
        return result.resized(scene.image_size) if original_size else result

    def encode_text(self, prompt: str) -> Tensor | None:
        """Embeddings `[1,T,text_dim]` of a prompt, filled up with zeros as in training; None for an empty prompt.

        Raises:
            UserError: the checkpoint has no text encoder, or it can't be loaded.
        """
        if not prompt.strip():
            return None
        length, dtype = self.transformer.config.text_length, torch.bfloat16
        if self.text_encoder is not None and self.tokenizer is not None:
            with self.at_work(self.text_encoder):
                tokens = embed(self.tokenizer, self.text_encoder, prompt, length)
        elif self.text_folder is not None:
            tokens = encode_prompt(self.text_folder, prompt, dtype, device=self.work_device, max_tokens=length)
        else:
            raise UserError("prompt: this checkpoint has no text encoder, so it takes no prompt; leave it empty")
        padded = tokens.new_zeros(1, length, tokens.shape[1])
        padded[0, : len(tokens)] = tokens
        return padded.to(self.work_device)

    def encode(self, given: Given) -> Tensor:
        """Clean latents `[1,4,16,F,h,w]` of what is observed; unobserved groups hold nothing of meaning."""
        clip = hold_observed(given.clip, given.observation)
        if given.anchor is not None and clip.cam_to_world is not None:
            relative = invert_rigid(given.anchor.double()) @ clip.cam_to_world.double()
            seen = given.observation.camera.to(clip.device)[:, None, None]
            clip = replace(clip, cam_to_world=torch.where(seen, relative, torch.eye(4).to(relative)).float())
        height, width = self.transformer.config.image_size
        if all(part is None for part in vars(clip).values()):
            shape = (1, len(STREAMS), LATENT_CHANNELS, given.groups.shape[1], height // CELL, width // CELL)
            return torch.zeros(shape, device=self.work_device)
        streams = to_streams(clip, torch.tensor([given.scale], device=clip.device), (height, width))
        return encode_streams(streams, self.codec, self.statistics)

    def draw(self, sampling: Sampling, text: Tensor | None, candidates: int, **options: Any) -> Drawn:
        """Draw candidates' latents for a prompt's embeddings; options as in `draw_candidates`."""
        keys: TextKeys | None = None
        asked: Velocity | None = None

        @contextmanager
        def model() -> Iterator[Velocity]:
            nonlocal keys, asked
            with self.at_work(self.transformer):
                keys = keys or self.transformer.text_keys(text)
                if asked is None or self.offload_device is not None:  # weights that moved: nothing recorded holds
                    asked = self.velocity(keys)
                yield asked

        return draw_candidates(sampling, model, candidates, **options)

    def velocity(self, text: TextKeys) -> Velocity:
        """The transformer in its own dtype, for one prompt."""

        def predict(latents: Tensor, times: Tensor) -> Tensor:
            velocity: Tensor = self.transformer(latents.to(self.transformer.dtype), times, text)
            return velocity

        return predict

    def decode(
        self, latents: Tensor, given: Given, shared_intrinsics: bool, lens: Tensor | None = None
    ) -> tuple[Clips, Tensor]:
        """Candidates' clips and camera residuals, decoded one by one to bound memory; `lens`: see `lens_of`.

        Images that are all observed are not decoded: the input's own take their place anyway.
        """
        parts, residuals = [], []
        num_frames, scales = given.placement.num_frames, torch.tensor([given.scale], device=latents.device)
        codec = without_known_images(self.codec, given.clip.rgb, given.observation.rgb)
        for candidate in latents.split(1):
            streams = decode_latents(candidate, codec, self.statistics, num_frames)
            clips, residual = to_clips(streams, num_frames, scales, shared_intrinsics, lens)
            parts.append(clips)
            residuals.append(residual)
        return join(parts), torch.cat(residuals)


def check_settings(steps: int, candidates: int, guidance: float, smoothing: float = 0.0) -> None:
    """Raise UserError for settings that make no sense, before any work is done."""
    for name, value in (("steps", steps), ("candidates", candidates)):
        if value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")
    if not 0 <= guidance <= 100:
        raise UserError(f"guidance: expected 0 to 100 (1 switches it off), got {guidance}")
    if not 0 <= smoothing <= 1000:
        raise UserError(f"camera_smoothing: expected 0 (none) to 1000 frames, got {smoothing}")
