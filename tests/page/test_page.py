"""The page in a headless Chromium: every control changes the picture, and what goes wrong is said."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from serve.client.command import main as client_main
from tests.bundle_copies import add_version
from tests.server_process import ServerProcess

WIDE, PHONE = {"width": 1100, "height": 900}, {"width": 360, "height": 740}
QUICK_MS = 15_000
expect.set_options(timeout=QUICK_MS)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server and waits for its first digits; any error in its script fails the test."""
    contexts: list[Any] = []
    faults: list[str] = []

    def open_it(server: ServerProcess, query: str = "?seed=7", drawn: bool = True, **options: Any) -> Page:
        context = browser.new_context(**({"viewport": WIDE} | options))
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(QUICK_MS)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"http://{server.http}/{query}")
        if drawn:
            expect(page.locator("#digits img").first).to_be_visible(timeout=QUICK_MS)
            expect(page.locator("#strip img")).to_have_count(11)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not faults


def pictures(page: Page, place: str = "digits") -> list[str]:
    sources: list[str] = page.eval_on_selector_all(f"#{place} img", "images => images.map(image => image.src)")
    return sources


def pixels(source: str) -> bytes:
    """Of a picture in a data URL, without what its file says of its making."""
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        return picture.tobytes()


def changed(page: Page, act: Callable[[], object], place: str = "digits") -> list[str]:
    """The pictures once they are others than before ``act``."""
    before = pictures(page, place)
    act()
    page.wait_for_function(
        "([place, before]) => JSON.stringify([...document.querySelectorAll(`#${place} img`)].map(i => i.src)) !== before",
        arg=[place, page.evaluate("list => JSON.stringify(list)", before)],
    )
    return pictures(page, place)


def test_it_loads_with_digits_a_strip_and_live_figures(shared_server: ServerProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(shared_server)
    assert len(pictures(page)) == 25
    assert len(set(pictures(page))) == 25
    expect(page.locator("#provider")).to_have_text("cpu")
    expect(page.locator("#queue")).to_have_text("0")
    expect(page.locator("#rate")).not_to_have_text("–")
    page.locator("#draw").click()
    expect(page.locator("#latency")).to_contain_text("ms")
    expect(page.locator("#message")).to_be_hidden()


def test_each_control_changes_the_picture(shared_server: ServerProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(shared_server)
    sevens = changed(page, lambda: page.select_option("#digit", "7"))
    assert all(text.startswith("7 ·") for text in page.locator("#digits span").all_inner_texts())
    fewer = changed(page, lambda: page.locator("#count").fill("9") or page.locator("#count").press("Enter"))
    assert fewer == sevens[:9]
    later = changed(page, lambda: page.locator("#start").fill("3") or page.locator("#start").press("Enter"))
    assert later[:6] == sevens[3:9]
    cut = changed(page, lambda: page.locator("#truncation").fill("0.3"))
    assert page.locator("#truncation-shown").inner_text() == "0.3"
    assert cut != later
    other = changed(page, lambda: page.locator("#another").click())
    assert set(other).isdisjoint(cut)
    unconditional = changed(page, lambda: page.select_option("#model", "dcgan"))
    assert len(unconditional) == 9
    expect(page.locator("#digit")).to_be_disabled()
    expect(page.get_by_alt_text("step 0", exact=True)).to_be_visible()  # its strip, asked for at the same time, has come too
    strip = pictures(page, "strip")
    assert changed(page, lambda: page.locator("#end").fill("8") or page.locator("#end").press("Enter"), "strip") != strip
    assert pixels(pictures(page, "strip")[0]) == pixels(strip[0]), "the strip begins at the same address"


def test_a_strip_that_comes_late_does_not_replace_a_later_one(
    shared_server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    """The strip was that of whichever answer came last, though the digits beside it were of another model."""
    page = open_page(shared_server)
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        if held:
            route.continue_()
        held.append(route)

    page.route("**/v1/interpolation*", hold_the_first)
    changed(page, lambda: page.select_option("#model", "dcgan"))
    strip = changed(page, lambda: page.select_option("#model", "mlp"), "strip")
    with page.expect_response("**/v1/interpolation*model=dcgan*"):
        held[0].continue_()
    page.wait_for_timeout(500)  # in which it would be shown
    assert pictures(page, "strip") == strip


def test_an_address_gives_the_same_bytes_again(shared_server: ServerProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(shared_server, "?seed=18446744073709551615&labels=3&count=4&truncation=1.1")
    first = pictures(page)
    address = page.url
    changed(page, lambda: page.select_option("#digit", "5"))
    page.goto(address)
    expect(page.locator("#digits img")).to_have_count(4)
    assert pictures(page) == first
    assert page.locator("#seed").input_value() == "18446744073709551615", "seeds keep all their 64 bits"


def test_choosing_a_digit_copies_the_call_that_makes_it_again(
    shared_server: ServerProcess, open_page: Callable[..., Page], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = open_page(shared_server, "?seed=5&labels=8&start=2&count=3&truncation=0.7")
    page.locator("#digits button").nth(1).click()
    expect(page.locator("#copied")).to_contain_text("copied: python -m serve.client")
    expect(page.locator("#where")).to_contain_text("where the package digits-serve is installed")
    command = page.evaluate("navigator.clipboard.readText()")
    words = command.split()
    assert words[:3] == ["python", "-m", "serve.client"]
    assert client_main([*words[3:], "--out", str(tmp_path / "digit.png")]) == 0
    assert "1 digits by rpgan/1, seed 5, from 3" in capsys.readouterr().out
    picture = page.evaluate(
        """async () => { const image = document.querySelectorAll('#digits img')[1];
        const canvas = new OffscreenCanvas(28, 28).getContext('2d'); canvas.drawImage(image, 0, 0, 28, 28);
        return [...canvas.getImageData(0, 0, 28, 28).data].filter((_, i) => i % 4 === 0); }"""
    )
    with Image.open(tmp_path / "digit.png") as drawn:
        mine = np.asarray(drawn).ravel().tolist()
    assert max(abs(a - b) for a, b in zip(mine, picture, strict=True)) <= 1


def test_it_works_by_keyboard_alone(shared_server: ServerProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(shared_server)
    page.locator("#model").focus()
    order = []
    for _ in range(10):
        order.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert order[:9] == ["model", "version", "digit", "seed", "start", "count", "truncation", "draw", "another"]
    page.locator("#digit").focus()
    changed(page, lambda: page.keyboard.press("4"))
    assert page.locator("#digit").input_value() == "4"
    page.locator("#digits button").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#copied")).to_contain_text("--digit 4")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_dark_mode(shared_server: ServerProcess, open_page: Callable[..., Page], scheme: str) -> None:
    page = open_page(shared_server, viewport=PHONE, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "nothing sticks out"
    paper, ink = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")

    def light(colour: str) -> int:
        return sum(int(part) for part in colour[4:-1].split(","))

    assert (light(paper) < light(ink)) == (scheme == "dark")
    for control in page.locator("button:visible, input:visible, select:visible").all():
        box = control.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 24, "large enough for a finger (WCAG 2.2, 2.5.8)"


def test_a_server_that_refuses_says_why(open_page: Callable[..., Page], start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max-count=64", "--max-queue-images=64", "--caller-images=64")
    page = open_page(server)
    page.locator("#count").fill("65")
    page.locator("#count").press("Enter")
    expect(page.locator("#message")).to_contain_text("The server refuses: count must be from 1 to 64")
    assert len(pictures(page)) == 25, "what was there stays"
    changed(page, lambda: page.locator("#count").fill("5") or page.locator("#count").press("Enter"))
    expect(page.locator("#message")).to_be_hidden()


def test_overload_is_said_and_passes(open_page: Callable[..., Page], start_server: Callable[..., ServerProcess]) -> None:
    """The page's own caller limit is reached by a flood of its own requests."""
    server = start_server("--caller-requests-per-s=4")
    page = open_page(server)
    page.evaluate("for (let i = 0; i < 30; i++) document.getElementById('draw').click()")
    expect(page.locator("#message")).to_contain_text("over its 4 requests a second")
    expect(page.locator("#message")).to_contain_text("try again in 1 s")
    page.wait_for_timeout(2500)
    page.locator("#draw").click()
    expect(page.locator("#message")).to_be_hidden()


def test_a_server_that_is_gone_is_said_and_its_return_noticed(
    open_page: Callable[..., Page], start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server()
    page = open_page(server)
    server.kill()
    expect(page.locator("#message")).to_contain_text("The server cannot be reached")
    start_server(f"--http-port={server.http.rpartition(':')[2]}")
    expect(page.locator("#message")).to_be_hidden()


def test_a_token_is_asked_for_where_one_is_needed(
    open_page: Callable[..., Page],
    start_server: Callable[..., ServerProcess],
    tmp_path: Path,
    add_token: Callable[..., str],
) -> None:
    tokens, token = tmp_path / "tokens.json", add_token("reader")
    page = open_page(start_server(f"--tokens-file={tokens}", "--host=0.0.0.0", "--insecure"), drawn=False)
    expect(page.locator("#message")).to_contain_text("The server asks for a token")
    page.locator("#token").fill(token)
    page.locator("#token").press("Enter")
    expect(page.locator("#digits img")).to_have_count(25)
    page.locator("#digits button").first.click()
    expect(page.locator("#copied")).to_contain_text("--target 127.0.0.1:")
    expect(page.locator("#copied")).to_contain_text("--token-file FILE")


def test_nothing_is_fetched_from_elsewhere(shared_server: ServerProcess, browser: Browser) -> None:
    context = browser.new_context(viewport=WIDE)
    page = context.new_page()
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "://" in request.url else "data"))
    page.goto(f"http://{shared_server.http}/")
    expect(page.locator("#digits img")).to_have_count(25)
    context.close()
    assert hosts <= {shared_server.http, "data"}


def test_odd_values_in_the_address_are_left_out_and_said(shared_server: ServerProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(shared_server, "?seed=-1&start=abc&count=1e9&truncation=x&labels=77&model=vae&begin=3&end=9&version=99")
    expect(page.locator("#message")).to_contain_text(
        "cannot be used: seed=-1, start=abc, count=1e9, truncation=x, model=vae, version=99, labels=77."
    )
    assert page.locator("#seed").input_value().isdecimal()
    values = {name: page.locator(f"#{name}").input_value() for name in ("start", "count", "truncation", "digit", "version")}
    assert values == {"start": "0", "count": "25", "truncation": "2.5", "digit": "", "version": ""}
    assert (page.locator("#begin").input_value(), page.locator("#end").input_value()) == ("3", "9")
    assert page.locator("#model").input_value() == "rpgan"


def test_digits_that_are_drawn_do_not_hide_that_the_strip_is_refused(
    shared_server: ServerProcess, open_page: Callable[..., Page]
) -> None:
    page = open_page(shared_server)
    page.fill("#end", "9223372036854775808")
    page.press("#end", "Enter")
    expect(page.locator("#message")).to_contain_text("The server refuses")
    changed(page, lambda: page.locator("#another").click())
    page.wait_for_timeout(500)
    assert page.locator("#message").inner_text().count("The server refuses") == 1
    page.fill("#end", "1")
    page.press("#end", "Enter")
    expect(page.locator("#message")).to_be_hidden()


def test_what_is_refused_is_not_kept_in_the_address(shared_server: ServerProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(shared_server)
    for name, refused in (("seed", "99999999999999999999"), ("end", "9223372036854775808"), ("end", "x")):
        was = page.input_value(f"#{name}")
        page.fill(f"#{name}", refused)
        page.press(f"#{name}", "Enter")
        if refused.isdecimal():
            expect(page.locator("#message")).to_contain_text("The server refuses")
        page.fill(f"#{name}", was)
        assert refused not in page.url
    changed(page, lambda: page.locator("#another").click())
    seed = page.input_value("#seed")
    assert seed != "7"
    expect(page).to_have_url(re.compile(rf"\?seed={seed}&"))


def test_an_interpolation_keeps_one_digit(shared_server: ServerProcess, open_page: Callable[..., Page]) -> None:
    """Between two labels there is nothing: it jumped from five sixes to six threes."""
    page = open_page(shared_server)
    digits = [text.split(" · ")[0] for text in page.locator("#digits span").all_inner_texts()]
    assert digits[0] != digits[1], "or this shows nothing"
    names = page.eval_on_selector_all("#strip img", "images => images.map(image => image.alt.split(',')[0])")
    assert names == [f"a {digits[0]}"] * 11


def test_labels_stand_in_one_line(shared_server: ServerProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(shared_server)
    boxes = [label.bounding_box() for label in page.locator("#controls label:visible").all()]
    assert len({box["height"] for box in boxes if box}) == 1, "they are aligned at their lower edges"


def test_the_ends_are_kept_in_the_address(shared_server: ServerProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(shared_server)
    changed(page, lambda: (page.fill("#end", "40"), page.press("#end", "Enter")), "strip")
    expect(page).to_have_url(re.compile("end=40"))
    strip = pictures(page, "strip")
    again = open_page(shared_server, page.evaluate("location.search"))
    assert again.locator("#end").input_value() == "40"
    assert pictures(again, "strip") == strip


def test_a_version_can_be_chosen(
    open_page: Callable[..., Page], start_server: Callable[..., ServerProcess], bundles: Path
) -> None:
    add_version(bundles, "mlp", 2)
    server = start_server(f"--models-dir={bundles}", "--versions=latest:2")
    page = open_page(server, "?seed=7&model=mlp")
    assert page.locator("#version option").all_text_contents() == ["the server's choice", "1", "2"]
    page.select_option("#version", "1")
    expect(page).to_have_url(re.compile("version=1"))
    page.click("#digits button >> nth=0")
    expect(page.locator("#copied")).to_contain_text("--version 1 ")


def test_figures_do_not_outlive_the_server(open_page: Callable[..., Page], start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    page = open_page(server)
    expect(page.locator("#rate")).not_to_have_text("–")
    server.kill()
    for name in ("rate", "latency", "queue", "provider"):
        expect(page.locator(f"#{name}")).to_have_text("–")


def test_without_javascript_it_says_so(shared_server: ServerProcess, open_page: Callable[..., Page]) -> None:
    page = open_page(shared_server, drawn=False, java_script_enabled=False)
    expect(page.locator("body")).to_contain_text("This page needs JavaScript", use_inner_text=True)
