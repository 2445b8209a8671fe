"""An ONNX file as a torch module, so that a metric written for the PyTorch model rates the file itself."""

from __future__ import annotations

from typing import Any

import torch


class OnnxModule(torch.nn.Module):
    """Runs `session` on positional or keyword tensors; a fixed batch size is fed in pieces of that size."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.eval()

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        values = self.session.get_inputs()
        feed = {value.name: tensor for value, tensor in zip(values, args, strict=False)} | kwargs
        count = len(next(iter(feed.values())))
        fixed = values[0].shape[0]
        size = fixed if isinstance(fixed, int) else count
        if count % size:
            raise ValueError(f"{count} samples do not divide into the file's fixed batches of {size}")
        pieces = [
            self.session.run(None, {name: tensor[i : i + size].numpy() for name, tensor in feed.items()})
            for i in range(0, count, size)
        ]
        outputs = [torch.cat([torch.from_numpy(piece[k]) for piece in pieces]) for k in range(len(pieces[0]))]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
