"""The bundled configurations against published figures, and folders read like them."""

import inspect
import json
import subprocess
import sys

import diffusers
import pytest
import torch

from heterostep import configs
from heterostep.errors import HeterostepError
from small_ltx2 import small_ltx2
from small_wan import small_wan

# Parameters, heads, their dimension, layers. Where names (1.3B, 14B, 5B, 19B) are too coarse, the sizes of files
# tell: in 16 bits Wan T2V 14B has 28.6 GB, I2V and FLF2V 32.8, VACE 4.31 and 34.7, LTX-2.3's transformer 37.99; in 32
# bits the two of Wan 2.2 T2V fill 117.5 GiB with encoder and VAE, and TI2V 31.9.
TRANSFORMERS = {
    "wan2.1-t2v-1.3b": (1.42e9, 12, 128, 30),
    "wan2.1-t2v-14b": (14.29e9, 40, 128, 40),
    "wan2.1-i2v-14b-480p": (16.4e9, 40, 128, 40),
    "wan2.1-i2v-14b-720p": (16.4e9, 40, 128, 40),
    "wan2.1-flf2v-14b-720p": (16.4e9, 40, 128, 40),
    "wan2.1-vace-1.3b": (2.155e9, 12, 128, 30),
    "wan2.1-vace-14b": (17.35e9, 40, 128, 40),
    "wan2.2-t2v-a14b": (14.29e9, 40, 128, 40),
    "wan2.2-i2v-a14b": (14.29e9, 40, 128, 40),
    "wan2.2-ti2v-5b": (5.0e9, 24, 128, 30),
    "ltx-2": (18.9e9, 32, 128, 48),
    "ltx-2.3": (18.99e9, 32, 128, 48),
}
# Files, in this order: 11.4 GB in 16 bits, 48.75 in 32, 1.26 in 16, 0.508 in 32, what is left of TI2V's 31.9 GiB in 32,
# 2.28 GiB in 16, 1.45 GB in 16, 12.7 in 32.
OTHER_PARTS = [
    ("wan2.1-t2v-1.3b", "text_encoder", 5.68e9),
    ("ltx-2", "text_encoder", 12.19e9),
    ("wan2.1-i2v-14b-480p", "image_encoder", 0.63e9),
    ("wan2.1-t2v-1.3b", "vae", 0.127e9),
    ("wan2.2-ti2v-5b", "vae", 0.705e9),
    ("ltx-2", "vae", 1.2225e9),
    ("ltx-2.3", "vae", 0.726e9),
    ("ltx-2.3", "connectors", 3.175e9),
]
# Every kind of Wan folder: without and with an image encoder, a second transformer, timesteps per token, VACE's layers.
WAN = ("wan2.1-t2v", "wan2.1-flf2v", "wan2.1-vace", "wan2.2-i2v", "wan2.2-ti2v-t2v")
LTX2 = {"ltx-2": "2.0", "ltx-2.3": "2.3"}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def save_small(row, folder):
    pipe = small_ltx2(version=LTX2[row]) if row in LTX2 else small_wan(row)
    pipe.save_pretrained(folder)
    return pipe


def refusal(model):
    """What loading it is refused with, in one line."""
    with pytest.raises(HeterostepError) as error:
        configs.load(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_bundled_names():
    assert configs.names() == tuple(sorted(TRANSFORMERS))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_have_the_published_size(name):
    parameters, heads, head_dim, layers = TRANSFORMERS[name]
    configuration = configs.load(name)
    model = configs.build(configuration.transformer)
    assert count(model) == pytest.approx(parameters, rel=0.01)
    blocks = model.blocks if name.startswith("wan") else model.transformer_blocks
    assert len(blocks) == layers
    assert (model.config.num_attention_heads, model.config.attention_head_dim) == (heads, head_dim)
    assert blocks[0].attn1.to_q.weight.shape[0] == heads * head_dim
    # The two experts of Wan 2.2's larger models are of one kind.
    assert configuration.transformer_2 == (configuration.transformer if "a14b" in name else None)


@pytest.mark.parametrize(("name", "part", "parameters"), OTHER_PARTS)
def test_other_parts_have_the_published_size(name, part, parameters):
    assert count(configs.build(configs.load(name).models()[part])) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_parts_fit_together(name):
    configuration = configs.load(name)
    transformer, vae, defaults = configuration.transformer, configuration.vae, configuration.defaults
    if name.startswith("wan"):
        latents, patches = vae["z_dim"], transformer["patch_size"]
        factors = [vae["scale_factor_temporal"], *[vae["scale_factor_spatial"]] * 2]
        # Beside the latents, image-to-video is given the image's and a mask over the four frames of a latent one.
        conditioned = configuration.pipeline == "WanImageToVideoPipeline"
        assert transformer["in_channels"] == (2 * latents + 4 if conditioned else latents)
        assert transformer["text_dim"] == configuration.text_encoder["d_model"]
        assert len(vae["latents_mean"]) == len(vae["latents_std"]) == latents
        if configuration.image_encoder is not None:
            assert transformer["image_dim"] == configuration.image_encoder["hidden_size"]
        assert (configuration.transformer_2 is None) == (configuration.pipeline_config["boundary_ratio"] is None)
    else:
        latents, patches = vae["latent_channels"], [1, 1, 1]
        factors = transformer["vae_scale_factors"]
        text = configuration.text_encoder["text_config"]
        connectors = configuration.others["connectors"]
        assert transformer["in_channels"] == latents
        assert transformer["caption_channels"] == connectors["caption_channels"] == text["hidden_size"]
        # Every layer's states and the embeddings are projected together.
        assert connectors["text_proj_in_factor"] == text["num_hidden_layers"] + 1
    assert transformer["out_channels"] == latents
    assert (defaults["num_frames"] - 1) % factors[0] == 0
    for size, factor, patch in zip(("height", "width"), factors[1:], patches[1:]):
        assert defaults[size] % (factor * patch) == 0
    assert tuple(defaults) == configs.DEFAULTS


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_classes_know_what_they_are_configured_with(name):
    # diffusers drops what it does not know, and would build something else in silence.
    configuration = configs.load(name)
    pipeline = getattr(diffusers, configuration.pipeline)
    assert configuration.models().keys() <= inspect.signature(pipeline.__init__).parameters.keys()
    for part in (configuration.scheduler, *configuration.models().values()):
        cls = configs._find_class(part["class"])
        if hasattr(cls, "from_config"):
            assert part.keys() - {"class"} <= inspect.signature(cls.__init__).parameters.keys(), part["class"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_building_takes_no_memory(dtype):
    vae = configs.load("wan2.1-t2v-1.3b").vae
    model = configs.build(vae, dtype)
    assert all(parameter.is_meta and parameter.dtype == dtype for parameter in model.parameters())
    assert configs.parameter_bytes(vae, dtype) == count(model) * dtype.itemsize


def test_shared_weights_count_once():
    encoder = configs.load("wan2.1-t2v-1.3b").text_encoder | {"num_layers": 1, "d_ff": 64, "vocab_size": 1000}
    model = configs.build(encoder)
    assert len(model.state_dict()) == len(list(model.parameters())) + 1
    assert configs.parameter_bytes(encoder) == 2 * count(model)


def test_a_name_a_hub_id_and_either_case_are_the_same():
    configuration = configs.load("wan2.2-t2v-a14b")
    for model in ("Wan2.2-T2V-A14B", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "wan-ai/wan2.2-t2v-a14b-diffusers"):
        assert configs.load(model) == configuration
    assert configuration.repository == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    assert configuration.pipeline_config == {"boundary_ratio": 0.875, "expand_timesteps": False}


def test_reading_a_bundled_configuration_imports_no_model_library():
    code = (
        "import sys; from heterostep import configs; configs.load('ltx-2')\n"
        "print('diffusers' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("row", [*WAN, *LTX2])
def test_a_folder_is_read_as_it_was_saved(row, tmp_path):
    pipe = save_small(row, tmp_path)
    configuration = configs.load(tmp_path)
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert configuration.models().keys() == models.keys()
    for name, part in configuration.models().items():
        built = configs.build(part, torch.float32)
        assert part["class"] == type(models[name]).__name__
        shapes = {key: tensor.shape for key, tensor in models[name].state_dict().items()}
        assert {key: tensor.shape for key, tensor in built.state_dict().items()} == shapes
    assert configuration.pipeline == type(pipe).__name__ and configuration.repository == str(tmp_path)
    assert configuration.scheduler["class"] == type(pipe.scheduler).__name__
    assert {name: pipe.scheduler.config[name] for name in configuration.scheduler if name != "class"} == {
        name: value for name, value in configuration.scheduler.items() if name != "class"
    }
    if row in LTX2:
        assert configuration.pipeline_config == {}
        expected = (512, 768, 121, 30, 3.0)
    else:
        options = configuration.pipeline_config
        assert options["boundary_ratio"] == pipe.config.boundary_ratio
        assert options["expand_timesteps"] == pipe.config.get("expand_timesteps", False)
        expected = (480, 832, 81, 50, 5.0)
    assert configuration.defaults == dict(zip(configs.DEFAULTS, expected))


def test_what_is_no_model_is_refused_with_the_names(tmp_path):
    for model in ("wan-3", tmp_path / "nowhere", ""):
        message = refusal(model)
        assert all(name in message for name in configs.names())


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_folders_are_refused_by_the_file(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path} has no model_index.json: give the folder of a diffusers pipeline"
    save_small("wan2.1-t2v", tmp_path)
    index, part = tmp_path / "model_index.json", tmp_path / "vae" / "config.json"
    kept, kept_part = index.read_text(), part.read_text()
    for damaged in ("", '{"_class_name": ', "[]", "{}", "\udcff"):
        index.write_bytes(damaged.encode(errors="surrogateescape"))
        assert "model_index.json is damaged" in refusal(tmp_path)
    index.write_text(kept)
    edit(index, _class_name="WanBetterPipeline")
    assert "WanBetterPipeline" in refusal(tmp_path)
    index.write_text(kept)
    edit(index, vae=[None, None])
    assert "names no vae" in refusal(tmp_path)
    index.write_text(kept)
    part.write_text(kept_part[:40])
    assert "config.json is damaged" in refusal(tmp_path)
    part.unlink()
    assert "config.json" in refusal(tmp_path)


def test_an_older_folder_says_nothing_of_the_newer_options(tmp_path):
    save_small("wan2.1-t2v", tmp_path)
    index = tmp_path / "model_index.json"
    content = json.loads(index.read_text())
    for name in ("boundary_ratio", "expand_timesteps", "transformer_2"):
        del content[name]
    index.write_text(json.dumps(content))
    configuration = configs.load(tmp_path)
    assert configuration.pipeline_config == {"boundary_ratio": None, "expand_timesteps": False}
    assert configuration.transformer_2 is None


@pytest.mark.parametrize(
    ("component", "said"),
    [
        ({"class": "WanTransformer4DModel"}, "WanTransformer4DModel"),
        ({"class": "WanTransformer3DModel", "num_layers": "many"}, "cannot build WanTransformer3DModel"),
        ({"class": "UMT5EncoderModel", "d_model": "wide"}, "cannot build UMT5EncoderModel"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(component, said):
    for attempt in (configs.build, configs.parameter_bytes):
        with pytest.raises(HeterostepError, match=said) as error:
            attempt(component)
        assert "\n" not in str(error.value)
