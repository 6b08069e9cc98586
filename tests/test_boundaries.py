"""Who may import whom: reads every import of every package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "text_generation_proto": ROOT / "proto",
    "text_generation_router": ROOT / "router",
    "text_generation_shard": ROOT / "shard",
    "text_generation_kernels": ROOT / "kernels",
    "text_generation_launcher": ROOT / "launcher",
}
ALLOWED = {
    "text_generation_proto": set(),
    "text_generation_router": {"text_generation_proto"},
    "text_generation_shard": {"text_generation_proto", "text_generation_kernels"},
    "text_generation_kernels": set(),
    "text_generation_launcher": {"text_generation_router.config", "text_generation_shard.config"},
}
FORBIDDEN = {
    "text_generation_router": {"torch", "triton", "transformers", "safetensors"},
    "text_generation_launcher": {"torch", "triton", "transformers", "safetensors", "grpc", "aiohttp"},
    "text_generation_kernels": {"transformers", "grpc"},
    "text_generation_proto": {"torch"},
}
# A process of its own that speaks HTTP; the launcher itself stays light and never loads it.
LOAD_CLIENT = "text_generation_launcher.benchmark"
FORBIDDEN_TO_LOAD_CLIENT = FORBIDDEN["text_generation_launcher"] - {"aiohttp"}
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec"}


def sources(package: str) -> list[Path]:
    files = sorted((PACKAGES[package] / package).rglob("*.py"))
    assert files
    return files


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package):
    for path in sources(package):
        for module in imported_modules(path):
            root = module.split(".")[0]
            is_load_client = path.parent == PACKAGES["text_generation_launcher"] / LOAD_CLIENT.replace(".", "/")
            forbidden = FORBIDDEN_TO_LOAD_CLIENT if is_load_client else FORBIDDEN.get(package, set())
            assert root not in forbidden, f"{path} imports {module}"
            assert is_load_client or not module.startswith(LOAD_CLIENT), f"{path} imports {module}"
            if root in PACKAGES and root != package:
                allowed = ALLOWED[package]
                assert root in allowed or any(module.startswith(name) for name in allowed), f"{path} imports {module}"


def test_only_the_servers_touch_messages():
    for package, owners in (("text_generation_router", {"shard_client.py"}), ("text_generation_shard", {"server.py"})):
        for path in sources(package):
            if any("shard_pb2" in module for module in imported_modules(path)):
                assert path.name in owners, path


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_unsafe_is_in_the_tree(package):
    for path in sources(package):
        tree = ast.parse(path.read_text())
        assert not {module.split(".")[0] for module in imported_modules(path)} & UNSAFE_MODULES, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                function = node.func
                if isinstance(function, ast.Name):
                    assert function.id not in UNSAFE_CALLS, f"{path}:{node.lineno}"
                if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                    called = f"{function.value.id}.{function.attr}"
                    assert called not in {"torch.load", "pickle.loads", "torch.save"}, f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "module",
    ["text_generation_shard.config", "text_generation_shard.model_files", "text_generation_shard.__main__"],
)
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_router_runs_without_torch():
    code = "import sys, text_generation_router.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_transformers_imports_beside_us():
    """transformers looks for a distribution that is imported as `kernels`; our folders must not pass for it."""
    code = "import text_generation_kernels, transformers; from transformers import LlamaConfig; LlamaConfig()"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
