"""The page, in a real browser: talked to, typed at, stopped, left alone."""

import base64
import contextlib
import io
import re
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from PIL import Image
from tiny_browser import browser, opened
from tiny_served import NAME, client_of, running, served, served_model, sound_file, voice

RATE = 44_100  # of the microphone: nothing like the server's
SAID = voice(3.0, rate=RATE)
FOLDER = files("zipper_lm.serve") / "page"
DENIED = "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotAllowedError'); };"
DROP = """
([name, type, data]) => {
  const given = new DataTransfer();
  given.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
  for (const kind of ["dragenter", "drop"]) document.body.dispatchEvent(
    new DragEvent(kind, { dataTransfer: given, bubbles: true, cancelable: true }));
}
"""


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    with served(served_model(("text", "speech", "image"), tokens=20)) as service:  # what is spoken takes its time
        yield service


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(SAID, RATE, tmp_path_factory.mktemp("microphone")) as chromium:
        yield chromium


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    with opened(chromium, address) as page:
        yield page


@pytest.fixture
def asked(service: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The documents that the server is asked to go on with."""
    found: list[Any] = []
    write = service.write

    async def noting(document: Any, *rest: Any, **how: Any) -> Any:
        found.append(document)
        return await write(document, *rest, **how)

    monkeypatch.setattr(service, "write", noting)
    return found


def talk(page: Any, seconds: float = 0.4) -> None:
    """Hold the button with the mouse, and let go."""
    page.hover("#talk")
    page.mouse.down()
    page.wait_for_selector("#talk.on")
    page.wait_for_timeout(1000 * seconds)
    page.mouse.up()


def finished(page: Any) -> None:
    page.wait_for_selector(".turn")
    page.wait_for_selector(".turn[aria-busy]", state="detached")
    page.wait_for_selector("#stop:disabled")  # all is heard


def posted(page: Any) -> np.ndarray:
    """What was given to the playback worklet: float32 [time] at 24 kHz."""
    pieces = page.evaluate("posted.filter(Array.isArray)")
    return np.concatenate([np.asarray(piece, dtype=np.float32) for piece in pieces])


def tokens(page: Any) -> list[str]:
    return page.locator(".turn:last-child .cell .told").all_inner_texts()


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """How alike a sound is to the part of a longer one that it is most alike to: 1 is the same but for loudness."""
    size = 1 << (len(a) + len(b)).bit_length()
    found = np.fft.irfft(np.fft.rfft(b, size) * np.conj(np.fft.rfft(a, size)), size)[: len(b) - len(a)]
    energy = np.cumsum(np.concatenate([[0.0], b**2]))
    own = energy[len(a) :][: len(found)] - energy[: len(found)]
    return float(np.max(found / np.sqrt(own * np.sum(a**2))))


def test_speak_read_and_hear(page: Any, service: Any, asked: list[Any]) -> None:
    """What the microphone heard is what the server was asked; what the page shows and plays is what the model wrote."""
    talk(page, 1.2)
    finished(page)
    heard, rate = asked[0][0].value
    assert len(heard) / rate > 1.2
    twice = soxr.resample(np.concatenate([SAID, SAID, SAID]), RATE, rate)
    assert likeness(heard[rate // 2 : rate], twice) > 0.98
    text, speech = service.model.generate([asked[0]], ["text", "speech"])[0][1:]
    assert page.inner_text(".segment.written .words").split() == text.value.split()
    assert tokens(page)[1:] == [f"{len(text.ids)} tokens", f"{len(speech.ids)} tokens"]
    sound = posted(page)
    assert abs(len(sound) / 24_000 - len(speech.ids) / 25) < 0.1
    assert np.sqrt(np.mean(sound**2)) > 0.01
    assert page.evaluate("heard") > 0.01
    assert page.locator(".segment.given .wave").get_attribute("aria-label").startswith("sound, ")


def test_with_the_keyboard_alone(page: Any, service: Any, asked: list[Any]) -> None:
    """Typed words are heard; the button is held with a key; Escape stops."""
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.id") != "text":
        page.keyboard.press("Tab")
    page.keyboard.type("three one")
    page.select_option("#schedule", '["speech"]')
    page.keyboard.press("Enter")
    finished(page)
    written = service.model.generate([[("text", "three one")]], ["speech"])[0][1]
    assert tokens(page)[1] == f"{len(written.ids)} tokens"
    assert page.locator(".cell.written .tick").count() == len(written.ids)
    assert len(posted(page)) > 0
    while page.evaluate("document.activeElement.id") != "talk":
        page.keyboard.press("Shift+Tab")
    page.keyboard.down(" ")
    page.wait_for_selector("#talk.on[aria-pressed=true]")
    page.wait_for_timeout(500)
    page.keyboard.up(" ")
    finished(page)
    assert len(asked) == 2
    page.keyboard.down("Enter")
    page.wait_for_selector("#talk.on")
    page.keyboard.press("Escape")
    page.keyboard.up("Enter")
    page.wait_for_selector("#talk:not(.on)")
    assert page.inner_text(".turn:last-child .status") == "Stopped"
    assert len(asked) == 2


def test_a_short_press_and_one_by_a_screen_reader(page: Any, asked: list[Any]) -> None:
    """A tap says that one must hold; a press without a pointer or a key begins, and the next one ends."""
    page.click("#talk")
    page.wait_for_selector("#hint >> text=/Hold the button/")
    page.wait_for_selector("#talk:not(.on)")
    assert page.locator(".turn").count() == 0
    page.evaluate("talk.click()")
    page.wait_for_selector("#talk.on")
    page.wait_for_timeout(500)
    page.evaluate("talk.click()")
    finished(page)
    assert len(asked) == 1


def test_cancel_in_mid_answer(chromium: Any) -> None:
    """Nothing more is written, shown or heard; the next answer is as ever."""
    model = served_model(tokens=2000)
    for own in model.generation_settings.values():
        own["min_new_tokens"] = 2000
    with served(model) as service, running(service) as address, opened(chromium, address) as page:
        for spoken in (True, False):
            if spoken:
                talk(page)
            else:
                page.fill("#text", "three one")
                page.keyboard.press("Enter")
            page.wait_for_selector(".turn:last-child .cell.written .marks i")
            assert service.documents == 1
            page.click("#stop")
            assert page.inner_text(".turn:last-child .status") == "Stopped"
            until(lambda: service.documents == 0)
            assert page.locator(".turn:last-child .cell.written .marks i").count() < 2000
            assert page.evaluate("posted.at(-1)") == "clear"
            assert page.locator("#stop").is_disabled()


def test_talking_while_it_answers(chromium: Any) -> None:
    """It is interrupted: the answer that was on its way ends, and what is said now is answered."""
    model = served_model(tokens=1500)
    for own in model.generation_settings.values():
        own["min_new_tokens"] = 1500
    with served(model) as service, running(service) as address, opened(chromium, address) as page:
        talk(page)
        page.wait_for_selector(".cell.written .marks i")
        talk(page)
        page.wait_for_selector(".turn:last-child .cell.written .marks i")
        assert page.locator(".turn .status").all_inner_texts()[0] == "Stopped"
        assert service.documents == 1
        page.keyboard.press("Escape")
        until(lambda: service.documents == 0)


def until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_server_goes_away_and_comes_back(chromium: Any) -> None:
    """In mid-answer: the page says so, and goes on by itself when it is there again."""
    model = served_model(tokens=2000)
    model.generation_settings["text"]["min_new_tokens"] = 2000
    with contextlib.ExitStack() as stack:
        with served(model) as service, running(service, grace=0.2) as address:
            page = stack.enter_context(opened(chromium, address))
            talk(page)
            page.wait_for_selector(".cell.written .marks i")
        page.wait_for_selector("#banner:visible >> text=The server does not answer")
        assert page.inner_text(".turn [role=alert]") == "The connection broke off."
        assert page.locator("#talk").is_disabled()
        with served(served_model(tokens=20)) as service, running(service, port=int(address.rpartition(":")[2])):
            page.wait_for_selector("#talk:enabled")
            assert page.is_hidden("#banner")
            talk(page)
            finished(page)
            assert page.locator(".turn:last-child .cell.written .marks i").count()


def test_files_that_are_dropped(page: Any, service: Any) -> None:
    """A sound is transcribed; a picture goes along with words; what is no sound is refused in the server's words."""
    flac = base64.b64encode(sound_file("FLAC")).decode()
    page.evaluate(DROP, ["three.flac", "audio/flac", flac])
    page.wait_for_selector("#given:visible >> text=three.flac")
    page.select_option("#schedule", '["text"]')
    page.keyboard.press("Enter")
    finished(page)
    written = service.model.generate([[("speech", sound_file("FLAC"))]], ["text"])[0][1]
    assert page.inner_text(".segment.written .words").split() == written.value.split()
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), 200, dtype=np.uint8)).save(out, "PNG")
    page.evaluate(DROP, ["grey.png", "image/png", base64.b64encode(out.getvalue()).decode()])
    page.wait_for_selector("#given:visible >> text=grey.png")
    page.fill("#text", "one")
    page.select_option("#schedule", '["image"]')
    page.click("#send")
    finished(page)
    assert page.locator(".turn:last-child img").count() == 2
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    page.evaluate(DROP, ["notes.mp3", "audio/mpeg", base64.b64encode(b"no sound at all").decode()])
    page.wait_for_selector("#given:visible >> text=notes.mp3")
    page.click("#send")
    finished(page)
    assert "no sound file that this server knows" in page.inner_text(".turn:last-child [role=alert]")


def test_a_word_of_the_model_itself(page: Any) -> None:
    page.click("#begin")
    finished(page)
    assert page.locator(".segment.given").count() == 0
    assert page.inner_text(".segment.written .words")
    assert page.evaluate("heard") > 0.01


def test_at_a_phones_width(chromium: Any, address: str) -> None:
    """Nothing is wider than the page, and what is pressed with a finger is large enough for one."""
    small = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
    with opened(chromium, address, **small) as page:
        wide = "document.documentElement.scrollWidth"
        assert page.evaluate(wide) == 360
        page.click("#facts summary")
        assert page.evaluate(wide) == 360
        page.click("#facts summary")
        page.fill("#text", "three one four " * 20)
        page.keyboard.press("Enter")
        finished(page)
        assert page.evaluate(wide) == 360
        boxes = {name: page.locator(name).bounding_box() for name in ("#talk", "#attach", "#stop")}
        assert all(min(box["width"], box["height"]) >= 44 for box in boxes.values())
        away = finger(page, boxes["#talk"])
        page.wait_for_selector("#talk.on")
        page.wait_for_timeout(400)
        away()
        finished(page)
        assert page.locator(".turn:last-child .cell.written .marks i").count()
        assert page.evaluate(wide) == 360


def finger(page: Any, box: Any) -> Any:
    """Put a finger on the middle of a box; what is returned takes it away."""
    session = page.context.new_cdp_session(page)
    points = [{"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}]
    session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": points})
    return lambda: session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_a_finger_is_the_first_to_touch_it(chromium: Any, address: str) -> None:
    """Browsers let a page be heard once a finger is gone again, not when it comes: the first answer is heard."""
    with opened(chromium, address, has_touch=True) as page:
        for _ in range(2):  # the first may be lost to a question whether the microphone may be had
            away = finger(page, page.locator("#talk").bounding_box())
            page.wait_for_timeout(700)
            away()
            page.wait_for_selector("#talk:not(.on)")
        finished(page)
        assert page.locator(".turn:last-child .segment.written .words").count() == 1
        assert page.evaluate("heard") > 0.01


def test_everything_has_a_name_and_can_be_read(page: Any) -> None:
    """Each control says what it is; text stands out from what is behind it by 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    page.fill("#text", "three one")
    page.keyboard.press("Enter")
    page.wait_for_selector(".segment.written .again")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input:not([type=file]), select, a')].filter((e) => "
        "!(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    fronts = ("--ink", "--soft", "--text", "--sound", "--picture", "--ids", "--bad")
    pairs = [*((front, behind) for front in fronts for behind in ("--card", "--paper")), ("--on-accent", "--accent")]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colour = "(name) => getComputedStyle(document.body).getPropertyValue(name).trim()"
        for pair in pairs:
            assert contrast(*(page.evaluate(colour, name) for name in pair)) >= 4.5, (scheme, pair)


def contrast(one: str, other: str) -> float:
    """Of two colours as ``#rgb`` or ``#rrggbb`` (WCAG 2.2)."""
    bright = []
    for colour in (one, other):
        digits = colour.removeprefix("#")
        digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
        parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        bright.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(bright) + 0.05) / (min(bright) + 0.05)


def test_a_microphone_that_is_denied(chromium: Any, address: str) -> None:
    """It says so, and what is typed is answered all the same."""
    with opened(chromium, address, script=DENIED) as page:
        page.hover("#talk")
        page.mouse.down()
        page.wait_for_selector("#hint[data-kind=failed] >> text=The microphone was denied")
        page.mouse.up()
        assert "denied" in page.inner_text("#hint")
        page.fill("#text", "three one")
        page.keyboard.press("Enter")
        finished(page)
        assert page.locator(".cell.written").count()


def test_a_page_that_may_not_be_heard(chromium: Any, address: str) -> None:
    """Over plain HTTP from another machine browsers give no microphone and no worklet: what is written can be read."""
    with opened(
        chromium, address, script="Object.defineProperty(window, 'isSecureContext', { value: false });"
    ) as page:
        assert page.inner_text("#hint").startswith("Browsers let pages over HTTPS")
        assert page.locator("#talk").is_disabled()
        page.fill("#text", "three one")
        page.select_option("#schedule", '["speech"]')
        page.keyboard.press("Enter")
        finished(page)
        assert page.locator(".cell.written .tick").count()
        with page.expect_download() as caught:
            page.click(".segment.written .keep")
        sound, rate = soundfile.read(caught.value.path())
        assert rate == 24_000
        assert np.sqrt(np.mean(sound**2)) > 0.01


def test_a_model_that_cannot_listen(chromium: Any) -> None:
    """It says which modality lacks; the rest works."""
    with (
        served(served_model(("text", "image"))) as service,
        running(service) as address,
        opened(chromium, address) as page,
    ):
        assert page.inner_text("#hint") == f"{NAME} has no tower for sound: it cannot be talked to."
        assert page.locator("#talk").is_disabled()
        page.evaluate(DROP, ["three.wav", "audio/wav", base64.b64encode(sound_file()).decode()])
        page.wait_for_selector("#hint >> text=has no tower for sound: it reads image, text")
        page.fill("#text", "three one")
        page.keyboard.press("Enter")
        finished(page)
        assert page.locator(".segment.written img").count() == 1


def test_a_key(chromium: Any) -> None:
    """It is asked for, kept by the tab alone, and good for the websocket, too, whatever characters it has."""
    key = "a/b=c(d)%41,"
    with (
        served(served_model(tokens=20), key=key) as service,
        running(service) as address,
        opened(chromium, address, ready=False) as page,
    ):
        page.wait_for_selector("#ask:visible")
        for given in ("another", key):
            page.fill("#key", given)
            page.click("#ask button")
            page.wait_for_selector("#ask:visible" if given != key else "#talk:enabled")
        talk(page)
        finished(page)
        assert page.locator(".segment.written .words").count() == 1
        assert page.evaluate("[localStorage.length, document.cookie, location.href]") == [0, "", f"{address}/"]


def test_while_the_model_is_loaded(chromium: Any) -> None:
    """The page is there at once, and works once the model does."""
    with served() as service, running(service) as address:
        engine, service._engine = service._engine, None
        with opened(chromium, address, ready=False) as page:
            page.wait_for_selector("#banner:visible >> text=The model is being loaded")
            assert page.locator("#talk").is_disabled()
            service.begin(engine)
            page.wait_for_selector("#talk:enabled")
            assert page.is_hidden("#banner")


def test_what_it_is_made_of(client: Any) -> None:
    """Everything comes from this server, by a policy that lets nothing else in; no other file does."""
    found = client.get("/")
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert not re.search(r"unsafe|https?:|\*", policy)
    texts = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.iterdir()}
    for name, text in texts.items():
        part = client.get(f"/page/{name}")
        assert (part.status_code, part.text) == (200, text)
        assert part.headers["content-security-policy"] == policy
        assert client.get(f"/page/{name}", headers={"if-none-match": part.headers["etag"]}).status_code == 304
        assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        for other in re.findall(r"\"(?:\./|/page/)([^\"]+)\"", text):
            assert other in texts, (name, other)
        assert not re.search(r"innerHTML|document\.write|\beval\(|\son\w+=|\sstyle=", text), name
    for name in ("gate.py", "..%2fgate.py", "%2e%2e/gate.py", "index.html%00", ""):
        assert client.get(f"/page/{name}").status_code == 404


def test_all_of_it_is_in_the_wheel() -> None:
    import tomllib
    from pathlib import Path

    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["zipper_lm"]
    package = root / "src" / "zipper_lm"
    packed = {file for pattern in patterns for file in package.glob(pattern)}
    assert {package / "serve" / "page" / file.name for file in FOLDER.iterdir()} <= packed


def test_a_key_that_the_page_sends(client: Any) -> None:
    """A protocol's name may not have all of a key's characters: the page escapes them."""
    from starlette.testclient import WebSocketDenialResponse

    with served(key="a/b=%41") as service, client_of(service) as kept:
        at = "ws://127.0.0.1/v1/realtime"
        with kept.websocket_connect(at, subprotocols=["realtime", "zipper-api-key.a%2Fb%3D%2541"]) as socket:
            assert socket.receive_json()["type"] == "session.created"
            assert socket.accepted_subprotocol == "realtime"
        for wrong in ("zipper-api-key.a%2Fb%3D%41", "zipper-api-key.", "zipper-api-key.%ff"):
            with pytest.raises(WebSocketDenialResponse), kept.websocket_connect(at, subprotocols=["realtime", wrong]):
                pass
