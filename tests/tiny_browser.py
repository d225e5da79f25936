"""The system's Chromium, driven by Playwright, with a microphone that hears a file."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)
LISTENING = """
window.posted = [];   // what goes to the playback worklet: sounds, and words
window.heard = 0;     // the loudest that came out of it
const post = MessagePort.prototype.postMessage;
MessagePort.prototype.postMessage = function (message, ...rest) {
  window.posted.push(message instanceof Float32Array ? Array.from(message) : message);
  return post.call(this, message, ...rest);
};
const connect = AudioNode.prototype.connect;
AudioNode.prototype.connect = function (to, ...rest) {
  if (to instanceof AudioDestinationNode) {
    const ear = new AnalyserNode(this.context);
    const samples = new Float32Array(ear.fftSize);
    connect.call(this, ear);
    setInterval(() => {
      ear.getFloatTimeDomainData(samples);
      window.now = Math.max(...samples.map(Math.abs));
      window.heard = Math.max(window.heard, window.now);
    }, 20);
  }
  return connect.call(this, to, ...rest);
};
"""


@contextlib.contextmanager
def browser(wave: np.ndarray, rate: int, folder: Path) -> Iterator[Any]:
    """A browser whose microphone hears `wave`, float32 [time], again and again. Skips the test where there is none."""
    if EXECUTABLE is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the driver `playwright`")
    file = folder / "microphone.wav"
    soundfile.write(file, wave, rate, subtype="PCM_16")
    arguments = [*ARGUMENTS, f"--use-file-for-fake-audio-capture={file}"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=EXECUTABLE, args=arguments, headless=True)
        try:
            yield chromium
        finally:
            chromium.close()


@contextlib.contextmanager
def opened(chromium: Any, address: str, *, ready: bool = True, script: str = "", **how: Any) -> Iterator[Any]:
    """A page of its own, listened to. Whatever it finds wrong in itself fails the test.

    Args:
        ready: wait until it can be used. script: run before its own. how: as of Playwright's `new_context`.
    """
    context = chromium.new_context(**{"viewport": {"width": 900, "height": 760}, **how})
    context.set_default_timeout(15_000)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: wrong.append(told.text) if "Content Security Policy" in told.text else None)
    page.add_init_script(LISTENING + script)
    page.goto(address)
    try:
        if ready:
            page.wait_for_selector("#text:enabled")
        yield page
        assert not wrong
    finally:
        context.close()
