"""What we ship: the wheel holds our five packages, the commands, and nothing that should not be there."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    for name in files:
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_it_holds_our_packages_and_no_tests(wheel):
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    roots = {name.split("/")[0] for name in names}
    packages = {"proto", "router", "shard", "kernels", "launcher"}
    assert roots == {f"text_generation_{package}" for package in packages}
    assert not [name for name in names if "test" in Path(name).name]
    assert "text_generation_proto/shard.proto" in names


def test_it_has_the_commands(wheel):
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(entry_points).decode()
    for command in ("text-generation-launcher", "text-generation-router", "text-generation-server"):
        assert f"{command} = " in text


def test_no_file_names_an_unsafe_loader(wheel):
    for name in wheel.namelist():
        if name.endswith(".py"):
            text = wheel.read(name).decode()
            for word in ("pickle", "torch.load", "torch.save", "allow_pickle"):
                assert word not in text, f"{name} names {word}"
