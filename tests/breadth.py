"""Models of many kinds, to be written as int8 files: recurrent, two towers, several heads, video, half types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.export import Dim

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """`make` builds the model; `inputs(batch, length, seed)` its keyword inputs; a length that is fixed is ignored."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    dynamic_shapes: Any = None
    sqnr_db: float = 20.0


_BATCH, _LENGTH = Dim("batch"), Dim("length", min=2, max=64)


def _normal(**shapes: tuple[int | str, ...]) -> Callable[[int, int, int], Inputs]:
    """Normal numbers [batch, *shape], where "length" stands for the length."""

    def make(batch: int, length: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        sized = {name: [length if size == "length" else int(size) for size in shape] for name, shape in shapes.items()}
        return {name: torch.randn(batch, *shape, generator=generator) for name, shape in sized.items()}

    return make


def _half(kind: Callable[[int, int, int], Inputs], dtype: torch.dtype) -> Callable[[int, int, int], Inputs]:
    return lambda *sizes: {name: value.to(dtype) for name, value in kind(*sizes).items()}


class Recurrent(nn.Module):
    """Linear, a recurrent layer, linear. x: [batch, length, 12]."""

    def __init__(self, cell: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.before, self.cell = nn.Linear(12, 16), cell(16, 20, batch_first=True, **options)
        self.after = nn.Linear(40 if options.get("bidirectional") else 20, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.cell(torch.tanh(self.before(x)))[0])  # type: ignore[no-any-return]


class Stateful(nn.Module):
    """A recurrent layer over [length, batch, 12] that takes and returns its state [1, batch, 20]."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.after = nn.GRU(12, 20), nn.Linear(20, 7)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.cell(x.transpose(0, 1), state.transpose(0, 1).contiguous())
        return self.after(y).transpose(0, 1), state.transpose(0, 1)


class TwoTowers(nn.Module):
    """The cosine of two encoders of one or of two sets of weights. Each input: [batch, 24]."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 16))
        self.right = self.left if shared else nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16))

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(self.left(query), self.right(document))


class Detector(nn.Module):
    """Features of two scales, classes and boxes of each, as a dict of lists. image: [batch, 3, 32, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU())
        self.classes, self.boxes = nn.Conv2d(16, 6, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor) -> dict[str, Any]:
        fine = self.stem(image)
        coarse = self.down(fine)
        fine = fine + nn.functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
        scales = (fine, coarse)
        return {
            "classes": [torch.sigmoid(self.classes(each)).flatten(2) for each in scales],
            "boxes": [self.boxes(each).flatten(2).exp() for each in scales],
        }


class Video(nn.Module):
    """Convolutions over time and space. frames: [batch, 3, 4, 12, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(8, 16, (1, 3, 3), stride=(2, 1, 1)), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
            nn.Linear(16, 5),
        )  # fmt: skip

    def forward(self, frames: Tensor) -> Tensor:
        return self.body(frames)  # type: ignore[no-any-return]


class Half(nn.Module):
    """A checkpoint of two bytes a number. x: [batch, 24]."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(24, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 8)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


class HalfConvolution(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def _whisper_encoder() -> nn.Module:
    import transformers as hf

    config = hf.WhisperConfig(
        num_mel_bins=16, d_model=48, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=96,
        max_source_positions=20, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=67,
        pad_token_id=2, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return zoo.redraw(hf.WhisperModel(config).encoder, 1, 1.2)


_SEQUENCE = {"x": {0: _BATCH, 1: _LENGTH}}
KINDS: dict[str, Kind] = {
    "lstm": Kind(lambda: Recurrent(nn.LSTM), _normal(x=("length", 12))),
    "lstm_deep_both_ways": Kind(
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), _normal(x=("length", 12))
    ),
    "gru": Kind(lambda: Recurrent(nn.GRU), _normal(x=("length", 12))),
    "gru_stateful": Kind(Stateful, _normal(x=(6, 12), state=(1, 20))),
    "whisper_encoder": Kind(_whisper_encoder, _normal(input_features=(16, 40))),
    "two_towers": Kind(
        lambda: TwoTowers(False), _normal(query=(24,), document=(24,)), {"query": {0: _BATCH}, "document": {0: _BATCH}}
    ),
    "one_tower_twice": Kind(
        lambda: TwoTowers(True), _normal(query=(24,), document=(24,)), {"query": {0: _BATCH}, "document": {0: _BATCH}}
    ),
    "detector": Kind(Detector, _normal(image=(3, 32, 32)), {"image": {0: _BATCH}}),
    "video": Kind(Video, _normal(frames=(3, 4, 12, 12)), {"frames": {0: _BATCH}}),
    "bfloat16": Kind(lambda: Half(torch.bfloat16), _half(_normal(x=(24,)), torch.bfloat16), {"x": {0: _BATCH}}),
    "float16": Kind(lambda: Half(torch.float16), _half(_normal(x=(24,)), torch.float16), {"x": {0: _BATCH}}),
    "float16_convolution": Kind(
        lambda: HalfConvolution(torch.float16), _half(_normal(x=(3, 12, 12)), torch.float16), {"x": {0: _BATCH}}
    ),
}
