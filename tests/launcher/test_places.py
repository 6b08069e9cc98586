"""The run folder, the sockets, and the folder the router reads the tokenizer from."""

import json
import socket
import tempfile
from pathlib import Path

import pytest
from text_generation_launcher.errors import SettingsError
from text_generation_launcher.model import tokenizer_folder
from text_generation_launcher.places import listen_for_shards, private_places


def listener_at(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_the_run_folder_is_private_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with private_places(None, 2) as places:
        assert places.run_folder.stat().st_mode & 0o777 == 0o700
        assert [path.parent for path in places.sockets] == [places.run_folder] * 2
        (places.run_folder / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_long_temporary_folder_still_gives_usable_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with private_places(None, 1) as places:
        listener_at(places.sockets[0]).close()
    assert list(deep.iterdir()) == []


def test_sockets_at_a_given_path_go_too_and_a_stale_one_does_not_count(tmp_path: Path) -> None:
    listener_at(tmp_path / "uds-0").close()  # the file stays, nobody answers
    with private_places(str(tmp_path / "uds"), 2) as places:
        assert list(places.sockets) == [tmp_path / "uds-0", tmp_path / "uds-1"]
        assert not (tmp_path / "uds-0").exists()
        with listener_at(tmp_path / "uds-1"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_unusable_socket_paths_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file-0").write_text("kept")
    with listener_at(tmp_path / "busy-0"):
        for name in ("file", "busy", "missing/uds", "x" * 120):
            with pytest.raises(SettingsError, match="--shard-uds-path"), private_places(str(tmp_path / name), 1):
                pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "busy-0"))
    assert (tmp_path / "file-0").read_text() == "kept"


def test_the_port_at_which_shards_meet_is_taken_at_once() -> None:
    with listen_for_shards("localhost", None) as listener:
        address, port = listener.getsockname()
        assert address == "127.0.0.1"
        with socket.create_connection((address, port)):
            pass
        with pytest.raises(SettingsError, match=f"--master-port {port}"):
            listen_for_shards("localhost", port)
    with listen_for_shards("localhost", port) as listener:
        assert listener.getsockname()[1] == port


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"--master-addr 192\.0\.2\.1"):
        listen_for_shards("192.0.2.1", None)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize(("own_template", "kept"), [("{{ x }}", False), (None, True)])
def test_the_users_tokenizer_config_replaces_the_models(
    model_folder: Path, tmp_path: Path, own_template: str | None, kept: bool
) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"chat_template": own_template} if own_template else {"eos_token": "x"}))
    (tmp_path / "run").mkdir()
    folder = tokenizer_folder(model_folder, own, tmp_path / "run")
    assert (folder / "tokenizer_config.json").read_text() == own.read_text()
    assert (folder / "tokenizer.json").read_text() == "tokenizer.json"
    assert (folder / "chat_template.jinja").exists() == kept


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_an_unreadable_tokenizer_config_is_refused(model_folder: Path, tmp_path: Path, text: str | None) -> None:
    own = tmp_path / "own.json"
    if text is not None:
        own.write_text(text)
    with pytest.raises(SettingsError, match="--tokenizer-config-path"):
        tokenizer_folder(model_folder, own, tmp_path)
