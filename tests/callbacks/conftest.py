"""What the tests of callbacks share."""

import sys

import pytest


@pytest.fixture
def _elsewhere(tmp_path, monkeypatch):
    """Run a command in an empty folder, as a user would who has none of our settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)
