// The microphone is opened when it is first needed, and let go when nobody has talked for a while.

const KEPT = 30_000; // milliseconds

const WHY = {
  NotAllowedError: "The microphone was denied. Allow it for this page in your browser, then hold the button again.",
  NotFoundError: "There is no microphone here.",
  NotReadableError: "The microphone cannot be opened: perhaps another program has it.",
};

export class Microphone {
  #stream = null;
  #context = null;
  #node = null;
  #opening = null;
  #letting = 0;
  #heard = () => {};
  #stopped = () => {};

  /** Raises `Error` that says why, if it cannot be had. */
  open() {
    clearTimeout(this.#letting);
    if (this.#stream?.active) return Promise.resolve();
    this.#opening ??= this.#open().finally(() => (this.#opening = null));
    return this.#opening;
  }

  async #open() {
    if (!navigator.mediaDevices) {
      throw new Error("Browsers give the microphone to pages over HTTPS, or from this machine (127.0.0.1), alone.");
    }
    try {
      // who holds a button to talk hears nothing meanwhile; codecs were fitted on sound as it is
      const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true };
      this.#stream = await navigator.mediaDevices.getUserMedia({ audio });
    } catch (error) {
      throw new Error(WHY[error.name] ?? `The microphone cannot be opened: ${error.message}`);
    }
    await this.#context?.close();
    this.#context = new AudioContext();
    await this.#context.audioWorklet.addModule("/page/microphone-worklet.js");
    this.#node = new AudioWorkletNode(this.#context, "microphone", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
    this.#node.port.onmessage = ({ data }) => (data === "stopped" ? this.#stopped() : this.#heard(data));
    this.#context.createMediaStreamSource(this.#stream).connect(this.#node);
    this.resume();
  }

  /** To be called from where something was pressed: of a finger that goes down, browsers do not believe that yet. */
  resume() {
    this.#context?.resume();
  }

  /** From now on, `heard` is given Float32Arrays at 24 kHz. */
  start(heard) {
    this.#heard = heard;
    this.#node.port.postMessage("start");
  }

  /** Resolves once everything was given. */
  async stop() {
    await new Promise((resolve) => {
      this.#stopped = resolve;
      setTimeout(resolve, 500); // it may never have begun
      this.#node.port.postMessage("stop");
    });
    this.#letting = setTimeout(() => this.#letGo(), KEPT);
  }

  #letGo() {
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    this.#stream = null;
  }
}
