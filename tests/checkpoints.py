"""Comparing what was loaded, and what refusing to load says."""

import jax
import numpy as np
import pytest

import models
from models.checkpoint import parameters_of

CONFIG = models.OPTConfig("tiny", layers=2, hidden=35, heads=5, intermediate=53, vocab=97, positions=41)


def fails(path, match, **options):
    """Loading must fail in one line."""
    with pytest.raises(models.CheckpointError, match=match) as raised:
        models.load(path, **options)
    assert "\n" not in str(raised.value)


def equal(model, expected):
    """Whether two models have the same parameters, dtypes included."""
    parameters, expected = jax.device_get((parameters_of(model), parameters_of(expected)))
    return parameters.keys() == expected.keys() and all(
        parameters[name].dtype == value.dtype and np.array_equal(parameters[name], value)
        for name, value in expected.items()
    )
