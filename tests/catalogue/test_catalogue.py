"""The catalogue of published configurations."""

from __future__ import annotations

import pytest

from lorafit import catalogue
from lorafit.errors import ConfigError


def test_every_entry_has_a_configuration_and_says_where_it_comes_from():
    """Each file holds a model type and a source, and nothing else."""
    assert len(catalogue.names()) >= 50
    for name in catalogue.names():
        assert catalogue.find(name)["model_type"]
        assert len(catalogue.source(name)) > 20


def test_an_unknown_name_is_refused_with_the_nearest():
    """A typo names what was meant."""
    with pytest.raises(ConfigError, match=r"qwen3-8: is no model of the built-in catalogue; did you mean qwen3-8b"):
        catalogue.find("qwen3-8")
    with pytest.raises(ConfigError, match=r"it has .*llama-4-scout"):
        catalogue.find("zzzzz")


def test_what_is_handed_out_is_the_callers_own():
    """Changing a configuration changes no later one."""
    catalogue.find("qwen3-8b")["hidden_size"] = 1
    assert catalogue.find("qwen3-8b")["hidden_size"] == 4096
