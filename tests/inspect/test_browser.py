"""The viewer's page in headless Chromium: opened, clicked, its slider moved, its keys pressed (make test-browser).

CHROMIUM and CHROMEDRIVER name the programs where they are not on the PATH under their usual names.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import numlstm as nl
from numlstm.inspect import page, trace

pytestmark = pytest.mark.browser

TEXT = "One (two)\nthree four. Five\n\n" * 12
SHOTS = os.environ.get("NUMLSTM_SHOTS")  # a folder for screenshots, to be looked at


def program(variable, *names):
    found = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.fail(f"no {names[0]} on the PATH: install it, or name one by {variable}=...")
    return found


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program("CHROMIUM", "chromium", "chromium-browser", "google-chrome")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for flag in (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
            "disable-component-update", "disable-sync", "window-size=1500,950", f"user-data-dir={folder}",
        ):  # fmt: skip
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(program("CHROMEDRIVER", "chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        yield driver
        driver.quit()


@pytest.fixture(scope="module")
def model():
    vocabulary = sorted(set(TEXT))
    nl.set_seed(0)
    model = nl.Sequential(
        [
            nl.Embedding(len(vocabulary), 6, input_shape=(None,)),
            nl.LSTM(12, return_sequences=True, name="lower"),
            nl.GRU(5, return_sequences=True, name="upper"),
            nl.Dense(len(vocabulary)),
        ]
    )
    ids = np.array([[vocabulary.index(t) for t in TEXT]])
    return trace(model, ids), vocabulary


def opened(driver, text, folder, name):
    """Open a page, wait until it is complete, and look for complaints."""
    path = Path(folder) / f"{name}.html"
    path.write_text(text, encoding="utf-8")
    driver.get_log("browser")
    driver.get(path.as_uri())
    until(driver, "return window.numlstm && window.numlstm.complete")
    shot(driver, name)
    assert driver.get_log("browser") == []
    return driver


def until(driver, script, seconds=60):
    end = time.monotonic() + seconds
    while not driver.execute_script(script):
        assert time.monotonic() < end, f"{script}: {driver.find_element('id', 'now').text}"
        time.sleep(0.02)


def shot(driver, name):
    if SHOTS:
        driver.save_screenshot(str(Path(SHOTS) / f"{name}.png"))


def state(driver, name):
    return driver.execute_script(f"return window.numlstm.state.{name}")


def now(driver):
    return driver.find_element("id", "now").text


@pytest.fixture
def text_page(browser, model, tmp_path):
    found, vocabulary = model
    return opened(browser, page(found, tokens=list(TEXT), vocabulary=vocabulary), tmp_path, "text")


def test_it_shows_the_numbers_that_were_traced(text_page, model):
    found, _ = model
    for name in "ifgohc":
        for unit, step in ((0, 0), (7, 100), (11, len(TEXT) - 1)):
            shown = text_page.execute_script("return window.numlstm.value(...arguments)", name, unit, step)
            values = found[f"lower/{name}"][0, :, unit]
            assert shown == pytest.approx(values[step], abs=float(np.ptp(values)) / 380)


def test_keys_move_step_unit_and_gate(text_page, model):
    from selenium.webdriver.common.keys import Keys

    view = text_page.find_element("id", "view")
    view.send_keys(Keys.ARROW_RIGHT * 3 + Keys.ARROW_LEFT)
    until(text_page, "return window.numlstm.state.step === 2")
    assert "Step 3 of" in now(text_page) and "“e”" in now(text_page)
    order = state(text_page, "order")
    assert state(text_page, "unit") == order[0]  # the one that follows something most
    view.send_keys(Keys.ARROW_DOWN)
    until(text_page, f"return window.numlstm.state.unit === {order[1]}")
    chosen = text_page.find_elements("css selector", '#units [aria-selected="true"]')
    assert [item.get_attribute("data-unit") for item in chosen] == [str(order[1])]
    view.send_keys("]")
    until(text_page, "return window.numlstm.state.array === 2")
    assert "input gate i" in now(text_page) and "closed" in text_page.find_element("id", "low").text
    view.send_keys(Keys.END)
    until(text_page, f"return window.numlstm.state.step === {len(TEXT) - 1}")
    view.send_keys(Keys.PAGE_UP)
    until(text_page, f"return window.numlstm.state.step === {len(TEXT) - 51}")
    # the numbers beside it are this step's
    unit, found = state(text_page, "unit"), model[0]
    rows = text_page.find_elements("css selector", "#numbers tr")
    shown = {row.text.rsplit(" ", 1)[0]: row.text.rsplit(" ", 1)[1].replace("−", "-") for row in rows}
    values = found["lower/f"][0, :, unit]
    assert float(shown["forget gate f"]) == pytest.approx(
        values[len(TEXT) - 51], abs=float(np.ptp(values)) / 380 + 5e-4
    )


def test_slider_clicks_and_lists(text_page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    slider = text_page.find_element("id", "unit")
    slider.send_keys(Keys.HOME)
    until(text_page, "return window.numlstm.state.unit === 0")
    slider.send_keys(Keys.ARROW_RIGHT * 4)
    until(text_page, "return window.numlstm.state.unit === 4")
    assert text_page.find_element("id", "unit-number").text == "4"

    before = state(text_page, "step")
    view = text_page.find_element("id", "view")
    box = view.size
    ActionChains(text_page).move_to_element_with_offset(
        view, 45 - box["width"] // 2, 45 - box["height"] // 2
    ).click().perform()  # the second line, the fourth character or so
    until(text_page, f"return window.numlstm.state.step !== {before}")
    at = state(text_page, "step")
    assert 10 <= at < 16 and f"Step {at + 1} of" in now(text_page)

    Select(text_page.find_element("id", "follow")).select_by_visible_text("line ends")
    until(text_page, "return window.numlstm.state.unit === window.numlstm.state.order[0]")
    scores = [abs(float(e.text.split()[-1].replace("−", "-")))
              for e in text_page.find_elements("css selector", "#units li")]  # fmt: skip
    assert scores == sorted(scores, reverse=True) and len(scores) == 12
    text_page.find_elements("css selector", "#units li")[3].click()
    until(text_page, "return window.numlstm.state.unit === window.numlstm.state.order[3]")

    Select(text_page.find_element("id", "layer")).select_by_visible_text("upper (gru)")
    until(text_page, "return document.querySelectorAll('#units li').length === 5")
    until(
        text_page, "return document.querySelector('#diagram svg').getAttribute('aria-label').includes('GRU')"
    )
    Select(text_page.find_element("id", "array")).select_by_visible_text("update gate z")
    until(text_page, "return document.getElementById('now').textContent.includes('update gate z')")
    shot(text_page, "gru")


def colours(driver):
    """The different colours of the view."""
    return driver.execute_script(
        "const c = document.getElementById('canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, 200).data;"
        "const seen = new Set(); for (let k = 0; k < d.length; k += 4) seen.add(d.slice(k, k + 3).join());"
        "return [...seen];"
    )


def test_the_text_is_painted_in_blue_and_orange_by_day_and_by_night(text_page):
    def split(found):
        triples = [tuple(map(int, c.split(","))) for c in found]
        blue = sum(b > r + 60 for r, _, b in triples)
        return blue, sum(r > b + 60 for r, _, b in triples)

    text_page.execute_script("document.getElementById('view').scrollTop = 0")
    time.sleep(0.3)
    assert min(split(colours(text_page))) >= 3
    ground = text_page.execute_script("return getComputedStyle(document.body).backgroundColor")
    text_page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    time.sleep(0.3)
    assert text_page.execute_script("return getComputedStyle(document.body).backgroundColor") != ground
    assert "22,22,22" in colours(text_page) and min(split(colours(text_page))) >= 3
    shot(text_page, "dark")
    text_page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_series_and_other_cells(browser, tmp_path):
    x = np.sin(np.arange(90) / 6)
    model = nl.Sequential([nl.SLSTM(4, name="s", return_sequences=True), nl.SimpleRNN(3, name="r")])
    found = trace(model, np.stack([x, -x], 1)[None].astype(np.float32))
    driver = opened(browser, page(found, series={"wave": x, "mirror": -x}), tmp_path, "series")
    assert "wave 0" in now(driver)
    view = driver.find_element("id", "view")
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).move_to_element_with_offset(view, 0, -100).click().perform()
    until(driver, "return Math.abs(window.numlstm.state.step - 41) < 4")  # the middle, but for the axis' room
    gates = driver.find_elements("css selector", "#diagram [data-gate]")
    assert [g.get_attribute("data-gate") for g in gates] == list("ifzo")
    assert "m = maximum" in driver.find_element("id", "equations").get_attribute("textContent")


def test_a_text_can_not_bring_code_along(browser, tmp_path):
    evil = (
        '</script><script>window.hurt=1</script><img src=x onerror="window.hurt=2"><svg onload=window.hurt=3>'
    )
    tokens = [*evil, evil]
    model = nl.Sequential([nl.LSTM(2, name="l")])
    found = trace(model, np.random.default_rng(0).standard_normal((1, len(tokens), 1)))
    driver = opened(browser, page(found, tokens=tokens, title=evil, notes=evil), tmp_path, "evil")
    assert driver.execute_script("return window.hurt") is None
    assert driver.find_element("tag name", "h1").text == evil
    assert driver.execute_script("return document.images.length") == 0
    # even if something got in, the policy does not let it run, nor fetch
    driver.execute_script("const s = document.createElement('script'); s.textContent = 'window.hurt = 4';"
                          "document.body.append(s);")  # fmt: skip
    assert driver.execute_script("return window.hurt") is None
    refused = "return fetch('http://127.0.0.1:9/').then(() => 'came', () => 'refused')"
    assert driver.execute_script(refused) == "refused"


def test_it_is_quick_at_5000_characters_and_512_units(browser, tmp_path):
    from numlstm.inspect.tracing import LayerTrace, Trace
    from numlstm.kernels import cells

    draw = np.random.default_rng(0)
    shape = (1, 5000, 512)
    arrays = {n: draw.random(shape, np.float32) for n in "ifgohc"}
    layer = LayerTrace(
        {n: arrays.pop(n) for n in "hc"}, arrays, {}, {n: np.zeros((1, 512)) for n in "hc"}, None, False,
        cells.lstm(),
    )  # fmt: skip
    text = page(Trace({"lstm": layer}, None, None), tokens=list("to be or\n" * 555 + "to be"))
    driver = opened(browser, text, tmp_path, "large")
    painted = driver.execute_script("return performance.getEntriesByName('first-paint')[0].startTime")
    assert painted < 2000  # milliseconds
    # a unit is drawn anew within a few frames
    took = driver.execute_async_script(
        "const done = arguments[0], u = document.getElementById('unit'), from = performance.now(); let n = 0;"
        "const one = () => { if (n === 20) { done((performance.now() - from) / 20); return; }"
        "  u.value = n++ * 25; u.dispatchEvent(new Event('input')); requestAnimationFrame(one); }; one();"
    )
    assert took < 200
    print(f"first paint after {painted:.0f} ms, {took:.0f} ms a unit, {len(text) / 1e6:.1f} MB")
