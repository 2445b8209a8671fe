"""The demo's data, training, cache and metric."""

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphopt.demo
from graphopt.demo import TrainingConfig, data, task, train
from graphopt.demo.cache import cache_folder, trained, weights_path
from graphopt.demo.data import digits
from graphopt.errors import GraphoptError

TINY = TrainingConfig(channels=(4, 8), blocks=1, images=100, epochs=1, threads=1)


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`graphopt.demo.model()` trains in a moment, into a cache of its own."""
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(task, "TrainingConfig", lambda: TINY)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Counter:
    """A progress callback that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, steps: int) -> None:
        self.calls.append((done, steps))


# --- Data


def test_split_sizes() -> None:
    found = digits()
    assert found.train_images.shape == (1000, 3, 32, 32)
    assert found.test_images.shape == (797, 3, 32, 32)
    assert found.train_labels.shape == (1000,)
    assert found.test_labels.shape == (797,)
    assert found.train_images.dtype == found.test_images.dtype == torch.float32
    assert found.train_labels.dtype == found.test_labels.dtype == torch.int64


def test_split_takes_every_row_once() -> None:
    found = digits()
    assert sorted(found.train_rows.tolist() + found.test_rows.tolist()) == list(range(1797))


def test_no_test_image_among_the_training_images() -> None:
    found = digits()
    train_images = {image.numpy().tobytes() for image in found.train_images}
    test_images = {image.numpy().tobytes() for image in found.test_images}
    assert not train_images & test_images


def test_classes_are_in_proportion() -> None:
    found = digits()
    counts = torch.bincount(found.train_labels, minlength=10) / 1000
    expected = torch.bincount(found.test_labels, minlength=10) / 797
    assert torch.allclose(counts, expected, atol=0.005)


def test_images_and_labels_belong_together() -> None:
    from sklearn.datasets import load_digits

    scans, classes = load_digits(return_X_y=True)
    found = digits()
    for images, labels, rows in (
        (found.train_images, found.train_labels, found.train_rows),
        (found.test_images, found.test_labels, found.test_rows),
    ):
        assert torch.equal(labels, torch.from_numpy(classes)[rows])
        # Averaging 4x4 cells nearly undoes the interpolation, so each image correlates with its own scan.
        cells = nn.functional.avg_pool2d(images[:, :1], 4).flatten(1)
        own = torch.from_numpy(scans).float()[rows]
        similar = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(cells, own, strict=True)]
        assert min(similar) > 0.95


def test_normalised_by_the_training_images_alone() -> None:
    images = digits().train_images
    assert abs(images.mean().item()) < 1e-5
    assert abs(images.std(correction=0).item() - 1) < 1e-5
    assert abs(digits().test_images.mean().item()) > 1e-5
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


def test_data_is_the_same_when_loaded_again() -> None:
    first = digits()
    digits.cache_clear()
    torch.manual_seed(123)
    second = digits()
    assert first.train_images is not second.train_images
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_images, second.test_images)
    assert torch.equal(first.test_labels, second.test_labels)


def test_missing_scikit_learn_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits.cache_clear()
    with pytest.raises(GraphoptError, match=r"pip install 'graphopt\[demo\]'") as caught:
        digits()
    assert "\n" not in str(caught.value)


# --- Training


def test_training_is_deterministic_and_leaves_the_global_state() -> None:
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = weights_of(train(TINY, digits()))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.manual_seed(8)
    with torch.no_grad():
        second = weights_of(train(TINY, digits()))
    assert same(first, second)


def test_another_seed_gives_other_weights() -> None:
    assert not same(weights_of(train(TINY, digits())), weights_of(train(replace(TINY, seed=1), digits())))


def test_training_does_not_read_the_test_images() -> None:
    found = digits()
    blind = replace(
        found,
        test_images=torch.full_like(found.test_images, torch.nan),
        test_labels=torch.full_like(found.test_labels, -1),
    )
    assert same(weights_of(train(TINY, found)), weights_of(train(TINY, blind)))


def test_progress_counts_every_step() -> None:
    progress = Counter()
    train(TINY, digits(), progress)
    assert progress.calls == [(1, 2), (2, 2)]


def test_a_short_training_learns() -> None:
    """Guessing gives 10 %; three seeds of this configuration gave 91.6-94.7 %."""
    config = TrainingConfig(channels=(8, 16, 32), blocks=1, epochs=5, threads=1)
    assert graphopt.demo.evaluate(train(config, digits())) > 85


@pytest.mark.slow
def test_the_demo_model_is_accurate(tmp_path: Path) -> None:
    assert graphopt.demo.evaluate(trained(TrainingConfig(), folder=tmp_path)) >= 98.5


# --- Cache


def test_second_run_reads_the_cache(tmp_path: Path) -> None:
    progress = Counter()
    first = trained(TINY, progress, tmp_path)
    assert progress.calls
    progress.calls.clear()
    second = trained(TINY, progress, tmp_path)
    assert progress.calls == []
    assert same(weights_of(first), weights_of(second))
    assert not second.training
    # A folder with nothing else in it: no temporary file is left behind.
    assert list(tmp_path.iterdir()) == [weights_path(TINY, tmp_path)]


def test_what_is_read_computes_the_same(tmp_path: Path) -> None:
    images = digits().test_images[:8]
    with torch.no_grad():
        assert torch.equal(trained(TINY, folder=tmp_path)(images), trained(TINY, folder=tmp_path)(images))


def test_key_changes_with_configuration_and_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = weights_path(TINY, tmp_path)
    assert weights_path(replace(TINY, epochs=2), tmp_path) != path
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert weights_path(TINY, tmp_path) != path


def test_key_changes_with_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = weights_path(TINY, tmp_path)
    original = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda item: original(item) + ("#" if item is data else ""))
    assert weights_path(TINY, tmp_path) != path


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("GRAPHOPT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "graphopt"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("no weights at all")


def huge_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def flip_one_bit_of_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def lose_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors.pop("classifier.weight")
    save_file(tensors, path, metadata)


def weights_of_another_network(path: Path) -> None:
    other = replace(TINY, channels=(8, 8))
    trained(other, folder=path.parent)
    os.replace(weights_path(other, path.parent), path)


DAMAGES = [
    truncate,
    empty,
    text,
    huge_header,
    flip_one_bit_of_a_weight,
    lose_a_tensor,
    weights_of_another_network,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_corrupt_cache_is_trained_anew_and_replaced(damage: Callable[[Path], None], tmp_path: Path) -> None:
    good = weights_of(trained(TINY, folder=tmp_path))
    path = weights_path(TINY, tmp_path)
    damage(path)
    progress = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(weights_of(trained(TINY, progress, tmp_path)), good)
    assert progress.calls
    progress.calls.clear()
    assert same(weights_of(trained(TINY, progress, tmp_path)), good)
    assert progress.calls == []


def test_cache_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="GRAPHOPT_CACHE") as caught:
        model = trained(TINY, folder=blocked)
    assert len(caught) == 1
    assert same(weights_of(model), weights_of(trained(TINY, folder=tmp_path / "good")))
    assert blocked.read_text() == "a file where the folder should be"


def test_folder_in_place_of_the_file_is_a_warning(tmp_path: Path) -> None:
    trained(TINY, folder=tmp_path)
    path = weights_path(TINY, tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="GRAPHOPT_CACHE"):
        trained(TINY, folder=tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, steps: int) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        trained(TINY, interrupt, folder)
    assert not folder.exists()


def test_interrupted_writing_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained(TINY, folder=tmp_path)
    path = weights_path(TINY, tmp_path)
    truncate(path)
    before = path.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained(TINY, folder=tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


# --- What the demo hands to the optimizer


@pytest.mark.usefixtures("tiny_model")
def test_model_and_example_inputs() -> None:
    module, inputs = graphopt.demo.model()
    assert not module.training
    assert [tuple(item.shape) for item in inputs] == [(16, 3, 32, 32)]
    # Saved programs hold their example inputs with their whole storage.
    assert inputs[0].untyped_storage().nbytes() == inputs[0].nbytes
    assert module(*inputs).shape == (16, 10)


@pytest.mark.usefixtures("tiny_model")
def test_model_exports_with_and_without_dynamic_shapes() -> None:
    module, inputs = graphopt.demo.model()
    fixed = torch.export.export(module, inputs, strict=False)
    shapes = graphopt.demo.dynamic_shapes
    free = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    assert free.module()(inputs[0][:5]).shape == (5, 10)
    accuracy = graphopt.demo.evaluate(module)
    assert graphopt.demo.evaluate(fixed.module()) == accuracy
    assert graphopt.demo.evaluate(free.module()) == accuracy


def test_calibration_holds_training_images_only() -> None:
    found = digits()
    train_images = {image.numpy().tobytes() for image in found.train_images}
    batches = graphopt.demo.calibration()
    images = [image.numpy().tobytes() for (batch,) in batches for image in batch]
    assert len(batches) == 16
    assert all(batch.shape == (16, 3, 32, 32) for (batch,) in batches)
    assert len(set(images)) == 256
    assert set(images) <= train_images


@pytest.mark.parametrize("wrong", [0, 1, 8, 797])
def test_evaluate_counts_right_answers(wrong: int) -> None:
    found = digits()
    answers = found.test_labels.clone()
    answers[len(answers) - wrong :] = (answers[len(answers) - wrong :] + 1) % 10
    by_image = {
        image.numpy().tobytes(): int(answer) for image, answer in zip(found.test_images, answers, strict=True)
    }

    def oracle(batch: Tensor) -> Tensor:
        assert batch.shape == (16, 3, 32, 32)
        assert not torch.is_grad_enabled()
        return nn.functional.one_hot(torch.tensor([by_image[image.numpy().tobytes()] for image in batch]), 10)

    assert graphopt.demo.evaluate(oracle) == 100 * (797 - wrong) / 797
