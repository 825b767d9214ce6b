"""Parts of a mini VLM, each made once a session."""

from __future__ import annotations

from functools import partial

import pytest

from tests.pretrained import language_model, vision_encoder


@pytest.fixture(scope="session")
def language(tmp_path_factory):
    """name -> folder of a tiny causal language model."""
    return partial(language_model, tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="session")
def vision(tmp_path_factory):
    """name -> folder of a tiny vision encoder."""
    return partial(vision_encoder, tmp_path_factory.mktemp("vision"))
