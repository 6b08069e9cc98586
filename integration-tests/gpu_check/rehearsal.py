"""A model small enough for a CPU: the demo's tokenizer, and a config of two thin layers."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TINY = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip


def write_tiny_model(folder: Path, environment: Mapping[str, str]) -> Path:
    """The folder of a model without weights."""
    command = [sys.executable, "-m", "text_generation_shard.model_files", "--run-folder", str(folder)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    answer = json.loads(ended.stdout)
    if "error" in answer:
        raise SystemExit(f"a rehearsal needs the demo model's tokenizer: {answer['error']}")
    path = Path(answer["model_folder"], "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | TINY))
    return path.parent
