// What is heard. Browsers let a page make sound only after somebody touched it: `open` is called from there.

import { RATE } from "./sound.js";

export class Player {
  #context = null;
  #node = null;
  #opening = null;
  #waiting = []; // messages for a worklet that is not there yet
  onchange = () => {};
  playing = false;

  /** Whether this page may play: a page over plain HTTP from another machine may not. */
  static get possible() {
    return window.isSecureContext && "AudioWorkletNode" in window;
  }

  open() {
    if (!Player.possible) return Promise.resolve();
    this.#opening ??= this.#open();
    this.#context?.resume();
    return this.#opening;
  }

  async #open() {
    this.#context = new AudioContext({ sampleRate: RATE });
    await this.#context.audioWorklet.addModule("/page/playback-worklet.js");
    this.#node = new AudioWorkletNode(this.#context, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
    this.#node.port.onmessage = () => this.#tell(false);
    this.#node.connect(this.#context.destination);
    for (const message of this.#waiting) this.#node.port.postMessage(message);
    this.#waiting = [];
  }

  /** Some more samples at 24 kHz. */
  add(samples) {
    if (!samples.length) return;
    this.#post(samples);
    this.#tell(true);
  }

  /** Nothing more comes: what is there is played to its end. */
  end() {
    if (this.playing) this.#post("end");
  }

  clear() {
    this.#post("clear");
    this.#tell(false);
  }

  /** Play a whole sound, from its beginning. */
  async play(samples) {
    await this.open();
    this.clear();
    this.add(samples);
    this.end();
  }

  #post(message) {
    if (this.#node) this.#node.port.postMessage(message);
    else if (Player.possible) this.#waiting.push(message);
  }

  #tell(playing) {
    this.playing = playing && Player.possible;
    this.onchange();
  }
}
