"""The command: exit codes, files, sweeps and plots."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from text_generation_launcher.benchmark.__main__ import main

HAS_MATPLOTLIB = subprocess.run([sys.executable, "-c", "import matplotlib"], capture_output=True).returncode == 0


@pytest.fixture
def requests_file(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}", "max_tokens": 3 + i % 2}) + "\n" for i in range(8)))
    return path


@pytest.fixture
def run(server, requests_file):
    def run(*arguments: str) -> int:
        return main(["--url", server.url, "--requests", str(requests_file), "--quiet", *arguments])

    return run


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_figures_and_records_are_appended(run, tmp_path, capsys):
    figures, records = tmp_path / "figures.jsonl", tmp_path / "records.jsonl"
    flags = ["--json", str(figures), "--records", str(records), "--concurrency", "2", "-n", "4"]
    assert run(*flags) == 0
    assert run(*flags, "--name", "again", "--slo-ttft-ms", "60000") == 0
    first, second = read_lines(figures)
    assert (first["name"], second["name"]) == ("some", "again")
    assert first["requests"] == 4
    assert first["goodput_req_s"] is None
    assert second["goodput_req_s"] == second["req_s"]
    assert first["client_cpu_us_per_token"] > 0
    assert [line["tokens"] for line in read_lines(records)] == [3, 4, 3, 4] * 2
    assert all(line["start_ns"] < line["first_token_ns"] <= line["end_ns"] for line in read_lines(records))
    assert "some (concurrency 2): 4 requests, 0 failed, 0 short" in capsys.readouterr().out


@pytest.mark.parametrize("act", ["refuse", "break", "error", "short", "silent"])
def test_one_bad_answer_fails_the_command(run, server, act, capsys):
    server.script[5] = act
    assert run() == 1
    assert "FAILED" in capsys.readouterr().err


def test_the_process_exits_with_the_code(server, requests_file):
    server.script[0] = "refuse"
    command = [sys.executable, "-m", "text_generation_launcher.benchmark", "--url", server.url]
    ended = subprocess.run([*command, "--requests", str(requests_file)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "first error: HTTP 429" in ended.stdout


def test_a_sweep_takes_other_requests_at_each_load_and_marks_the_knee(run, server, tmp_path, capsys):
    figures, page = tmp_path / "figures.jsonl", tmp_path / "sweep.html"
    assert run("--sweep-concurrency", "1,2,4", "-n", "4", "--json", str(figures), "--plot", str(page)) == 0
    assert [line["concurrency"] for line in read_lines(figures)] == [1, 2, 4]
    prompts = [body["prompt"] for body in server.bodies]
    assert sorted(prompts[:8]) == [f"prompt {i}" for i in range(8)]
    assert sorted(prompts[8:]) == [f"prompt {i}" for i in range(4)]
    assert "knee: concurrency " in capsys.readouterr().out
    tree = ElementTree.fromstring(
        page.read_text().removeprefix("<!DOCTYPE html>").replace('<meta charset="utf-8">', "")
    )
    drawings = tree.findall(".//{http://www.w3.org/2000/svg}svg")
    assert len(drawings) == 4
    curves = [drawing.findall("{http://www.w3.org/2000/svg}polyline") for drawing in drawings]
    assert [len(lines) for lines in curves] == [3, 3, 3, 1]
    assert all(len(line.get("points").split()) == 3 for lines in curves for line in lines)
    assert "http" not in page.read_text().replace("http://www.w3.org/2000/svg", "")


def test_a_sweep_ends_at_the_first_failure(run, server, tmp_path):
    server.script[4] = "refuse"
    figures = tmp_path / "figures.jsonl"
    assert run("--sweep-rate", "500,600,700", "-n", "4", "--json", str(figures)) == 1
    assert [line["failed"] for line in read_lines(figures)] == [0, 1]


def test_requests_are_written_and_nothing_is_sent(run, server, requests_file, tmp_path):
    assert run("--write-requests", str(tmp_path / "copy.jsonl"), "-n", "3") == 0
    assert read_lines(tmp_path / "copy.jsonl") == read_lines(requests_file)[:3]
    assert server.bodies == []


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--plot", "x.html"], "sweep"),
        (["--sweep-rate", "1", "--plot", "x.svg"], ".png or .html"),
        (["--concurrency", "0"], "above 0"),
        (["--rate", "inf"], "above 0"),
        (["--sweep-concurrency", "1,x"], "invalid"),
        (["--rate", "1", "--concurrency", "1"], "not allowed"),
        (["--requests", "/no/such/file"], "cannot be read"),
    ],
)
def test_bad_flags_end_before_anything_is_sent(run, server, flags, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*flags)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err
    assert server.bodies == []


@pytest.mark.skipif(HAS_MATPLOTLIB, reason="matplotlib is installed")
def test_png_without_matplotlib_says_what_to_install(run, server, capsys):
    with pytest.raises(SystemExit):
        run("--sweep-rate", "100,200", "--plot", "x.png")
    assert "pip install 'text-generation[benchmark]'" in capsys.readouterr().err
    assert server.bodies == []


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_png_is_drawn(run, tmp_path):
    assert run("--sweep-rate", "100,200", "--plot", str(tmp_path / "x.png")) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
