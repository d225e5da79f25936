// The server's routes, as this page uses them. The key is kept by the tab, and sent in a header alone.

const KEPT = "zipper-key";

/** A request that was not served: `status` of HTTP, and the server's words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Nobody answers. */
export class Gone extends Error {}

export class Server {
  constructor() {
    this.key = sessionStorage.getItem(KEPT);
  }

  remember(key) {
    this.key = key;
    if (key === null) sessionStorage.removeItem(KEPT);
    else sessionStorage.setItem(KEPT, key);
  }

  /** "ok", "loading", "ending", "failed", or "gone". */
  async health() {
    try {
      const answer = await fetch("/health", { signal: AbortSignal.timeout(8000) });
      return (await answer.json()).status;
    } catch {
      return "gone";
    }
  }

  /** The one model that is served, with its modalities. */
  async model() {
    return (await (await this.#fetch("/v1/models")).json()).data[0];
  }

  /** Have a document written; yields the events of `POST /v1/documents` until `signal` is aborted. */
  async *write(body, signal) {
    const headers = { "content-type": "application/json" };
    const answer = await this.#fetch("/v1/documents", {
      method: "POST", headers, signal, body: JSON.stringify({ ...body, stream: true }),
    });
    for await (const event of eventsOf(answer.body)) {
      if (event.error) throw new Refused(answer.status, event.error.message);
      yield event;
    }
  }

  /** A websocket of `/v1/realtime`. A browser sends no header with one: the key is the name of a protocol there. */
  socket(model) {
    const protocols = ["realtime"];
    if (this.key !== null) protocols.push(`zipper-api-key.${inToken(this.key)}`);
    const at = new URL(`/v1/realtime?model=${encodeURIComponent(model)}`, location.href);
    at.protocol = at.protocol.replace("http", "ws");
    return new WebSocket(at, protocols);
  }

  async #fetch(path, how = {}) {
    const headers = { ...how.headers, ...(this.key === null ? {} : { authorization: `Bearer ${this.key}` }) };
    let answer;
    try {
      answer = await fetch(path, { ...how, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Gone("The server does not answer.");
    }
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => null);
    throw new Refused(answer.status, told?.error?.message ?? `The server answered ${answer.status}.`);
  }
}

/** Server-sent events, each one line of JSON. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n\n");
      rest = lines.pop();
      for (const line of lines) yield JSON.parse(line.slice("data: ".length));
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Gone("The server broke off.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A protocol's name may hold few characters; the rest is escaped. */
function inToken(key) {
  return encodeURIComponent(key).replace(/[()]/g, (c) => (c === "(" ? "%28" : "%29"));
}
