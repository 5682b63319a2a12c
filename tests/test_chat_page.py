"""The web page in a real browser: streams, stops, shows tools, compares two models, stays here.

Needs the extra `ui`, playwright and Chromium: `make ui-check` installs them in an environment of
their own and runs this.
"""

import contextlib
import shutil
import time
import urllib.error
import urllib.request

import pytest

from internjax.chat.source import Remote
from internjax.serve.server import serving
from tests.scripted_openai import scripted
from tests.test_serve_engine import CONFIG, make_model

pytest.importorskip("gradio", reason="no gradio here: make ui-check")
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: make ui-check")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: make ui-check"),
    pytest.mark.filterwarnings("default"),  # gradio's own
]

CALL = 'Thought: I add.\nAction: calculator\nAction Input: {"expression":"20 + 22"}'
ASK, STOP = ".ask textarea >> visible=true", ".stop-button >> visible=true"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # --no-sandbox: Chromium refuses to run as root with one; the page is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, *urls, tempted: bool = False, answering: bool = True):
    """The page over these servers in a new tab; nothing may fail in it, nor leave this machine.

    Args:
      tempted: an answer tries to make it do so, and the browser says that it refused.
      answering: the servers are there.
    """
    from internjax.chat.page_server import page_serving

    with page_serving([Remote(url) for url in urls]) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 760})
        page.set_default_timeout(20_000)
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector(ASK)
        if answering:
            wait_until(lambda: page.locator("#model-one input").input_value())
        page.address = address
        try:
            yield page
        finally:
            page.close()
        strangers = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert tempted or not (strangers or errors), (strangers, errors)


def ask(page, text: str) -> None:
    page.fill(ASK, text)
    page.press(ASK, "Enter")


def words(page, column: str) -> str:
    return page.locator(f"#chat-{column} .bot.message").last.inner_text()


def wait_until(true, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_answer_streams_and_the_chat_goes_on(browser):
    long = {"content": "word " * 40 + "**bold** <b onclick=alert(1)>x</b>", "pause": 0.05}
    with scripted(long, "Second.", "Again.") as script, opened(browser, script.url) as page:
        page.get_by_label("System text").fill("Be brief.")
        page.get_by_label("Seed").fill("7")
        ask(page, "First?")
        page.wait_for_selector("#chat-one >> text=word word")
        page.wait_for_selector(STOP)  # it still grows
        assert "bold" not in words(page, "one")
        page.wait_for_selector("#cost-one >> text=10 + 5 tokens")
        assert page.locator("#chat-one strong").inner_text() == "bold"
        assert page.locator("#chat-one [onclick]").count() == 0
        ask(page, "More?")
        page.wait_for_selector("#chat-one >> text=Second.")
        page.wait_for_selector(".submit-button >> visible=true")
        page.get_by_label("Retry").last.click()
        page.wait_for_selector("#chat-one >> text=Again.")
        assert page.locator("#chat-one >> text=Second.").count() == 0
    first, second, third = script.requests
    assert [m["content"] for m in first["messages"]] == ["Be brief.", "First?"]
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
    assert third["messages"] == second["messages"]
    assert (first["seed"], first["temperature"], first["model"]) == (7, 0, "scripted")
    assert "max_tokens" not in first


def test_stop_ends_the_answer_on_the_server(browser):
    forever = {"content": "on " * 2000, "pause": 0.02}
    with scripted(forever, "Next.") as script, opened(browser, script.url) as page:
        ask(page, "Go.")
        page.wait_for_selector("#chat-one >> text=on on on")
        page.locator(STOP).click()
        page.wait_for_selector(".submit-button >> visible=true")
        wait_until(lambda: script.left == 1)
        kept = words(page, "one")
        time.sleep(0.5)
        assert words(page, "one") == kept
        ask(page, "And now?")
        page.wait_for_selector("#chat-one >> text=Next.")
    assert script.requests[1]["messages"][1]["content"].startswith("on on on")


def test_tools_are_shown_and_open(browser):
    with scripted(CALL, "Final Answer: It is 42.") as script, opened(browser, script.url) as page:
        page.get_by_label("calculator").check()
        ask(page, "What is 20 + 22?")
        page.wait_for_selector("#chat-one >> text=It is 42.")
        step = page.locator("#chat-one").get_by_text("result: 42")
        assert page.locator("#chat-one code >> visible=true").count() == 0
        step.click()
        wait_until(lambda: "20 + 22" in "".join(page.locator("#chat-one code").all_inner_texts()))


def test_two_models_answer_side_by_side(browser):
    """Two real servers of two random models: other weights, other words, at the same time."""
    model = make_model()
    with (
        serving(model, name="left-model", engine=CONFIG) as one,
        serving(make_model(norm_eps=1.0), name="right-model", engine=CONFIG) as two,
        opened(browser, one, two) as page,
    ):
        page.get_by_role("tab", name="Side by side").click()
        page.get_by_label("Max tokens").fill("60")
        ask(page, "hi")
        for column, name in (("left", "left-model"), ("right", "right-model")):
            page.wait_for_selector(f"#cost-{column} >> text=tokens", timeout=60_000)
            assert name in page.inner_text(f"#cost-{column}")
        left, right = words(page, "left"), words(page, "right")
        assert left and right and left != right


def test_a_server_that_is_not_there_is_named(browser):
    with opened(browser, "http://127.0.0.1:9/v1", answering=False) as page:
        page.wait_for_selector("text=http://127.0.0.1:9/v1 does not answer")
        ask(page, "hi")
        page.wait_for_selector("#chat-one >> text=choose a model above")


def test_a_picture_from_elsewhere_is_not_fetched(browser):
    with (
        scripted("See ![x](http://198.51.100.1/x.png) there.") as script,
        opened(browser, script.url, tempted=True) as page,
    ):
        refused = []
        page.on("requestfailed", lambda request: refused.append((request.url, request.failure)))
        ask(page, "hi")
        page.wait_for_selector("#chat-one >> text=there.")
        wait_until(lambda: ("http://198.51.100.1/x.png", "csp") in refused)


def test_the_page_answers_to_its_own_name_only(browser):
    with opened(browser, "http://127.0.0.1:9/v1", answering=False) as page:
        request = urllib.request.Request(page.address, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request)
