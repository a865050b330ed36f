"""The report of a real launch, in a browser: on a phone, on a desk and on paper."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launching import arguments_for, command, merge, run
from tests.helpers.tables import table_rows, write_table

HOSTILE = '<script>document.title="broken"</script><img src=x onerror="document.title=\'broken\'">'


@pytest.fixture(scope="module")
def shown(tmp_path_factory, checkpoint) -> Path:
    """An output folder of a real launch of two ranks, with failed and hostile rows, merged."""
    folder = tmp_path_factory.mktemp("report")
    rows = table_rows()
    rows[3] = {**rows[3], "image_id": "gone.jpg"}
    rows[5] = {**rows[5], "question": HOSTILE, "answer": HOSTILE}
    table = write_table(folder / "vqa.csv", rows)
    out = folder / "out"
    assert run(command(2, *arguments_for(table, checkpoint), "--output-dir", out)).returncode == 0
    assert merge(out).returncode == 4
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[object]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-quic"):
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as session:
        yield session


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_whole_at_a_phones_and_a_desks_width(browser, shown, width):
    browser.execute_cdp_cmd("Network.enable", {})
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(f"file://{shown / 'report.html'}")
    assert browser.title.startswith("31 rows, ")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    too_wide = "return [...document.querySelectorAll('h1,h2,p,article,svg,img,.numbers div')].filter(e =>"
    assert not browser.execute_script(f"{too_wide} e.getBoundingClientRect().right > {width}).map(e => e.outerHTML)")
    headings = [heading.text for heading in browser.find_elements("tag name", "h2")]
    assert headings == [
        *("Coverage", "Throughput", "Failed rows", "Agreement", "Norms by layer"),
        *("States at the last prompt token", "States at the last image token", "Answers"),
    ]
    columns = len({e.rect["x"] for e in browser.find_elements("css selector", ".maps svg")})
    assert columns == (2 if width == 390 else 5)
    images = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    assert len(images) == 24 and all(0 < size <= 160 for size in images), "a thumbnail is broken"
    assert not browser.find_elements("tag name", "script")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in loaded), "something was fetched"
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_it_prints_on_a_few_pages(browser, shown):
    browser.get(f"file://{shown / 'report.html'}")
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12


@pytest.mark.slow
def test_it_says_what_became_of_the_rows(shown):
    text = (shown / "report.html").read_text(encoding="utf-8")
    for count, name in ((31, "rows"), (30, "extracted"), (1, "failed"), (0, "missing")):
        assert f"<div><b>{count}</b>{name}</div>" in text
    assert "PictureNotFound" in text and "gone.jpg" in text and "cannot be found" in text
    assert "of 30 answers agree with the ground truth; of all rows" in text
    assert text.count('<svg class="strip"') == 1 and len(re.findall(r"<svg\b", text)) == 1 + 1 + 1 + 10
    assert "layer 7" in text and "dtype" not in text
    assert HOSTILE not in text and "&lt;script&gt;" in text
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in text
