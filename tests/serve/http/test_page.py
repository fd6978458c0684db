"""The page at / in a real browser: Chromium without a window, where there is one."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .server import Server, running, slow_tokens, text_of

CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium or google-chrome in PATH, or its path in CHROMIUM"
)


class Browser:
    """A page of a browser, by the DevTools protocol: JSON with a zero byte after it, over two pipes."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._id = to, back, b"", 0
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def call(self, method: str, **params: Any) -> Any:
        """Call a method, and return its result."""
        self._id += 1
        asked = {"id": self._id, "method": method, "params": params} | self._session
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._back, 1 << 16)
                assert part, "the browser has ended"
                self._rest += part
            one, _, self._rest = self._rest.partition(b"\0")
            message = json.loads(one)
            if message.get("id") == self._id:
                assert "error" not in message, message
                return message["result"]

    def run(self, script: str) -> Any:
        """Return the value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until an expression is true."""
        end_s = time.monotonic() + 60
        while not self.run(script):
            assert time.monotonic() < end_s, (script, self.run("document.body.innerText"))
            time.sleep(0.02)

    def log(self) -> list[list[str]]:
        """Return who said what, in order."""
        return self.run("[...document.querySelectorAll('#log > div')].map((one) => [one.className, one.textContent])")

    def say(self, text: str, *, how: str = "enter") -> None:
        """Write a message as a user does, send it, and wait for the end of the answer."""
        before = len(self.log())
        self.run("document.getElementById('text').focus()")
        self.call("Input.insertText", text=text)
        if how == "enter":
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.call("Input.dispatchKeyEvent", type="keyDown", **key)
            self.call("Input.dispatchKeyEvent", type="keyUp", **key)
        else:
            self.run("document.getElementById('send').click()")
        self.wait_for(f"document.querySelectorAll('#log > div').length === {before + 2}")
        self.wait_for("!document.getElementById('send').disabled")


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    to_read, to = os.pipe()
    back, back_write = os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    # The browser reads from descriptor 3 and writes to 4.
    shell = f'exec "$0" "$@" 3<&{to_read} 4>&{back_write}'
    process = subprocess.Popen(
        ["bash", "-c", shell, str(CHROMIUM), *flags],
        pass_fds=(to_read, back_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(back_write)
    try:
        yield Browser(to, back)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: Server) -> Browser:
    browser.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
    browser.wait_for("document.getElementById('model')?.textContent === 'tiny'")
    browser.run("document.getElementById('temperature').value = 0; document.getElementById('tokens').value = 8")
    return browser


def test_a_chat_of_two_turns(page: Browser) -> None:
    page.say("Hi")
    first = text_of("u Hi a ", 8)
    assert page.log() == [["user", "Hi"], ["assistant", first]]
    page.say("Go", how="click")
    assert page.log()[2:] == [["user", "Go"], ["assistant", text_of(f"u Hi a {first} u Go a ", 8)]]


def test_a_text_is_continued(page: Browser) -> None:
    page.run("document.getElementById('mode').value = 'text'")
    page.say("Hello")
    assert page.log() == [["user", "Hello"], ["assistant", text_of("Hello", 8)]]


def test_an_error_is_shown_and_the_page_goes_on(page: Browser) -> None:
    page.say("<b>!</b>")
    (_, shown), (kind, text) = page.log()
    assert (shown, kind) == ("<b>!</b>", "error")
    assert "there is no token for" in text
    page.say("Hi")
    assert page.log()[2:] == [["user", "Hi"], ["assistant", text_of("u Hi a ", 8)]]


def end_long_answer(page: Browser, *, button: str) -> None:
    """Begin an answer of four seconds, and end it by a button."""
    page.run("document.getElementById('tokens').value = 80")
    with slow_tokens(0.05):
        page.run("document.getElementById('text').value = 'Hi'; document.getElementById('send').click()")
        page.wait_for("document.querySelector('.assistant')?.textContent.length > 2")
        page.run(f"document.getElementById('{button}').click()")
        page.wait_for("!document.getElementById('send').disabled")


def check_new_chat(page: Browser) -> None:
    page.say("Hi")
    assert page.log() == [["user", "Hi"], ["assistant", text_of("u Hi a ", 80)]]


def test_a_chat_that_is_cleared_while_it_is_answered_is_forgotten(page: Browser, server: Server) -> None:
    end_long_answer(page, button="clear")
    server.wait_until_idle()
    check_new_chat(page)


def test_stop_ends_an_answer_and_clear_begins_a_new_chat(page: Browser, server: Server) -> None:
    end_long_answer(page, button="stop")
    assert len(page.log()[1][1]) < 80
    page.run("document.getElementById('clear').click()")
    assert page.log() == []
    server.wait_until_idle()
    check_new_chat(page)
