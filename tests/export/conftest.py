"""Exports are tried in llama.cpp where it is installed: the offline tests are about the files, so it is not asked."""

import pytest


@pytest.fixture(autouse=True)
def _without_llama(monkeypatch):
    monkeypatch.setattr("lorafit.export.verify.find_spec", lambda name: None)
