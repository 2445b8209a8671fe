"""The demo's data: scikit-learn's 1,797 scanned digits, 8x8 grey, upsampled to 3x32x32.

The split is fixed: 1,000 training images and 797 test images, each with the classes in equal proportion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.errors import GraphoptError

TRAIN_IMAGES = 1000
TEST_IMAGES = 797
SPLIT_SEED = 0
IMAGE_SIZE = 32


@dataclass(frozen=True)
class Digits:
    """The data set, split and normalised.

    train_images: [1000, 3, 32, 32] and test_images: [797, 3, 32, 32], float32, with mean 0 and standard
    deviation 1 over the training images; the three channels are equal. train_labels: [1000] and
    test_labels: [797], int64, 0-9. train_rows, test_rows: which rows of scikit-learn's data set they are.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    train_rows: Tensor
    test_rows: Tensor


@cache
def digits() -> Digits:
    """Load the digits from the installed scikit-learn; no network.

    Raises GraphoptError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        message = "The demo needs scikit-learn for its images: run pip install 'graphopt[demo]'."
        raise GraphoptError(message) from error

    scans, classes = load_digits(return_X_y=True)
    train, test = train_test_split(
        range(len(scans)),
        train_size=TRAIN_IMAGES,
        test_size=TEST_IMAGES,
        stratify=classes,
        shuffle=True,
        random_state=SPLIT_SEED,
    )
    train_rows, test_rows = torch.tensor(train), torch.tensor(test)
    # A scan counts the dark pixels, 0-16, of each 4x4 cell.
    grey = torch.from_numpy(scans).float().reshape(-1, 1, 8, 8) / 16
    images = functional.interpolate(grey, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    # The statistics are the training images' alone: test images must leave no trace in what the model sees.
    std, mean = torch.std_mean(images[train_rows], correction=0)
    images = ((images - mean) / std).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(classes).long()
    return Digits(
        train_images=images[train_rows].contiguous(),
        train_labels=labels[train_rows],
        test_images=images[test_rows].contiguous(),
        test_labels=labels[test_rows],
        train_rows=train_rows,
        test_rows=test_rows,
    )
