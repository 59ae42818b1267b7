"""A real browser shows the report from disk: at any width, light and dark, without complaint."""

import fcntl
import json
import os
import shutil
import subprocess
import time

import pytest
from builders.evaluations import MODELS, evaluation

from qtool.evaluation.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # Chromium's own does not work for root or in most containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)
SECONDS = 60
WIDTHS = (390, 768, 1280)
HOSTILE = '"><script>window.obeyed=1;alert(1)</script><img src=https://example.org/x onerror=1>'


class Browser:
    """Chromium, spoken to over the pipe of its DevTools protocol: file descriptors 3 and 4."""

    def __init__(self, program, profile):
        low_read, self._write = os.pipe()
        self._read, low_write = os.pipe()
        # Above the numbers they will have, so that neither takes the other's place.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (low_read, low_write)]
        numbered = f'exec "$0" "$@" 3</dev/fd/{ends[0]} 4>/dev/fd/{ends[1]}'
        self._process = subprocess.Popen(
            ["sh", "-c", numbered, program, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (low_read, low_write, *ends):
            os.close(fd)
        os.set_blocking(self._read, False)
        self._buffer, self._last, self._session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method, **parameters):
        """Send a command and return its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == self._last)
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, wanted):
        limit = time.monotonic() + SECONDS
        while time.monotonic() < limit:
            while b"\0" in self._buffer:
                raw, _, self._buffer = self._buffer.partition(b"\0")
                found = json.loads(raw)
                self.events.append(found)
                if wanted(found):
                    return found
            try:
                self._buffer += os.read(self._read, 1 << 20)
            except BlockingIOError:
                assert self._process.poll() is None, "the browser ended"
                time.sleep(0.005)
        pytest.fail(f"the browser did not answer within {SECONDS} s")

    def open(self, path, *, width=1280, scheme="light"):
        """Open a file in a window so wide."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=844,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        preferred = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[preferred])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        if not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self._until(lambda found: found.get("method") == "Page.loadEventFired")

    def value(self, expression):
        """Evaluate JavaScript in the page, which may run none of its own."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    @property
    def complaints(self):
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown",
                 "Page.javascriptDialogOpening")  # fmt: skip
        return [event for event in self.events if event.get("method") in kinds]

    @property
    def requests(self):
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with everything in it: many models, long names, a model without layers."""
    crowd = [(f"./tiny-{bits}bit-{'long-' * 20}{seed}", "gptq", bits, 2.0**-bits * (1 + seed / 9))
             for bits in (3, 4, 5) for seed in (1, 2)]  # fmt: skip
    value = evaluation([*MODELS, *crowd])
    value["results"][2]["tokenizer"] = {
        "same": False, "template": "different", "differences": ["eos token 2 instead of 3"],
    }  # fmt: skip
    value["results"][3].pop("layers")
    value["warnings"] = [{"code": "few_windows", "message": "only 4 windows of text"}]
    return write_report(value, tmp_path_factory.mktemp("out") / "report")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_fits_its_window_and_has_nothing_to_complain_about(browser, report, width, scheme):
    browser.open(report[0], width=width, scheme=scheme)
    assert browser.complaints == []
    assert browser.requests == [report[0].as_uri()]
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    outside = browser.value(
        """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') &&
        e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert outside == []


@pytest.mark.parametrize("width", WIDTHS)
def test_each_plot_is_drawn_once_and_its_letters_are_not_shrunk(browser, report, width):
    browser.open(report[0], width=width)
    sizes = browser.value(
        """[...document.querySelectorAll('figure svg')].map(s => [s.getBoundingClientRect().width,
        s.viewBox.baseVal.width]).filter(([shown]) => shown > 0)"""
    )
    assert len(sizes) == 4
    assert all(shown > 0.7 * drawn for shown, drawn in sizes)
    assert width != 390 or all(shown >= 0.99 * drawn for shown, drawn in sizes)


OVERLAPS = """(() => {
  const found = [];
  for (const svg of document.querySelectorAll('figure svg')) {
    const boxes = [...svg.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()])
        .filter(([t, b]) => b.width > 0);
    boxes.forEach(([t, a], i) => boxes.slice(i + 1).forEach(([u, b]) => {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && tall > 4) found.push([t.textContent, u.textContent, wide, tall]);
    }));
  }
  return found;
})()"""


@pytest.mark.parametrize("width", WIDTHS)
def test_no_text_of_a_plot_lies_on_another(browser, report, width):
    browser.open(report[0], width=width)
    assert browser.value(OVERLAPS) == []


CONTRASTS = """(selectors => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const back = e => { for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  return selectors.map(s => { const e = document.querySelector(s), style = getComputedStyle(e);
      const ink = e.namespaceURI.endsWith('svg') ? style.fill : style.color;
      const [a, b] = [light(parse(ink)), light(back(e))].sort((x, y) => y - x);
      return [s, (a + 0.05) / (b + 0.05)]; });
})(%s)"""
TEXTS = ["body", ".soft", "th small.pass", "th small.fail", "td small", ".alert h2", ".alert p",
         ".note li", ".verdict p", "figcaption", "a", "summary", "text.tick", "text.name",
         "text.other-name", "text.best-name", "text.limit-name", "text.note",
         *(f"text.t{color}" for color in range(8))]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_told_from_its_ground(browser, report, scheme):
    """Contrast of at least 4.5 to 1, https://www.w3.org/TR/WCAG22/#contrast-minimum"""
    browser.open(report[0], scheme=scheme)
    found = dict(browser.value(CONTRASTS % json.dumps(TEXTS)))
    assert len(found) == len(TEXTS)
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}


def test_names_that_are_programs_are_only_shown(browser, tmp_path):
    value = evaluation()
    value["results"][0]["model"] = value["reference"]["model"] = value["data"]["name"] = HOSTILE
    value["results"][1]["layers"][0]["name"] = f"model.layers.0.{HOSTILE}"
    value["results"][1]["domains"][HOSTILE] = value["results"][1]["domains"]["code"]
    page, *others = write_report(value, tmp_path / "report")
    for path in [page, *(path for path in others if path.suffix == ".svg")]:
        browser.open(path)
        assert browser.complaints == []
        assert browser.requests == [path.as_uri()]
        assert browser.value("typeof window.obeyed") == "undefined"
    browser.open(page)
    assert "<script>" in browser.value("document.body.innerText")


def test_a_plot_opens_as_a_file_of_its_own(browser, report):
    for path in report:
        if path.suffix == ".svg":
            for scheme, dark in (("light", False), ("dark", True)):
                browser.open(path, scheme=scheme)
                assert browser.complaints == []
                ground = "getComputedStyle(document.querySelector('.paper')).fill"
                assert (browser.value(ground) != "rgb(255, 255, 255)") is dark
