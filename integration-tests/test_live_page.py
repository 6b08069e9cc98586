"""The live page in a real browser, driven through Chromium's own protocol.

UI_SCREENSHOT=docs/ui.png also writes the picture that the documentation shows.
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = shutil.which("chromium")
QUESTION = "What is the capital of France?"
WIDTH, HEIGHT = 1440, 900
WAIT_S = 40.0
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


class Page:
    """One tab: its commands, and what it has complained of or asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self.complaints: list[str] = []
        self.requests: list[str] = []

    async def listen(self) -> None:
        """Take messages until the browser ends."""
        async for message in self._socket:
            body = json.loads(message.data)
            parameters = body.get("params", {})
            if "id" in body:
                self._answers.pop(body["id"]).set_result(body)
            elif body["method"] == "Log.entryAdded":
                self.complaints.append(parameters["entry"]["text"])
            elif body["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"]))
            elif body["method"] == "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])

    async def command(self, method: str, **parameters: Any) -> Any:
        """The result of a command."""
        self._last_id += 1
        answer = self._answers[self._last_id] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._last_id, "method": method, "params": parameters})
        body = await answer
        assert "error" not in body, body
        return body["result"]

    async def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        result = await self.command("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression is true; else tell what is to be seen."""
        deadline_s = time.monotonic() + WAIT_S
        while not await self.value(expression):
            if time.monotonic() > deadline_s:
                shown = await self.value("document.body.innerText")
                pytest.fail(f"never true: {expression}\n{shown}\n{self.complaints}")
            await asyncio.sleep(0.1)

    async def type(self, selector: str, text: str) -> None:
        """Type into a field, as a person does."""
        await self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        await self.command("Input.insertText", text=text)

    async def press_enter(self) -> None:
        """Press and release the key."""
        for kind in ("keyDown", "keyUp"):
            await self.command(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    async def picture(self) -> bytes:
        """A PNG of what is to be seen."""
        return base64.b64decode((await self.command("Page.captureScreenshot", format="png"))["data"])


@contextlib.contextmanager
def browser(folder: Path, width: int) -> Iterator[int]:
    """A browser without a window: the port at which it is driven."""
    command = [
        *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-background-networking", "--remote-debugging-port=0", "--remote-allow-origins=*"),
        *(f"--user-data-dir={folder}", f"--window-size={width},{HEIGHT}", "about:blank"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ports = folder / "DevToolsActivePort"
        while not (ports.exists() and ports.read_text().count("\n")):
            assert process.poll() is None, "the browser has ended"
            time.sleep(0.05)
        yield int(ports.read_text().split("\n")[0])
    finally:
        process.terminate()
        process.wait(10)


@contextlib.asynccontextmanager
async def opened(url: str, port: int, width: int) -> AsyncIterator[Page]:
    """The only tab of a browser, which has opened `url`."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (target,) = [one for one in await answer.json() if one["type"] == "page"]
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = Page(socket)
            listening = asyncio.ensure_future(page.listen())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.command(f"{domain}.enable")
            await page.command(
                "Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT, deviceScaleFactor=1, mobile=False
            )
            await page.command("Page.navigate", url=url)
            await page.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")
            yield page
            listening.cancel()


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., None]:
    """`browse(url, body)`: runs `body(page)` in a browser that has opened the page."""

    def run(url: str, body: Callable[[Page], Awaitable[None]], width: int = WIDTH) -> None:
        async def main(port: int) -> None:
            async with opened(url, port, width) as page:
                await body(page)

        with browser(tmp_path / "profile", width) as port:
            asyncio.run(main(port))

    return run


def test_it_shows_the_server_and_talks_to_the_model(tiny: Any, browse: Any) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}
    answer = tiny.post("/v1/chat/completions", body).json()
    expected, num_tokens = answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
    assert num_tokens > 1

    async def look(page: Page) -> None:
        await page.until("document.querySelector('#status').textContent === 'healthy'")
        assert await page.value("document.querySelector('#model').textContent") == tiny.get("/info").json()["model_id"]
        await page.value("document.querySelector('#temperature').value = '0'")
        await page.value("document.querySelector('#max-tokens').value = '24'")
        await page.type("#prompt", QUESTION)
        await page.press_enter()
        await page.until(f"document.querySelector('.assistant .note').textContent.startsWith('{num_tokens} tokens')")
        assert await page.value("document.querySelector('.assistant .said').textContent") == expected
        assert await page.value("document.querySelector('.user .said').textContent") == QUESTION
        assert await page.value("document.querySelector('#prompt').value") == ""
        # What it has just done is on the page: steps, and how fast tokens came.
        await page.until(f"state.steps.length >= {2 * num_tokens}")
        await page.until("[...document.querySelectorAll('.tile b')].every((tile) => tile.textContent !== '–')")
        assert await page.value("state.steps.some((step) => step[3] > 0)"), "a step with prompt tokens"
        asked = {url.removeprefix(tiny.url) for url in page.requests if url.startswith("http")}
        assert asked == {"/ui", "/ui/state", "/v1/chat/completions"}
        assert page.complaints == []

    browse(f"{tiny.url}/ui", look)


def test_what_goes_wrong_in_a_chat_is_said_and_a_new_one_can_begin(tiny: Any, browse: Any) -> None:
    async def body(page: Page) -> None:
        await page.until("state !== null")
        await page.value("document.querySelector('#max-tokens').value = '0'")
        await page.type("#prompt", QUESTION)
        await page.value("send(document.querySelector('#prompt').value)")  # the form itself would not send a 0
        await page.until("document.querySelector('.note.error') !== null")
        assert "strictly positive" in await page.value("document.querySelector('.note.error').textContent")
        await page.value("document.querySelector('#clear').click()")
        assert await page.value("document.querySelector('#messages').childElementCount") == 0

    browse(f"{tiny.url}/ui", body)


def test_an_answer_can_be_stopped(tiny: Any, browse: Any) -> None:
    async def body(page: Page) -> None:
        await page.until("state !== null")
        await page.value("document.querySelector('#max-tokens').value = '8000'")
        # Tokens chosen at random from the small model's would soon be its end of text.
        await page.value("document.querySelector('#temperature').value = '0'")
        await page.type("#prompt", "Tell me a long story.")
        await page.press_enter()
        await page.until("document.querySelector('.assistant .said').textContent.length > 5")
        await page.value("document.querySelector('#send').click()")
        await page.until("document.querySelector('.assistant .note').textContent === 'stopped'")
        assert await page.value("document.querySelector('#send').textContent") == "Send"

    browse(f"{tiny.url}/ui", body)
    tiny.wait_idle()


def test_it_asks_for_the_key(serve: Any, tiny_model: Path, browse: Any) -> None:
    async def body(page: Page) -> None:
        await page.until("!document.querySelector('#key-form').hidden")
        assert await page.value("document.querySelector('#key-error').textContent") == ""
        await page.type("#key", "wrong")
        await page.press_enter()
        await page.until("document.querySelector('#key-error').textContent.includes('does not know')")
        assert await page.value("state") is None
        await page.type("#key", "secret")
        await page.press_enter()
        await page.until("document.querySelector('#status').textContent === 'healthy'")
        assert await page.value("document.querySelector('#key-form').hidden")
        assert "secret" not in await page.value("location.href + document.cookie")

    flags = ("--model-id", str(tiny_model), "--dtype", "float32", "--api-key", "secret")
    with serve(*flags, api_key="secret") as server:
        browse(f"{server.url}/ui", body)


def test_a_narrow_window_scrolls_in_one_direction_only(tiny: Any, browse: Any) -> None:
    async def body(page: Page) -> None:
        await page.until("state !== null")
        assert await page.value("document.documentElement.scrollWidth <= window.innerWidth")

    browse(f"{tiny.url}/ui", body, width=420)


@pytest.mark.skipif("UI_SCREENSHOT" not in os.environ, reason="only to make the picture in docs/")
def test_picture(demo: Any, browse: Any) -> None:
    is_over = threading.Event()
    pictures: list[bytes] = []

    def load(number: int) -> None:
        turn = 0
        while not is_over.is_set():
            turn += 1
            text = "Once upon a time, " * (4 + (number * 7 + turn * 5) % 40)
            body = {"inputs": f"{turn} {text}", "parameters": {"max_new_tokens": 20 + (number * 31 + turn * 17) % 60}}
            demo.post("/generate", body)
            is_over.wait((number + turn) % 4 * 0.6)

    async def body(page: Page) -> None:
        await asyncio.sleep(float(os.environ.get("UI_SCREENSHOT_AFTER_S", "150")))
        await page.until("state !== null")
        await page.value("document.querySelector('#max-tokens').value = '60'")
        await page.value("document.querySelector('#temperature').value = '0'")
        await page.type("#prompt", QUESTION)
        await page.press_enter()
        await page.until("document.querySelector('.assistant .note').textContent.includes('tokens')")
        await asyncio.sleep(2)
        pictures.append(await page.picture())

    threads = [threading.Thread(target=load, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    try:
        browse(f"{demo.url}/ui", body)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    Path(os.environ["UI_SCREENSHOT"]).write_bytes(pictures[0])
