// One turn: a document, its segments to be read and heard, and a strip that shows which tower writes what.

import { joined, levelOf, RATE, wavOf } from "./sound.js";

const EACH = 0.08; // seconds of sound to a mark of the strip
const PEAKS = 25; // a second, of a sound that is drawn
const BARS = 100; // at most: more peaks share them

/** An element. */
export function make(kind, className = "", text = "") {
  const element = document.createElement(kind);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

export class Turn {
  segments = [];
  open = true;

  /** `play(samples)` is called to hear a segment again. */
  constructor(model, play) {
    this.model = model;
    this.play = play;
    this.element = make("article", "turn");
    this.element.setAttribute("aria-busy", "true");
    this.said = make("div", "said");
    this.strip = new Strip(model);
    this.status = make("p", "status");
    this.element.append(this.said, this.strip.element, this.status);
  }

  /** A segment; `written` by a tower, or given by somebody. */
  add(name, written) {
    this.segments.at(-1)?.end();
    const segment = new Segment(this.model.named(name), written, this.play);
    this.segments.push(segment);
    this.said.append(segment.element);
    segment.cell = this.strip.cell(segment);
    const sources = this.segments.map((s) => s.modality.name).filter((s) => segment.modality.reads.includes(s));
    const reading = sources.length ? `, reading ${[...new Set(sources)].join(" and ")}` : "";
    this.tell(written ? `The ${name} tower writes${reading}` : "");
    return segment;
  }

  /** The segment that is being written in a modality; a new one if another was. */
  writing(name) {
    const last = this.segments.at(-1);
    return last?.written && last.modality.name === name ? last : this.add(name, true);
  }

  tell(text, kind = "") {
    this.status.textContent = text;
    this.status.dataset.kind = kind;
  }

  /** Nothing more comes. `why`: shown; a failure if `failed`. */
  end(why = "", failed = false) {
    if (!this.open) return;
    this.open = false;
    this.segments.at(-1)?.end();
    this.strip.rest();
    this.tell(why, failed ? "failed" : "");
    if (failed) this.status.setAttribute("role", "alert");
    this.element.removeAttribute("aria-busy");
  }
}

class Segment {
  pieces = [];
  words = null;

  constructor(modality, written, play) {
    this.modality = modality;
    this.written = written;
    this.play = play;
    this.cell = null; // in the strip
    this.element = make("section", `segment ${written ? "written" : "given"} kind-${modality.kind ?? "ids"}`);
    this.element.append(make("h3", "", written ? `${modality.name} tower` : `you · ${modality.name}`));
  }

  /** Some more text. */
  text(more) {
    if (this.words === null) this.element.append((this.words = make("p", "words")));
    this.words.textContent += more;
  }

  /** One more token, and the text that it adds; of others than text, its id. */
  token(id, text) {
    if (text) this.text(text);
    this.cell.token(id, text);
  }

  /** Some more sound. */
  sound(samples) {
    this.pieces.push(samples);
    if (!this.wave) this.#wave();
    this.wave.add(samples);
    this.cell.sound(samples);
  }

  #wave() {
    this.wave = new Wave();
    const again = make("button", "again");
    again.type = "button";
    again.setAttribute("aria-label", `Play the ${this.modality.name} again`);
    again.addEventListener("click", () => this.play(joined(this.pieces)));
    const keep = make("a", "keep", "Save");
    keep.download = "zipper.wav";
    keep.href = "#";
    keep.addEventListener("click", () => {
      keep.href = URL.createObjectURL(wavOf(joined(this.pieces)));
      setTimeout(() => URL.revokeObjectURL(keep.href), 1000);
    });
    const line = make("div", "heard");
    line.append(again, this.wave.element, this.wave.length, keep);
    this.element.append(line);
  }

  picture(url) {
    const image = make("img");
    image.src = url;
    image.alt = this.written ? `What the ${this.modality.name} tower wrote` : "Your picture";
    this.element.append(image);
  }

  /** How many tokens it has, where that is told. */
  count(tokens) {
    this.cell.count(tokens);
  }

  end() {
    this.cell.end();
  }
}

/** A sound's loudness over time. */
class Wave {
  #peaks = [];
  #total = 0;
  #drawing = 0;

  constructor() {
    this.element = make("canvas", "wave");
    this.element.height = 64;
    this.element.setAttribute("role", "img");
    this.length = make("span", "length");
  }

  add(samples) {
    const each = RATE / PEAKS;
    samples.forEach((x, n) => {
      const peak = Math.floor((this.#total + n) / each);
      this.#peaks[peak] = Math.max(this.#peaks[peak] ?? 0, Math.abs(x));
    });
    this.#total += samples.length;
    const seconds = (this.#total / RATE).toFixed(1);
    this.length.textContent = `${seconds} s`;
    this.element.setAttribute("aria-label", `sound, ${seconds} seconds`);
    cancelAnimationFrame(this.#drawing);
    this.#drawing = requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    const { height } = this.element;
    const bars = Math.max(1, Math.min(BARS, this.#peaks.length));
    const step = 8; // of two to a pixel of the page
    this.element.width = bars * step; // this clears it
    this.element.style.setProperty("--wide", `${(bars * step) / 2}px`);
    const paint = this.element.getContext("2d");
    paint.fillStyle = getComputedStyle(this.element).color;
    for (let n = 0; n < bars; n++) {
      const [first, last] = [n, n + 1].map((bar) => Math.floor((bar * this.#peaks.length) / bars));
      const peak = Math.max(...this.#peaks.slice(first, last));
      const tall = Math.max(4, Math.sqrt(Math.min(1, peak)) * height);
      paint.beginPath();
      paint.roundRect(n * step, (height - tall) / 2, 5, tall, 2.5);
      paint.fill();
    }
  }
}

/** A lane for each tower, segments in the order of the document. */
class Strip {
  columns = 0;

  constructor(model) {
    this.element = make("div", "strip");
    this.element.tabIndex = 0;
    this.element.setAttribute("role", "list");
    this.element.setAttribute("aria-label", "The document: segments, and the tower that wrote each");
    this.rows = new Map(model.modalities.map((m, n) => [m.name, n + 1]));
    for (const [name, row] of this.rows) {
      const lane = make("span", "lane", name);
      lane.style.gridRow = row;
      lane.setAttribute("aria-hidden", "true");
      const line = make("span", "rail");
      line.style.gridRow = row;
      this.element.append(line, lane);
    }
  }

  cell(segment) {
    this.columns += 1;
    const cell = new Cell(segment, this.rows.get(segment.modality.name), this.columns + 1);
    for (const rail of this.element.querySelectorAll(".rail")) rail.style.gridColumn = `1 / ${this.columns + 2}`;
    for (const other of this.element.querySelectorAll(".cell")) {
      other.classList.toggle("read", segment.written && segment.modality.reads.includes(other.dataset.name));
    }
    this.element.append(cell.element);
    cell.follow = () => (this.element.scrollLeft = this.element.scrollWidth);
    return cell;
  }

  rest() {
    for (const cell of this.element.querySelectorAll(".cell")) cell.classList.remove("read");
    this.element.scrollLeft = 0;
  }
}

/** One segment in the strip: its tokens, as they come. */
class Cell {
  tokens = 0;
  #marked = 0; // seconds of sound
  #heard = 0;
  follow = () => {};

  constructor(segment, row, column) {
    this.segment = segment;
    const { modality, written } = segment;
    this.element = make("div", `cell ${written ? "written open" : "given"} kind-${modality.kind ?? "ids"}`);
    this.element.dataset.name = modality.name;
    this.element.setAttribute("role", "listitem");
    this.element.style.gridRow = row;
    this.element.style.gridColumn = column;
    this.marks = make("span", "marks");
    this.marks.setAttribute("aria-hidden", "true");
    this.told = make("span", "told");
    this.element.append(this.marks, this.told);
    this.count(null);
  }

  token(id, text) {
    const mark = make("i", text === undefined ? "tick" : "piece", text === undefined ? "" : text.replace(/\s/g, "▁") || "·");
    if (text === undefined) mark.style.setProperty("--tall", ((id * 0.618034) % 1).toFixed(3)); // one height an id
    if (id !== null) mark.title = `token ${id}`;
    this.marks.append(mark);
    this.count(this.tokens + 1);
    this.follow();
  }

  /** Some more sound; where its tokens are not told one by one, loudness stands for them. */
  sound(samples) {
    if (this.tokens) return;
    this.#heard += samples.length / RATE;
    for (; this.#marked + EACH <= this.#heard; this.#marked += EACH) {
      const mark = make("i", "tick");
      mark.style.setProperty("--tall", Math.min(1, Math.sqrt(2 * levelOf(samples))).toFixed(3));
      this.marks.append(mark);
    }
    this.follow();
  }

  count(tokens) {
    if (tokens !== null) this.tokens = tokens;
    const { modality, written } = this.segment;
    const number = tokens === null ? "" : `${tokens} ${tokens === 1 ? "token" : "tokens"}`;
    this.told.textContent = written ? number : number ? `you · ${number}` : "you";
    const who = written ? `written by the ${modality.name} tower` : "given by you";
    this.element.setAttribute("aria-label", [modality.name, who, number].filter(Boolean).join(", "));
  }

  end() {
    this.element.classList.remove("open");
  }
}
