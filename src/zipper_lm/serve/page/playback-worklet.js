// Plays samples as they come. It begins, and goes on after a gap, once there is enough for a while.

const AHEAD = 0.15; // seconds

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.clear();
    this.port.onmessage = ({ data }) => {
      if (data === "clear") this.clear();
      else if (data === "end") this.ended = true;
      else {
        this.pieces.push(data);
        this.waiting += data.length;
        this.ended = false;
      }
    };
  }

  clear() {
    this.pieces = [];
    this.at = this.waiting = 0;
    this.ended = this.playing = false;
  }

  process(_, [channels]) {
    const [out] = channels;
    const enough = this.playing || this.ended || this.waiting >= AHEAD * sampleRate;
    let filled = 0;
    while (enough && filled < out.length && this.pieces.length) {
      const piece = this.pieces[0].subarray(this.at, this.at + out.length - filled);
      out.set(piece, filled);
      filled += piece.length;
      this.at += piece.length;
      if (this.at === this.pieces[0].length) {
        this.pieces.shift();
        this.at = 0;
      }
    }
    this.waiting -= filled;
    const playing = enough && filled > 0;
    if (playing !== this.playing || (this.ended && !playing)) {
      this.playing = playing;
      if (!playing && this.ended) {
        this.ended = false;
        this.port.postMessage("done");
      }
    }
    return true;
  }
}

registerProcessor("playback", Playback);
