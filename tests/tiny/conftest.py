import copy

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tersor.tiny import Linear, ReLU, Sequential, train


@pytest.fixture(scope="session")
def digits():
    """((x, y) to train on, (x, y) held out)."""
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32) / 16
    return (x[:1300], y[:1300]), (x[1300:], y[1300:])


@pytest.fixture(scope="session")
def _trained(digits):
    rng = np.random.default_rng(0)
    model = Sequential(Linear(64, 64, rng=rng), ReLU(), Linear(64, 32, rng=rng), ReLU(), Linear(32, 10, rng=rng))
    train(model, digits[0], epochs=15)
    return model


@pytest.fixture
def trained(_trained):
    """A classifier of digits, the caller's own."""
    return copy.deepcopy(_trained)
