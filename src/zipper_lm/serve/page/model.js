// What the served model can do, from `GET /v1/models`, and how it is told to people.

const USUAL = { text: "text", sound: "speech", picture: "image" };

export class Model {
  constructor(facts) {
    this.id = facts.id;
    this.modalities = facts.modalities;
  }

  named(name) {
    return this.modalities.find((m) => m.name === name);
  }

  /** The modality of a kind, by its usual name where there are several; as the server chooses. */
  of(kind) {
    const found = this.modalities.filter((m) => m.kind === kind);
    return found.find((m) => m.name === USUAL[kind]) ?? found[0];
  }

  reads(reader, source) {
    return this.named(reader).reads.includes(source);
  }

  /** Whether it can be talked to. */
  get listens() {
    const [text, sound] = [this.of("text"), this.of("sound")];
    return Boolean(text && sound && this.reads(text.name, sound.name));
  }

  /** What may be written after segments of these modalities, most wanted first; lists of names. */
  schedules(given) {
    const text = this.of("text");
    const able = this.modalities.filter((m) => m.written);
    const first = given.length
      ? able.filter((m) => given.some((name) => name !== m.name && this.reads(m.name, name)))
      : able.filter((m) => m === text);
    const found = [];
    for (const m of first) {
      found.push([m.name]);
      if (m !== text) continue;
      const after = able.filter((next) => next !== m && this.reads(next.name, m.name));
      found.push(...after.map((next) => [m.name, next.name]));
    }
    const heard = (schedule) => this.named(schedule.at(-1)).kind === "sound";
    const typed = given.length > 0 && given.every((name) => name === text?.name);
    const worth = (s) => 4 * heard(s) + 2 * (!typed && s[0] === text?.name) + (s.length === 1);
    return found.sort((a, b) => worth(b) - worth(a));
  }

  /** Its towers as a table. */
  table() {
    const rows = this.modalities.map((m) => [
      m.name,
      m.kind ?? "ids",
      count(m.parameters),
      m.tower === "frozen" ? "frozen" : "trained",
      m.reads.join(", ") || "nothing",
    ]);
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const name of ["tower", "kind", "weights", "training", "reads"]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = name;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      for (const value of row) line.insertCell().textContent = value;
    }
    return table;
  }
}

/** 1661280 -> "1.7 M". */
function count(n) {
  const [by, unit] = n >= 1e9 ? [1e9, " G"] : n >= 1e6 ? [1e6, " M"] : n >= 1e3 ? [1e3, " k"] : [1, ""];
  return `${(n / by).toFixed(by > 1 && n / by < 100 ? 1 : 0)}${unit}`;
}
