"""Downloads a model from the Hugging Face Hub, or finds it in the cache."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
# Subfolders and the original files of some repositories hold the same weights once more.
IGNORED = ["*/*", "consolidated*", "adapter_*"]
# Statuses of a Hub that cannot answer now; what the cache holds is used then.
_TRY_LATER = {408, 429, *range(500, 600)}
_TRUE = ("1", "on", "true", "yes")


class HubError(ValueError):
    """The model cannot be had from the Hub; the text says why and what to do."""


@dataclass(frozen=True)
class HubSettings:
    """How to reach the Hub; None: as the Hub's library decides."""

    cache_folder: str | None = None
    token: str | None = None
    is_offline: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "HubSettings":
        """Every variable that TGI and the Hub's library know, older names included."""
        tokens = (environment.get(name) for name in ("HF_TOKEN", "HF_API_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
        return cls(
            cache_folder=environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or None,
            token=next((token.strip() for token in tokens if token and token.strip()), None),
            is_offline=environment.get("HF_HUB_OFFLINE", "").lower() in _TRUE,
        )


def download_model(model_id: str, revision: str | None, settings: HubSettings) -> tuple[Path, str]:
    """The folder with the model's files and the commit they are of; raises HubError.

    When the Hub cannot be reached, what the cache holds is used.
    """
    # The library reads this when it is first imported; without it, it tells the Hub about this machine.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not settings.is_offline:
        if _check_on_hub(model_id, revision, settings):
            return _snapshot(model_id, revision, settings, is_local=False)
        logger.warning("The Hugging Face Hub cannot be reached: looking for %s in the cache", model_id)
    return _snapshot(model_id, revision, settings, is_local=True)


def _check_on_hub(model_id: str, revision: str | None, settings: HubSettings) -> bool:
    """Look at the model's list of files before anything is downloaded; False if the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    try:
        info = HfApi(token=settings.token).model_info(model_id, revision=revision)
    except GatedRepoError as error:
        raise HubError(
            f"{model_id} is gated: ask for access on its page, then set HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        hint = "the token's account may not see it" if settings.token else "if it is private, set HF_TOKEN"
        raise HubError(f"{model_id} is neither a local path nor a model on the Hugging Face Hub ({hint})") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{model_id} has no revision {revision!r}") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code not in _TRY_LATER:
            raise HubError(f"the Hugging Face Hub refused {model_id}: {error}") from error
        return False
    except (TransportError, OSError):
        return False
    check_weight_names(model_id, [file.rfilename for file in info.siblings or ()])
    return True


def check_weight_names(model: str, names: list[str]) -> None:
    """Refuse a model whose weights are in no format that is read here."""
    if any(name.endswith(".safetensors") for name in names):
        return
    if any(name.endswith(".gguf") for name in names):
        raise HubError(f"{model} holds GGUF files only: download one of them and give its path as the model")
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise HubError(
            f"{model} has weights in PyTorch's own format only, which can run code when loaded and is not read here. "
            'Convert them once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{model}').save_pretrained('converted', safe_serialization=True)\", "
            "copy the tokenizer files beside them and serve the folder `converted`"
        )
    raise HubError(f"{model} has no *.safetensors files")


def _snapshot(model_id: str, revision: str | None, settings: HubSettings, is_local: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    if not is_local:
        logger.info("Downloading %s, unless it is in the cache", model_id)
    try:
        folder = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=settings.cache_folder,
            token=settings.token,
            local_files_only=is_local,
            allow_patterns=PATTERNS,
            ignore_patterns=IGNORED,
        )
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if settings.is_offline else "the Hugging Face Hub cannot be reached"
        raise HubError(
            f"{model_id} is no local path and not complete in the cache at revision {revision or 'main'!r}, and {why}"
        ) from error
    except (HTTPError, OSError) as error:
        raise HubError(f"downloading {model_id} failed: {error}") from error
    return Path(folder), Path(folder).name
