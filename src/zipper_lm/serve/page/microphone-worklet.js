// What the microphone hears, at 24 kHz, in pieces of 40 ms, between "start" and "stop".

const RATE = 24000;
const PIECE = 960;
const WIDTH = 16; // zeros of the sinc on each side
const FINE = 256; // places between two samples that the filter is known at

/** From one rate to another, as a stream: a sinc below the lower rate's limit, in a Hann window. */
class Resampler {
  constructor(from, to) {
    this.step = from / to;
    const cut = 0.95 * Math.min(1, to / from);
    this.half = Math.ceil(WIDTH / cut);
    this.filter = Float32Array.from({ length: this.half * FINE + 1 }, (_, n) => {
      const t = n / FINE;
      const sinc = t === 0 ? 1 : Math.sin(Math.PI * cut * t) / (Math.PI * cut * t);
      return cut * sinc * (0.5 + 0.5 * Math.cos((Math.PI * t) / this.half));
    });
    this.reset();
  }

  reset() {
    this.held = new Float32Array(this.half);
    this.at = this.half; // of the next sample, among those held
  }

  add(samples) {
    const held = new Float32Array(this.held.length + samples.length);
    held.set(this.held);
    held.set(samples, this.held.length);
    const out = [];
    for (; this.at + this.half < held.length; this.at += this.step) {
      const first = Math.ceil(this.at - this.half);
      const last = Math.floor(this.at + this.half);
      let sum = 0;
      for (let n = first; n <= last; n++) sum += held[n] * this.filter[Math.round(Math.abs(n - this.at) * FINE)];
      out.push(sum);
    }
    const past = Math.floor(this.at) - this.half;
    this.held = held.slice(past);
    this.at -= past;
    return out;
  }
}

class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.open = false;
    this.heard = [];
    this.resampler = new Resampler(sampleRate, RATE);
    this.port.onmessage = ({ data }) => {
      if (data === "start") {
        this.open = true;
        this.heard = [];
        this.resampler.reset();
      } else if (this.open) {
        this.open = false;
        this.take(new Float32Array(this.resampler.half));
        this.send(this.heard.length);
        this.port.postMessage("stopped");
      }
    };
  }

  take(samples) {
    this.heard.push(...this.resampler.add(samples));
  }

  send(count) {
    if (count) this.port.postMessage(Float32Array.from(this.heard.splice(0, count)));
  }

  process([channels]) {
    if (this.open && channels.length) {
      this.take(channels[0]);
      while (this.heard.length >= PIECE) this.send(PIECE);
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
