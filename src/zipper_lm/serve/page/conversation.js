// Push to talk, by `WS /v1/realtime`. What is said before the socket is open waits.

import { base64Of, samplesOf } from "./sound.js";

export class Conversation {
  #socket = null;
  #waiting = [];
  #next = null; // who is told of the response that was asked for
  #told = new Map(); // response id -> who is told of it
  #asked = false;
  #unwanted = false; // what was asked for and has not begun

  /** `lost()`: a socket closed. `complain(why)`: something said was not taken, and no answer was asked for yet. */
  constructor(server, { lost, complain }) {
    this.server = server;
    this.lost = lost;
    this.complain = complain;
  }

  open(model) {
    if (this.#socket !== null) return;
    const socket = this.server.socket(model);
    this.#socket = socket;
    socket.onopen = () => {
      for (const message of this.#waiting.splice(0)) socket.send(message);
    };
    socket.onmessage = ({ data }) => this.#hear(JSON.parse(data));
    socket.onclose = () => {
      if (this.#socket !== socket) return;
      const left = [...this.#told.values(), ...(this.#next ? [this.#next] : [])];
      this.#socket = this.#next = null;
      this.#waiting = [];
      this.#told.clear();
      this.#asked = false;
      for (const turn of left) turn.failed("The connection broke off.");
      this.lost();
    };
  }

  append(samples) {
    this.#send({ type: "input_audio_buffer.append", audio: base64Of(samples) });
  }

  clear() {
    this.#send({ type: "input_audio_buffer.clear" });
  }

  /** What was appended is answered. `turn` has written(text), sounded(samples), finished(response), failed(why). */
  respond(turn) {
    if (this.#socket === null) {
      turn.failed("The connection broke off.");
      return;
    }
    this.#next = turn;
    this.#unwanted = false;
    this.#send({ type: "input_audio_buffer.commit" });
    if (!this.#asked) this.#ask();
  }

  /** No more of what is being answered. */
  cancel() {
    if (this.#next !== null) this.#unwanted = true;
    for (const id of this.#told.keys()) this.#send({ type: "response.cancel", response_id: id });
  }

  #ask() {
    this.#asked = true;
    this.#send({ type: "response.create" });
  }

  #send(message) {
    const text = JSON.stringify(message);
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(text);
    else if (this.#socket?.readyState === WebSocket.CONNECTING) this.#waiting.push(text);
  }

  #hear(event) {
    const turn = this.#told.get(event.response_id);
    switch (event.type) {
      case "response.created":
        this.#told.set(event.response.id, this.#next);
        this.#next = null;
        if (this.#unwanted) this.cancel();
        break;
      case "response.output_audio_transcript.delta":
      case "response.output_text.delta":
        turn?.written(event.delta);
        break;
      case "response.output_audio.delta":
        turn?.sounded(samplesOf(event.delta));
        break;
      case "response.done":
        this.#told.get(event.response.id)?.finished(event.response);
        this.#told.delete(event.response.id);
        this.#asked = false;
        if (this.#next !== null) this.#ask();
        break;
      case "error":
        this.#fail(event.error);
    }
  }

  #fail(error) {
    if (error.code === "response_cancel_not_active") return; // it had just ended
    const turn = this.#next;
    this.#next = null;
    if (turn !== null) {
      this.#asked = this.#told.size > 0;
      turn.failed(error.message);
    } else if (error.code !== "conversation_empty") this.complain(error.message); // that follows another error
  }
}
