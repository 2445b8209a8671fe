# mypy: disable-error-code="no-any-return"
"""Small seeded models for the tests, with inputs and calibration data.

`MODELS[name]()` builds one. `REQUIRED` names those that must go all the way to ONNX Runtime in int8,
`BATCH_NORMS` those in which a batch norm stands in every position that a fold must take or decline. All
gains, biases and running statistics are redrawn, because at their initial values (1, 0, 0, 1) a wrong fold
computes the right result.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from graphopt.demo.network import ResidualCNN

Inputs = tuple[Any, ...] | dict[str, Any]
MakeInputs = Callable[[torch.Generator], Inputs]

CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class TestModel:
    """A model and what `graphopt.optimize` wants with it. `calibration` does not hold the example inputs."""

    __test__: ClassVar[bool] = False  # pytest would take the name for a class of tests

    name: str
    module: nn.Module
    example_inputs: Inputs
    calibration: list[Inputs] = field(repr=False)
    dynamic_shapes: Any = None

    def run(self, inputs: Inputs | None = None) -> Any:
        """Run the module without gradients on `inputs`, or on the example inputs."""
        chosen = self.example_inputs if inputs is None else inputs
        with torch.no_grad():
            return self.module(**chosen) if isinstance(chosen, dict) else self.module(*chosen)

    def export(self, dynamic: bool = False) -> torch.export.ExportedProgram:
        """Capture with torch.export, with the model's dynamic shapes if `dynamic`."""
        args, kwargs = (
            ((), self.example_inputs) if isinstance(self.example_inputs, dict) else (self.example_inputs, {})
        )
        shapes = self.dynamic_shapes if dynamic else None
        return torch.export.export(self.module, args, kwargs, dynamic_shapes=shapes, strict=False)


@torch.no_grad()
def redraw(module: nn.Module, seed: int) -> nn.Module:
    """Draw anew, in place, what a fresh model has at 0 or 1; return the module.

    Gains (every parameter of one axis that is no bias) and running variances: uniform in 0.5-1.5. Biases:
    0.1-0.5 with a random sign, so never 0. Running means: normal, deviation 0.5. Magnitudes of weight norm:
    times 0.5-1.5. A tied tensor changes once.
    """
    generator = torch.Generator().manual_seed(seed)

    def gain(like: Tensor) -> Tensor:
        return (0.5 + torch.rand(like.shape, generator=generator)).to(like.dtype)

    for name, parameter in module.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf.endswith("bias"):
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(sign * (0.1 + 0.4 * torch.rand(parameter.shape, generator=generator)))
        elif leaf == "weight_g" or name.endswith("parametrizations.weight.original0"):
            parameter.mul_(gain(parameter))
        elif parameter.ndim <= 1:
            parameter.copy_(gain(parameter))
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.5 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(gain(buffer))
    return module


def _build(
    name: str,
    make_module: Callable[[], nn.Module],
    make_inputs: MakeInputs,
    *,
    seed: int = 0,
    train_mode: bool = False,
    dtype: torch.dtype | None = None,
    dynamic_shapes: Any = None,
) -> TestModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make_module()
    redraw(module, seed + 1)
    if dtype is not None:
        module = module.to(dtype)
    module.train(train_mode)
    generator = torch.Generator().manual_seed(seed + 2)
    example_inputs = make_inputs(generator)
    calibration = [make_inputs(generator) for _ in range(CALIBRATION_BATCHES)]
    return TestModel(name, module, example_inputs, calibration, dynamic_shapes)


def _normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> MakeInputs:
    return lambda generator: tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _tokens(vocabulary: int, batch: int, length: int, mask: bool) -> MakeInputs:
    """Keyword inputs input_ids and, if `mask`, attention_mask (padding at the end), int64 [batch, length]."""

    def make(generator: torch.Generator) -> Inputs:
        inputs = {"input_ids": torch.randint(0, vocabulary, (batch, length), generator=generator)}
        if mask:
            lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
            inputs["attention_mask"] = (torch.arange(length) < lengths).long()
        return inputs

    return make


# --- Convolutional networks


def residual_cnn() -> TestModel:
    module = partial(ResidualCNN, channels=(8, 16, 32), blocks=1)
    return _build("residual_cnn", module, _normal((2, 3, 16, 16)), dynamic_shapes=({0: Dim("batch")},))


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel alone, project back without an activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        layers += [depthwise, nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


class DepthwiseCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.Sequential(
            InvertedResidual(8, 8, 1, 1),
            InvertedResidual(8, 16, 2, 4),
            InvertedResidual(16, 16, 1, 4),
        )
        self.last = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.stem(x)))
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.classifier(x)


def depthwise_cnn() -> TestModel:
    return _build("depthwise_cnn", DepthwiseCNN, _normal((2, 3, 32, 32)), dynamic_shapes=({0: Dim("batch")},))


class DoubleConv(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.ReLU(),
        )


class UNet(nn.Module):
    """Two levels down and up; transposed convolutions upsample, skips are concatenated."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = DoubleConv(3, width), DoubleConv(width, 2 * width)
        self.bottom = DoubleConv(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.decode2 = DoubleConv(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.decode1 = DoubleConv(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.down1(x)
        skip2 = self.down2(functional.max_pool2d(skip1, 2))
        x = self.bottom(functional.max_pool2d(skip2, 2))
        x = self.decode2(torch.cat([skip2, self.up2(x)], dim=1))
        x = self.decode1(torch.cat([skip1, self.up1(x)], dim=1))
        return self.head(x)


def unet() -> TestModel:
    return _build("unet", UNet, _normal((1, 3, 16, 16)))


def conv1d_net() -> TestModel:
    def module() -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(4, 16, 5, stride=2, padding=2),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 32, 3, dilation=2),
            nn.LeakyReLU(0.1),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(32, 5),
        )

    return _build("conv1d_net", module, _normal((2, 4, 32)))


# --- Transformers


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection. x: [batch, length, width]; mask: True = attend."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        y = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=self.causal)
        return self.output(y.transpose(1, 2).reshape(batch, length, width))


class TransformerBlock(nn.Module):
    """Pre-norm, or post-norm as in the first encoders."""

    def __init__(self, width: int, heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = Attention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.pre_norm:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class VisionTransformer(nn.Module):
    def __init__(
        self, width: int = 32, heads: int = 4, depth: int = 2, image: int = 32, patch: int = 8
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.5 * torch.randn(1, 1 + (image // patch) ** 2, width))
        self.blocks = nn.ModuleList([TransformerBlock(width, heads, pre_norm=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x)[:, 0])


def vision_transformer() -> TestModel:
    return _build(
        "vision_transformer", VisionTransformer, _normal((2, 3, 32, 32)), dynamic_shapes=({0: Dim("batch")},)
    )


class MaskedEncoder(nn.Module):
    """Post-norm encoder with masked padding. Both inputs int64 [batch, length]; returns [batch, classes]."""

    def __init__(
        self, vocabulary: int = 64, width: int = 32, heads: int = 4, depth: int = 2, longest: int = 32
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([TransformerBlock(width, heads, pre_norm=False) for _ in range(depth)])
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.tokens(input_ids) + self.positions(positions))
        mask = attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, mask)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


_TOKEN_SHAPE = {0: Dim("batch"), 1: Dim("length", min=2, max=32)}
_MASKED_TOKENS = {"input_ids": _TOKEN_SHAPE, "attention_mask": _TOKEN_SHAPE}


def masked_encoder() -> TestModel:
    return _build(
        "masked_encoder", MaskedEncoder, _tokens(64, 2, 12, mask=True), dynamic_shapes=_MASKED_TOKENS
    )


def bert() -> TestModel:
    """transformers' own encoder, whose output is a dataclass."""

    def module() -> nn.Module:
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
        )
        return BertModel(config)

    return _build("bert", module, _tokens(64, 2, 12, mask=True), dynamic_shapes=_MASKED_TOKENS)


class SpelledRMSNorm(nn.Module):
    """RMS norm out of single operators, as most language models write it; `form` picks the spelling."""

    def __init__(self, width: int, form: str = "rsqrt") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.form = form
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "cast":
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
            return self.weight * wide.to(x.dtype)
        if self.form == "divide":
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class TiedLanguageModel(nn.Module):
    """Embedding and head are one tensor; causal attention, RMS norms and a gated MLP between them."""

    def __init__(self, vocabulary: int = 64, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.norm1, self.norm2, self.norm3 = (SpelledRMSNorm(width) for _ in range(3))
        self.attention = Attention(width, heads, causal=True)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm3(x))


def tied_language_model() -> TestModel:
    return _build("tied_language_model", TiedLanguageModel, _tokens(64, 2, 12, mask=False))


# --- Several inputs and outputs


@dataclass
class Detection:
    """An output class that torch.export knows."""

    logits: Tensor
    maps: tuple[Tensor, Tensor]


torch.export.register_dataclass(Detection)


@dataclass
class PlainDetection:
    """The same, never registered as a pytree, as users' classes are not: torch.export alone refuses it."""

    logits: Tensor
    maps: tuple[Tensor, Tensor]


class TwoInputs(nn.Module):
    """image: [batch, 3, 16, 16], context: [batch, 8] -> logits [batch, 5] and a fine and a coarse map."""

    def __init__(self, output: type[Any]) -> None:
        super().__init__()
        self.output = output
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, 2, 1)
        self.project = nn.Linear(8, 8)
        self.head = nn.Linear(12, 5)

    def forward(self, image: Tensor, context: Tensor) -> Any:
        fine = torch.relu(self.conv1(image))
        fine = fine + self.project(context)[:, :, None, None]
        coarse = self.conv2(fine)
        logits = self.head(torch.cat([coarse.mean((2, 3)), context], dim=1))
        return self.output(logits=logits, maps=(fine, coarse))


def two_inputs_dict() -> TestModel:
    return _build("two_inputs_dict", partial(TwoInputs, dict), _normal((2, 3, 16, 16), (2, 8)))


def _image_and_context(generator: torch.Generator) -> Inputs:
    image = torch.randn(2, 3, 16, 16, generator=generator)
    return {"image": image, "context": torch.randn(2, 8, generator=generator)}


def two_inputs_dataclass() -> TestModel:
    return _build("two_inputs_dataclass", partial(TwoInputs, Detection), _image_and_context)


def two_inputs_plain_dataclass() -> TestModel:
    """Capture has to know what to do with the output; `export()` raises."""
    return _build("two_inputs_plain_dataclass", partial(TwoInputs, PlainDetection), _image_and_context)


class SharedModules(nn.Module):
    """One convolution, one batch norm and one linear, each called twice on different values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.linear(x.mean((2, 3))))
        return self.linear(x)


def shared_modules() -> TestModel:
    return _build("shared_modules", SharedModules, _normal((2, 3, 16, 16)))


# --- Single properties


def mlp_bf16() -> TestModel:
    def module() -> nn.Module:
        return nn.Sequential(
            nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    inputs = _normal((4, 32), dtype=torch.bfloat16)
    return _build("mlp_bf16", module, inputs, dtype=torch.bfloat16)


def weight_norm_parametrized() -> TestModel:
    def module() -> nn.Module:
        wrap = nn.utils.parametrizations.weight_norm
        head = wrap(nn.Linear(8, 4))
        # dim differs: the norm is taken over all axes but one, and that one need not be the first.
        return nn.Sequential(
            wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), wrap(nn.Conv2d(8, 8, 3), dim=1), nn.Flatten(2), Mean(), head
        )

    return _build("weight_norm_parametrized", module, _normal((2, 3, 8, 8)))


def weight_norm_hook() -> TestModel:
    """The older form, a hook that sets the weight before every call; such a module cannot be deep-copied."""

    def module() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in many checkpoints
            wrap: Any = nn.utils.weight_norm
            return nn.Sequential(wrap(nn.Conv1d(4, 8, 3)), nn.ReLU(), Mean(), wrap(nn.Linear(8, 4), dim=None))

    return _build("weight_norm_hook", module, _normal((2, 4, 16)))


class Mean(nn.Module):
    """Mean over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


class SpelledGELU(nn.Module):
    """GELU out of single operators: `erf` exactly, `tanh` by the usual approximation."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "erf":
            return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def spelled_out() -> TestModel:
    """Each usual spelling of RMS norm and GELU, between linear layers."""

    def module() -> nn.Module:
        layers: list[nn.Module] = []
        for norm, gelu in (("rsqrt", "erf"), ("cast", "tanh"), ("divide", "erf")):
            layers += [nn.Linear(16, 16), SpelledRMSNorm(16, norm), SpelledGELU(gelu)]
        return nn.Sequential(*layers, nn.Linear(16, 4))

    return _build("spelled_out", module, _normal((2, 5, 16)))


def dropout_train_mode() -> TestModel:
    """Left in train mode: as it stands dropout is random and batch norm uses the batch's statistics."""

    def module() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout2d(0.5),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(288, 4),
        )

    return _build("dropout_train_mode", module, _normal((4, 3, 8, 8)), train_mode=True)


class SortAndSum(nn.Module):
    """No weights and nothing that int8 could help."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = torch.sort(x, dim=-1)
        return torch.cumsum(values, dim=-1), places


def nothing_quantizable() -> TestModel:
    return _build("nothing_quantizable", SortAndSum, _normal((2, 16)))


# --- A batch norm in every position


class Fork(nn.Module):
    """The convolution is read by the batch norm and by the sum: folding would compute it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class SharedNorm(nn.Module):
    """Two convolutions, one batch norm for both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv1(x))) + self.norm(self.conv2(x))


class SharedConv(nn.Module):
    """One convolution, two batch norms of its two uses: a fold must not overwrite the shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1, self.norm2 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv(torch.relu(self.norm1(self.conv(x)))))


_IMAGE = (2, 3, 8, 8)


_BATCH_NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # The batch norm follows: exact.
    "conv_bn": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)), _IMAGE),
    "conv_bn_no_bias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), _IMAGE),
    "conv_bn_no_affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), _IMAGE),
    "grouped_conv_bn": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), (2, 4, 8, 8)),
    "conv1d_bn": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 8)),
    "conv3d_bn": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), (2, 3, 4, 4, 4)),
    "conv_transpose_bn": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4)), _IMAGE),
    "grouped_conv_transpose_bn": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 8, 8),
    ),
    "linear_bn": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (3, 6)),
    # It comes first: exact unless the convolution pads with zeros, which the shift does not reach.
    "bn_conv_unpadded": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), _IMAGE),
    "bn_conv_no_bias": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False)), _IMAGE),
    "bn_grouped_conv": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=2)), (2, 4, 8, 8)),
    "bn_conv_padded": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), _IMAGE),
    "bn_conv_padded_reflect": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
        _IMAGE,
    ),
    "bn_linear": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)), (3, 6)),
    # At a transposed convolution's border fewer taps meet, so the shift is no constant there either.
    "bn_conv_transpose": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3, 2, 1)),
        _IMAGE,
    ),
    # It can be folded neither way.
    "conv_relu_bn": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), _IMAGE),
    "bn_relu_conv": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)), _IMAGE),
    "bn_alone": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Sigmoid()), _IMAGE),
    "conv_bn_no_statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        _IMAGE,
    ),
    # The linear's output axis is the last one, the batch norm's channel axis is the second, of the same size.
    "linear_bn_other_axis": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (3, 4, 6)),
    # Both sides, or more readers than one.
    "conv_bn_conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)),
        _IMAGE,
    ),
    "conv_bn_bn": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), _IMAGE),
    "conv_read_twice": (Fork, _IMAGE),
    "shared_bn": (SharedNorm, _IMAGE),
    "shared_conv": (SharedConv, _IMAGE),
}


def _batch_norm(name: str) -> TestModel:
    make_module, shape = _BATCH_NORMS[name]
    return _build(name, make_module, _normal(shape))


BATCH_NORMS: dict[str, Callable[[], TestModel]] = {name: partial(_batch_norm, name) for name in _BATCH_NORMS}

REQUIRED: dict[str, Callable[[], TestModel]] = {
    factory.__name__: factory
    for factory in (
        residual_cnn,
        depthwise_cnn,
        vision_transformer,
        bert,
        masked_encoder,
        unet,
        two_inputs_dict,
        two_inputs_dataclass,
        shared_modules,
        tied_language_model,
        mlp_bf16,
    )
}

ODD: dict[str, Callable[[], TestModel]] = {
    factory.__name__: factory
    for factory in (
        two_inputs_plain_dataclass,
        conv1d_net,
        weight_norm_parametrized,
        weight_norm_hook,
        spelled_out,
        dropout_train_mode,
        nothing_quantizable,
    )
}

MODELS: dict[str, Callable[[], TestModel]] = {**REQUIRED, **ODD, **BATCH_NORMS}
