"""Names of the original release, against diffusers' own conversion."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

from convert.original_files import original_name, original_vae_name
from u4d.convert.original_names import PREFIX, diffusers_name, is_original


def full_size_names() -> list[str]:
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=30, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960)
    return list(model.state_dict())


@pytest.mark.parametrize("prefix", ("", PREFIX))
def test_every_name_is_the_one_that_diffusers_gives_it(prefix: str) -> None:
    names = [prefix + original_name(name) for name in full_size_names()]
    assert len(set(names)) == len(names) == 825 and is_original(set(names))
    for name in names:
        (expected,) = convert_wan_transformer_to_diffusers({name: None})
        assert diffusers_name(name) == expected
    assert {diffusers_name(name) for name in names} == set(full_size_names())


def test_names_of_other_models_have_no_translation() -> None:
    others = ("img_emb.proj.0.weight", "blocks.0.cross_attn.k_img.weight", "vace_blocks.0.after_proj.weight")
    for name in (*others, "blocks.0.norm1.weight", "blocks.x.norm3.weight", "head.bias", ""):
        assert diffusers_name(name) is None, name
    assert not is_original(set(full_size_names()))


def test_the_tests_own_vae_names_are_the_releases() -> None:
    with torch.device("meta"):
        names = list(AutoencoderKLWan().state_dict())
    originals = {original_vae_name(name): name for name in names}
    assert convert_wan_vae_to_diffusers(dict(originals)) == {name: name for name in names}
    assert {"encoder.conv1.weight", "decoder.middle.0.residual.0.gamma", "conv2.bias"} <= set(originals)
