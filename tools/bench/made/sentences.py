"""A sentence encoder: a small BERT with mean pooling, trained to bring a function's signature and docstring together.

    pairs      (name and arguments, first paragraph of the docstring) of every documented function of the library
    words      lower case, split at underscores and capitals; the most frequent of the training pairs, others by letters
    loss       InfoNCE both ways over a batch, cosine similarity at a temperature
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from language.corpus import _SKIPPED as SKIPPED
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from made.kept import kept

LENGTH, VOCABULARY, WIDTH, LAYERS = 64, 8000, 256, 6
STEPS, BATCH, TEMPERATURE, RATE = 250, 32, 0.07, 5e-4
_HELD_OUT = 10  # every so many functions, by the hash of their name
_PAD, _FIRST = 0, 1 + 256  # after padding, a token for each byte


class SentenceEncoder(nn.Module):
    """input_ids, attention_mask: int64 [batch, length] -> unit vectors [batch, width]."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8,
            intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        shown = attention_mask[..., None].to(tokens.dtype)
        pooled = (tokens * shown).sum(1) / shown.sum(1)
        return pooled / pooled.norm(dim=-1, keepdim=True)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Pairs:
    """Texts to bring together, as ids and masks [n, 2, length]."""

    ids: Tensor

    def batch(self, rows: Tensor, side: int) -> dict[str, Tensor]:
        ids = self.ids[rows, side]
        return {"input_ids": ids, "attention_mask": (ids != _PAD).long()}


def documented(root: Path) -> list[tuple[str, str]]:
    """Return (signature, docstring) of every documented function below a folder, in the order of files and lines."""
    found = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                arguments = " ".join(each.arg for each in node.args.args if each.arg != "self")
                found.append((f"{path.stem} {node.name} {arguments}", text.split("\n\n")[0]))
    return list(dict.fromkeys(found))


def words(text: str) -> list[str]:
    """Split at underscores, capitals and whatever is no letter or digit; lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", text)]


def tokens(text: str, index: dict[str, int]) -> list[int]:
    """Return ids: of known words, else of a word's bytes; padded to LENGTH."""
    ids: list[int] = []
    for word in words(text):
        ids += [index[word]] if word in index else [1 + byte for byte in word.encode()]
    return (ids or [1])[:LENGTH] + [_PAD] * (LENGTH - len(ids or [1]))


def pairs() -> tuple[Pairs, Pairs]:
    """Return what to train on and what to judge by."""
    split: tuple[list[tuple[str, str]], list[tuple[str, str]]] = [], []
    for pair in documented(Path(sysconfig.get_path("stdlib"))):
        held_out = int.from_bytes(hashlib.sha256(pair[0].encode()).digest()[:4]) % _HELD_OUT == 0
        split[held_out].append(pair)
    counts = Counter(word for pair in split[0] for text in pair for word in words(text))
    index = {word: _FIRST + rank for rank, (word, _) in enumerate(counts.most_common(VOCABULARY - _FIRST))}
    sides = [torch.tensor([[tokens(text, index) for text in pair] for pair in part]) for part in split]
    return Pairs(sides[0]), Pairs(sides[1])


def train() -> SentenceEncoder:
    """Train with a fixed seed."""
    data, _ = pairs()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = SentenceEncoder()
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
        for _ in track(range(STEPS), "training the sentence encoder", console=Console(stderr=True)):
            rows = torch.randint(len(data.ids), (BATCH,))
            one, other = (model(**data.batch(rows, side)) for side in (0, 1))
            scores = one @ other.mT / TEMPERATURE
            target = torch.arange(BATCH)
            loss = functional.cross_entropy(scores, target) + functional.cross_entropy(scores.mT, target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def trained(folder: Path) -> SentenceEncoder:
    """The encoder, trained once."""
    decides = {"steps": STEPS, "batch": BATCH, "rate": RATE, "width": WIDTH, "layers": LAYERS, "words": VOCABULARY}
    return kept("sentences", decides, SentenceEncoder, train, folder)


@torch.no_grad()
def retrieval(model: nn.Module, count: int = 256, batch: int = 1) -> float:
    """Return the share (percent) of held-out signatures whose own docstring is the nearest of `count`."""
    _, data = pairs()
    rows = torch.arange(min(count, len(data.ids)))
    sides = []
    for side in (0, 1):
        whole = data.batch(rows, side)
        parts = [model(**{key: each[i : i + batch] for key, each in whole.items()}) for i in range(0, len(rows), batch)]
        sides.append(torch.cat(parts))
    nearest = (sides[0] @ sides[1].mT).argmax(1)
    return 100 * float((nearest == rows).float().mean())
