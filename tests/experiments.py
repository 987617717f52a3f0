"""What tests of experiments share."""

from __future__ import annotations

import pytest

from neustream import (
    ConfigError,
)
from neustream.config import load_experiment
from neustream.experiment.policies import build_policy


def policy_of(path, name, *overrides):
    return build_policy(load_experiment(path, overrides), name)


def refused(path, name, *overrides):
    with pytest.raises(ConfigError) as error:
        policy_of(path, name, *overrides)
    return str(error.value)
