"""Take the pictures of the page in docs/: a real model is talked to, and typed at, in the system's Chromium.

python tools/page_pictures.py zipper-demo/model zipper-demo/audio/NN-input.wav
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from playwright.sync_api import sync_playwright

from zipper_lm import Engine, load
from zipper_lm.serve.lifecycle import Server, listen
from zipper_lm.serve.service import Service

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = {"page": ("light", 860, 700), "page-phone": ("dark", 360, 700)}


def main() -> None:
    """Serve, talk, and write docs/page.webp and docs/page-phone.webp."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("sound", type=Path, help="what is said")
    given = parser.parse_args()
    service = Service("zipper-demo")
    service.begin(Engine(load(given.model).eval(), slots=2, compile=False))
    server, listening = Server(service, 1.0), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        take(f"http://127.0.0.1:{listening.getsockname()[1]}", given.sound)
    finally:
        server.should_exit = True
        thread.join(20)
        service.close()


def take(address: str, sound: Path) -> None:
    """Each picture."""
    wave, rate = soundfile.read(sound, dtype="float32")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "said.wav"
        soundfile.write(file, np.concatenate([wave, np.zeros(10 * rate, np.float32)]), rate, subtype="PCM_16")
        arguments = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        for name, (scheme, width, height) in PICTURES.items():
            browser = driver.chromium.launch(  # anew: the microphone begins at the beginning
                executable_path=shutil.which("chromium"),
                args=[*arguments, f"--use-file-for-fake-audio-capture={file}"],
                headless=True,
            )
            size: Any = {"width": width, "height": height}
            page = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=1.5)  # type: ignore[arg-type]
            page.goto(address)
            if name == "page":
                page.hover("#talk:enabled")
                page.mouse.down()
                page.wait_for_selector("#talk.on")
                page.wait_for_timeout(1000 * len(wave) / rate)
                page.mouse.up()
            else:
                page.fill("#text", "turn on the office light")
                page.keyboard.press("Enter")
            page.wait_for_selector(".cell.written .tick:nth-child(12)", timeout=60_000)
            page.wait_for_timeout(50)
            Image.open(io.BytesIO(page.screenshot())).save(DOCS / f"{name}.webp", quality=82, method=6)
            browser.close()


if __name__ == "__main__":
    main()
