"""The playground: what its routes say, and its page in a browser with real clicks, on planned answers."""

import asyncio
import contextlib
import json
import re
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import uvicorn
from PIL import Image
from tiny_vlm import KNOBS as TINY_KNOBS
from tiny_vlm import write_tiny_model

from benchmarks.browser import CTRL, browser, find_browser
from budgetvlm.answer import Answer
from budgetvlm.controller.network import GRPOController
from budgetvlm.knobs import KnobSpace
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.serving.api_errors import APIError
from budgetvlm.serving.app import make_app
from budgetvlm.serving.dispatcher import Dispatcher, Ticket
from budgetvlm.serving.jobs import Event, Job
from budgetvlm.serving.preview import LESS, MORE, preview
from budgetvlm.serving.reasons import why
from budgetvlm.serving.serve_options import ServeOptions
from budgetvlm.vlm import load_vlm

pytestmark = pytest.mark.alone

# ---- what would be chosen at any budget

SPACE = KnobSpace(TINY_KNOBS)
BOUNDS = [1000.0 * (k + 1) for k in range(len(SPACE))]
PICTURE = Image.new("RGB", (256, 192), (90, 120, 60))
QUESTION = "what is the red sign"


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return load_vlm(str(write_tiny_model(tmp_path_factory.mktemp("model"))))


def adaptive(vlm, bounds):
    """A model whose controller thinks a setting the better the later it comes, within these bounds."""
    controller = GRPOController(
        image_feat_dim=64, lang_feat_dim=32, knob_values=TINY_KNOBS, bounds_ms=bounds, hidden_dim=8
    )
    controller.start_from([k / len(SPACE) for k in range(len(SPACE))])
    return AdaptiveVLM(vlm, controller, rehearsals=0)


def test_a_preview_is_what_the_model_would_choose_at_each_budget(vlm):
    """The bound of setting k is 1000 (k + 1) ms; of those allowed the last is thought the best."""
    model = adaptive(vlm, BOUNDS)
    found = preview(model, PICTURE, QUESTION)
    assert found["knobs"] == [{"name": name, "values": list(values)} for name, values in SPACE.knobs]
    budgets = found["budgets_ms"]
    assert (budgets[0], budgets[-1], len(budgets)) == (500, 2 * BOUNDS[-1], 40)
    ratios = np.diff(np.log(budgets))
    assert ratios == pytest.approx(np.full(39, ratios.mean()), abs=0.01)
    assert found["expected_ms"] == BOUNDS
    for name, factor in (("choice", 1.0), ("less", LESS), ("more", MORE)):
        expected = [min(max(int(factor * ms // 1000), 1), len(BOUNDS)) - 1 for ms in budgets]
        assert found[name] == expected
        assert found[name] == [model.choose(PICTURE, QUESTION, factor * ms).index for ms in budgets]
    assert found["allowed"] == [[k for k, bound in enumerate(BOUNDS) if bound <= ms] for ms in budgets]
    assert [int(np.argmax(values)) for values in found["values"]] == [len(BOUNDS) - 1] * 40
    assert json.loads(json.dumps(found)) == found


def test_a_setting_that_may_not_be_chosen_is_never_allowed(vlm):
    bounds = [None if k == 3 else bound for k, bound in enumerate(BOUNDS)]
    found = preview(adaptive(vlm, bounds), PICTURE, QUESTION)
    assert [k for k, ms in enumerate(found["expected_ms"]) if ms is None] == [3]
    assert not any(3 in allowed for allowed in found["allowed"])


# ---- why a request got its setting


@pytest.mark.parametrize(
    ("changes", "waited_ms", "says"),
    [
        ({"budget_ms": None}, 0.1, "The best of all settings, as there was no budget."),
        ({}, 0.1, "The best of the settings that were sure to keep 60 ms."),
        ({"price": 0.25}, 0.1, "sure to keep 60 ms, with the time of the full setting priced at 0.25 right answers."),
        ({}, 12.0, "sure to keep 60 ms, of which 12 ms were over when work on it began."),
        ({"feasible": False}, 0.1, "No setting was sure to keep 60 ms, so it got the fastest."),
        (
            {"feasible": False, "when_infeasible": "best_effort"},
            0.1,
            "so it got the best of those expected to, if any.",
        ),
        ({"num_hurried_tokens": 2}, 0.1, "60 ms; 2 of 5 tokens were hurried to be in time."),
        ({"finish_reason": "budget"}, 0.1, "60 ms; it was cut where the budget ended."),
    ],
)
def test_why_a_request_got_its_setting(changes, waited_ms, says):
    about = {"price": None, "when_infeasible": "fastest"}
    job = Job("1", [], [], 0.0, **{name: changes.get(name, default) for name, default in about.items()})
    answer = {
        "budget_ms": 60.0, "feasible": True, "num_hurried_tokens": 0, "num_output_tokens": 5, "finish_reason": "stop",
    }  # fmt: skip
    said = why(answer | changes, job, waited_ms)
    assert says in said and said.endswith(".") and "\n" not in said


# ---- a server whose answers are planned

KNOBS = KnobSpace({"max_crops": [1, 4], "top_k": [1, 2], "num_active_blocks": [4, 8]})
EXPECTED_MS = [10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0]
ALLOWED = [[], [0], [0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]]
CHOICE = [0, 0, 2, 4, 6]
PREVIEW = {
    "knobs": [{"name": name, "values": list(values)} for name, values in KNOBS.knobs],
    "budgets_ms": [8.0, 16.0, 32.0, 64.0, 128.0],
    "expected_ms": EXPECTED_MS,
    "allowed": ALLOWED,
    "values": [[0.2, 0.1, 0.5, 0.4, 0.7, 0.6, 0.9, 0.8]] * 5,
    "choice": CHOICE,
    "less": [0, 0, 0, 2, 4],
    "more": [0, 2, 4, 4, 6],
}
STAGES = {"preprocess": 1.0, "vision": 12.0, "controller": 0.5, "prefill": 6.0, "decode": 8.5}
FIRST, SECOND = "The sign ", "says C60"


class Planned(Dispatcher):
    """A dispatcher without replicas: notes jobs and plays planned events; the second piece waits for ``go``."""

    ready = True

    def __init__(self):
        super().__init__(ServeOptions())
        self.jobs, self.problem, self.go = [], None, threading.Event()

    async def start(self): ...

    async def close(self): ...

    def submit(self, job):
        self.jobs.append(job)
        if self.problem is not None and job.kind == "answer":
            raise self.problem
        ticket = Ticket(job)
        self._playing = asyncio.get_running_loop().create_task(self._play(ticket))
        return ticket

    async def _play(self, ticket):
        if ticket.job.kind == "preview":
            ticket.put(Event("preview", {"preview": PREVIEW}))
            return
        ticket.started_s = ticket.job.arrived_s + 0.002
        ticket.put(Event("text", {"text": FIRST}))
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        ticket.put(Event("text", {"text": SECOND}))
        ticket.put(Event("answer", {"answer": planned_answer(ticket.job.budget_ms).to_dict()}))


def planned_answer(budget_ms):
    """It takes 30 ms, 28 of them in the model."""
    met, feasible = budget_ms >= 30, budget_ms >= 16
    counts = 20, 8, 4
    return Answer(FIRST + SECOND, KNOBS.settings[2], 30.0, STAGES, 29.0, budget_ms, met, feasible, "stop", *counts)


@pytest.fixture(scope="module")
def planned():
    return Planned()


@contextlib.contextmanager
def serving(planned, **options):
    """The address of a server with these answers."""
    app = make_app(ServeOptions(playground=True, **options), planned)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:  # also after a test that fails: a server that goes on holds up the end of the whole run
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(planned):
    with serving(planned) as found:
        yield found


def fetched(url, body=None):
    """Status, headers and body of a response."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_the_page_and_all_that_it_names_come_from_the_server_alone(address):
    status, headers, body = fetched(f"{address}/playground")
    assert (status, headers.get_content_type()) == (200, "text/html")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"] and "http" not in headers["Content-Security-Policy"]
    page = body.decode()
    assert not re.search(r"https?://|<script>|<style|style=|onclick", page)
    named = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    modules = {name for name in named if name.endswith(".js")}
    while modules:
        module = modules.pop()
        script = fetched(f"{address}/playground/{module}")[2].decode()
        found = set(re.findall(r'from "\./([^"]+)"', script)) - named
        modules |= found
        named |= found
    assert len(named) == 10
    for name in named:
        status, headers, _ = fetched(f"{address}/playground/{name}")
        assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff"), name


@pytest.mark.parametrize("name", ["missing.js", "..%2Foptions.py", "%2Fetc%2Fpasswd"])
def test_nothing_else_is_served(address, name):
    assert fetched(f"{address}/playground/{name}")[0] == 404


def test_without_the_option_there_is_no_playground():
    paths = {getattr(route, "path", "") for route in make_app(ServeOptions(), Planned()).routes}
    assert not any("playground" in path for path in paths)


@pytest.mark.parametrize("content", ["what is this", [{"type": "text", "text": "what is this"}]])
def test_a_preview_without_an_image_is_refused_in_words(address, content):
    body = {"model": "reference", "messages": [{"role": "user", "content": content}]}
    status, _, said = fetched(f"{address}/playground/preview", body)
    assert (status, "one image" in json.loads(said)["error"]["message"]) == (400, True)


# ---- the page in a browser

needs_browser = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture
def page(chromium, address, planned):
    """The page with its first example, whose preview is there."""
    planned.jobs.clear()
    planned.problem = None
    planned.go.set()
    chromium.open(f"{address}/playground/")
    chromium.wait_for("document.querySelector('#settings td')")
    chromium.messages.clear()
    return chromium


def lit(page):
    """Numbers of the lit cells, and of the chosen one."""
    numbers = "[...document.querySelectorAll('#settings tbody td')].map((cell, k) => cell.matches('%s') ? k : -1)"
    return [page.run(f"{numbers % of}.filter((k) => k >= 0)") for of in (".lit", ".chosen")]


def text(page, selector):
    return page.run(f"document.querySelector({json.dumps(selector)}).textContent")


@needs_browser
def test_the_slider_lights_what_its_budget_allows(page):
    assert lit(page) == [ALLOWED[2], [CHOICE[2]]]  # the first budget that leaves a choice
    page.run("document.getElementById('budget').focus()")
    page.press("Home")
    assert (lit(page), text(page, "#budget-text")) == ([ALLOWED[0], [CHOICE[0]]], "8.00 ms")
    assert text(page, "#choice").startswith(
        "No setting is sure to keep 8.00 ms. The fastest is taken: 1 tile, 1 expert"
    )
    for n in (1, 2, 3, 4):
        page.press("ArrowRight")
        assert lit(page) == [ALLOWED[n], [CHOICE[n]]]
    page.press("ArrowLeft")
    said = text(page, "#choice")
    assert said.startswith("5 of 8 settings keep 64.0 ms. The controller takes 4 tiles, 1 expert, 4 blocks")
    assert "(expected: 40.0 ms, 70% right)" in said
    assert said.endswith("Better would be 4 tiles, 2 experts, 4 blocks (90% right), but needs 128 ms.")
    less, more = page.run("[...document.querySelectorAll('#change div')].map((one) => one.innerText)")
    assert less == "A fifth less: 51.2 ms\n1 tile, 2 experts, 4 blocks: 50% right (−20 points)"
    assert more == "A fifth more: 76.8 ms\nthe same setting"
    page.click("#budget")  # its middle
    assert lit(page) == [ALLOWED[2], [CHOICE[2]]]
    assert page.messages == []


@needs_browser
def test_an_answer_streams_in_and_its_times_stand_against_the_budget(page, planned):
    planned.go.clear()
    page.click("#ask")
    page.wait_for(f"document.querySelector('#answer .text')?.textContent == {json.dumps(FIRST)}")
    assert text(page, "#ask") == "Stop"
    planned.go.set()
    page.wait_for("document.querySelector('#answer .why').textContent")
    assert text(page, "#answer .text") == FIRST + SECOND
    assert text(page, "#answer .verdict").startswith("30.0 ms of 32.0 ms: in time")
    assert text(page, "#answer .why") == "1 tile, 2 experts, 4 blocks. " + (
        "The best of the settings that were sure to keep 32 ms, of which 2 ms were over when work on it began."
    )
    shares = page.run(
        "[...document.querySelectorAll('#answer .times i')].map((one) => [one.className, parseFloat(one.style.width)])"
    )
    whole_ms = 32 * 1.04  # the bar is a little longer than the longer of time and budget
    expected = {"queue": 2.0, **STAGES}
    assert {name: width for name, width in shares if name in expected} == pytest.approx(
        {name: 100 * ms / whole_ms for name, ms in expected.items()}, rel=1e-3
    )
    assert [name for name, _ in shares] == list(expected)  # together they are the whole time
    assert page.run("parseFloat(document.querySelector('#answer .limit').style.left)") == pytest.approx(100 / 1.04)
    assert page.messages == []


@needs_browser
def test_three_budgets_stand_side_by_side(page, planned):
    page.click("#compare")
    page.wait_for("document.querySelectorAll('#three .why b').length == 3")
    verdicts = page.run("[...document.querySelectorAll('#three .verdict')].map((one) => one.textContent)")
    assert [verdict.split(",")[0] for verdict in verdicts] == [
        "30.0 ms of 16.0 ms: late",
        "30.0 ms of 64.0 ms: in time",
        "30.0 ms of 128 ms: in time",
    ]
    assert [job.budget_ms for job in planned.jobs if job.kind == "answer"] == [16, 64, 128]
    widths = page.run("[...document.querySelectorAll('#three .times')].map((one) => one.children[1].style.width)")
    assert len(set(widths)) == 1  # one scale for all
    assert page.messages == []


@needs_browser
def test_an_uploaded_image_and_a_typed_question_are_what_is_asked(page, planned, tmp_path):
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "red.png")
    page.choose_file("#file", tmp_path / "red.png")
    page.wait_for("document.getElementById('image').alt.includes('red.png')")
    page.run("document.getElementById('question').select()")
    page.write("which colour")
    page.press("Enter", CTRL)  # what would be chosen is looked up first, also if the typing has only just ended
    page.wait_for("document.querySelector('#answer .why')?.textContent")
    last = planned.jobs[-1]
    assert (last.kind, last.budget_ms, last.images[0].size) == ("answer", 32, (30, 20))
    assert last.images[0].getpixel((0, 0)) == (200, 10, 10)
    assert "which colour" in json.dumps(last.messages)
    assert planned.jobs[-2].kind == "preview" and planned.jobs[-2].messages == last.messages
    assert page.messages == []


@needs_browser
@pytest.mark.parametrize("way", ["paste", "drop"])
def test_an_image_is_taken_from_the_clipboard_and_from_a_drag(page, planned, way):
    page.run(
        """(async () => {
          const canvas = Object.assign(document.createElement("canvas"), { width: 17, height: 5 });
          canvas.getContext("2d");
          const blob = await new Promise((resolve) => canvas.toBlob(resolve));
          const data = new DataTransfer();
          data.items.add(new File([blob], "mine.png", { type: "image/png" }));
          const event = WAY === "paste" ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
            : new DragEvent("drop", { dataTransfer: data, bubbles: true });
          document.body.dispatchEvent(event);
        })()""".replace("WAY", json.dumps(way))
    )
    page.wait_for("document.getElementById('image').alt.includes('mine.png')")
    page.wait_for("document.getElementById('settings').getAttribute('aria-busy') == 'false'")
    assert planned.jobs[-1].images[0].size == (17, 5)
    assert page.messages == []


@needs_browser
def test_a_file_that_is_no_image_is_said_so_and_changes_nothing(page, planned, tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    page.choose_file("#file", tmp_path / "note.txt")
    page.wait_for("!document.getElementById('error').hidden")
    assert text(page, "#error p").startswith("note.txt is not an image")
    page.click("#ask")
    page.wait_for("document.querySelector('#answer .why')?.textContent")
    assert planned.jobs[-1].images[0].size == (256, 192)
    assert page.run("document.getElementById('error').hidden")


@needs_browser
@pytest.mark.parametrize(
    ("problem", "says", "wants_key"),
    [
        (APIError(503, "5 wait.", retry_after_s=3), "cannot take the request now. 5 wait. Try again in 3 s.", False),
        (APIError(400, "max_tokens is too large"), "max_tokens is too large", False),
        (APIError(401, "no key was given"), "wants an API key. no key was given", True),
    ],
)  # fmt: skip
def test_errors_are_shown_in_words(page, planned, problem, says, wants_key):
    planned.problem = problem
    page.click("#ask")
    page.wait_for("!document.getElementById('error').hidden")
    assert says in text(page, "#error p")
    assert says in text(page, "#answer .verdict")
    assert page.run("!document.getElementById('key').hidden") == wants_key
    assert text(page, "#ask") == "Ask"


@needs_browser
def test_a_server_with_a_key_lets_the_page_in_and_asks_for_the_key(chromium):
    planned = Planned()
    planned.go.set()
    with serving(planned, api_key="open sesame", budget_ms=5.0) as address:
        assert fetched(f"{address}/playground/preview", {})[0] == 401
        chromium.open(f"{address}/playground/")
        for key, says in (("wrong", "a key is needed"), ("open sesame", "this key is wrong")):
            chromium.wait_for(f"document.querySelector('#error p').textContent.includes('{says}')")
            chromium.run("document.getElementById('key-text').value = ''")
            chromium.click("#key-text")
            chromium.write(key)
            chromium.press("Enter")
        chromium.wait_for("document.querySelector('#settings td')")
        assert [(job.kind, job.budget_ms) for job in planned.jobs] == [("preview", np.inf)]  # it can wait
        chromium.click("#ask")
        chromium.wait_for("document.querySelector('#answer .why')?.textContent")
        assert chromium.run("document.getElementById('error').hidden")


@needs_browser
def test_escape_stops_an_answer_and_the_server_hears_of_it(page, planned):
    planned.go.clear()
    page.click("#ask")
    page.wait_for("document.querySelector('#answer .text')?.textContent")
    page.press("Escape")
    page.wait_for("document.querySelector('#answer .verdict').textContent == 'Stopped.'")
    end = time.monotonic() + 30
    while not planned.jobs[-1].left:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert page.messages == []


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window_and_the_dark_mode_is_dark(page, address, width):
    page.open(f"{address}/playground/?{width}", width, 844, dark=True)
    page.wait_for("document.querySelector('#settings td')")
    page.click("#compare")
    page.wait_for("document.querySelectorAll('#three .why b').length == 3")
    assert page.run("document.documentElement.scrollWidth") <= width
    paper = "Math.max(...getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3).map(Number))"
    assert page.run(paper) < 60
    page.click("#theme")
    assert page.run(paper) > 200
    page.click("#theme")
    assert page.run(paper) < 60
    assert page.messages == []
