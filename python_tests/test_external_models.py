"""Models of torchvision, timm and transformers, where they are installed: units are blocks, chains the models."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import nn

from chains import assert_same, images
from layerwise import split

pytestmark = pytest.mark.usefixtures("one_thread")


def need(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision's extension has to match torch's build
        pytest.skip(f"{name} cannot be imported: {error}")


def numbered(pattern: str, *counts: int) -> list[str]:
    """Names with a stage and a block of it."""
    return [pattern.format(stage, block) for stage, count in enumerate(counts, 1) for block in range(count)]


# Constructor: options, side of the image, units.
TORCHVISION = {
    "resnet18": ({}, 32, ["conv1", *numbered("layer{}.{}", 2, 2, 2, 2)]),
    "mobilenet_v2": ({}, 32, [f"features.{i}" for i in range(19)]),
    "mobilenet_v3_small": ({}, 32, [*(f"features.{i}" for i in range(13)), "classifier.0"]),
    "efficientnet_b0": (
        {},
        32,
        ["features.0", "features.1.0", *numbered("features.{}.{}", 0, 2, 2, 3, 3, 4), "features.7.0", "features.8"],
    ),
    "efficientnet_v2_s": ({}, 32, ["features.0", *numbered("features.{}.{}", 2, 4, 4, 6, 9, 15), "features.7"]),
    "shufflenet_v2_x0_5": ({}, 32, ["conv1", *numbered("stage{}.{}", 0, 4, 8, 4), "conv5"]),
    "squeezenet1_1": ({}, 32, None),
    "regnet_y_400mf": (
        {},
        32,
        ["stem", *(f"trunk_output.block{s}.block{s}-{b}" for s, n in enumerate([1, 3, 6, 6], 1) for b in range(n))],
    ),
    "googlenet": (
        {"init_weights": False},
        32,
        ["conv1", "conv2", "conv3", "inception3a", "inception3b", "inception4a"],
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    models = need("torchvision").models
    options, size, units = TORCHVISION[name]
    torch.manual_seed(0)
    check(getattr(models, name)(num_classes=10, **options), size, units)


def check(model: nn.Module, size: int, units: list[str] | None) -> None:
    example = images(2, 3, size)
    chain = split(model, example=example)
    assert units is None or chain.names == units
    assert_same(model, chain, example)


def test_vgg():
    vgg = need("torchvision.models.vgg")
    model = vgg.VGG(vgg.make_layers(vgg.cfgs["B"], batch_norm=True), num_classes=10, init_weights=False)
    chain = split(model)
    assert chain.names[:10] == [f"features.{i}" for i in (0, 3, 7, 10, 14, 17, 21, 24, 28, 31)]
    assert chain.names[10:] == ["classifier.0", "classifier.3"]
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Flatten(), nn.Linear(512, 10))
    check(model, 32, chain.names[:10])


def test_densenet():
    model = need("torchvision").models.DenseNet(4, (2, 3), 8, num_classes=10)
    check(model, 32, ["features.conv0", "features.denseblock1", "features.transition1", "features.denseblock2"])


def test_transformers():
    models = need("torchvision").models
    vit = models.VisionTransformer(image_size=16, patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16)
    check(vit, 16, ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(3))])
    for block in ("SwinTransformerBlock", "SwinTransformerBlockV2"):
        swin = models.swin_transformer
        model = swin.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=8,
            depths=[1, 2],
            num_heads=[2, 2],
            window_size=[2, 2],
            stochastic_depth_prob=0.5,
            block=getattr(swin, block),
            downsample_layer=swin.PatchMergingV2 if block.endswith("V2") else swin.PatchMerging,
        )
        check(model, 32, ["features.0", "features.1.0", "features.2", "features.3.0", "features.3.1"])


def test_convnext():
    models = need("torchvision").models
    setting = [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 2)]
    model = models.ConvNeXt(setting, stochastic_depth_prob=0.5, num_classes=10)
    check(model, 32, ["features.0", "features.1.0", "features.2.1", "features.3.0", "features.3.1"])


TIMM = {
    "resnet18": ({}, 32, ["conv1", *numbered("layer{}.{}", 2, 2, 2, 2)]),
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 3}, 32, ["patch_embed", *(f"blocks.{i}" for i in range(3))]),
    "convnext_atto": (
        {},
        32,
        [
            "stem",
            *("stages.0.blocks.0", "stages.0.blocks.1"),
            *("stages.1.downsample", "stages.1.blocks.1"),
            *("stages.2.downsample", *(f"stages.2.blocks.{i}" for i in range(1, 6))),
            *("stages.3.downsample", "stages.3.blocks.1"),
        ],
    ),
    "tf_efficientnetv2_b0": (
        {},
        32,
        ["conv_stem", "blocks.0", *(f"blocks.{s}.{b}" for s, n in enumerate([2, 2, 3, 5, 8], 1) for b in range(n))],
    ),
    "mobilevit_xxs": (
        {},
        64,
        ["stem", "stages.0", *(f"stages.{s}.{b}" for s, n in enumerate([3, 2, 2, 2], 1) for b in range(n))],
    ),
    "regnety_002": ({}, 32, None),
    "densenet121": ({}, 32, ["features.conv0", *(f"features.denseblock{i}.denselayer1" for i in range(1, 5))]),
    "swin_tiny_patch4_window7_224": ({"depths": (1, 2), "num_heads": (2, 2), "embed_dim": 8}, 224, None),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = need("timm")
    options, size, units = TIMM[name]
    torch.manual_seed(0)
    dropped = {"drop_path_rate": 0.3} if name.startswith(("resnet", "vit", "convnext", "tf_")) else {}
    check(timm.create_model(name, num_classes=10, **dropped, **options), size, units)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = {**SMALL, "vocab_size": 100, "pad_token_id": 0}
IMAGES = {**SMALL, "image_size": 32, "patch_size": 8}

# Class: options, units. All of them look at shapes and types: there is an example.
TRANSFORMERS = {
    "BertForSequenceClassification": (
        WORDS,
        ["bert.embeddings.word_embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler"],
    ),
    "DistilBertForSequenceClassification": (
        {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        [
            "distilbert.embeddings.word_embeddings",
            "distilbert.transformer.layer.0",
            "distilbert.transformer.layer.1",
            "pre_classifier",
        ],
    ),
    "LlamaForCausalLM": (
        {**WORDS, "tie_word_embeddings": False},
        ["model.embed_tokens", "model.layers.0", "model.layers.1"],
    ),
    "GPT2LMHeadModel": (
        {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False},
        ["transformer.wte", "transformer.h.0", "transformer.h.1"],
    ),
    "ViTForImageClassification": (IMAGES, ["vit.embeddings", "vit.layers.0", "vit.layers.1"]),
    "SwinForImageClassification": (
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        [
            "swin.embeddings",
            "swin.encoder.layers.0.blocks.0",
            "swin.encoder.layers.0.downsample",
            "swin.encoder.layers.1.blocks.0",
        ],
    ),
    "ResNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
        [
            "resnet.embedder",
            "resnet.encoder.stages.0.layers.0",
            *(f"resnet.encoder.stages.1.layers.{i}" for i in range(2)),
        ],
    ),
}


class Scores(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, **({"use_cache": False} if hasattr(self.model.config, "use_cache") else {})).logits


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_hugging_face(name):
    transformers = need("transformers")
    options, units = TRANSFORMERS[name]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = Scores(kind(kind.config_class(**options))).eval()
    x = images(2, size=32) if "Image" in name else torch.randint(1, 100, (2, 16))
    chain = split(model, example=x)
    assert chain.names == [f"model.{unit}" for unit in units]
    assert_same(model, chain, x)
    assert_same(model, chain, torch.cat([x, x[:1]]))
