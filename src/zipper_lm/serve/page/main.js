// The page: what is pressed, typed and dropped, and what is shown of it.

import { Conversation } from "./conversation.js";
import { Microphone } from "./microphone.js";
import { Model } from "./model.js";
import { Player } from "./player.js";
import { Gone, Refused, Server } from "./server.js";
import { base64OfBytes, decoded, joined, levelOf, RATE, samplesOf } from "./sound.js";
import { make, Turn } from "./turn.js";

const at = (id) => document.getElementById(id);
const TAIL = 150; // milliseconds that are still heard when the button is let go: words end late
const KEPT = 50; // turns
const LEAST = 0.1; // seconds that can be answered
const INSECURE = "Browsers let pages over HTTPS, or from this machine (127.0.0.1), alone record and play sound: this one cannot.";
const HINT = "Hold to talk: mouse, finger, Space or Enter";
const STATES = {
  ok: "Ready", loading: "The model is being loaded…", ending: "The server is ending",
  failed: "The server's engine has failed", gone: "No server", locked: "A key is needed",
};
const BANNERS = {
  loading: "The model is being loaded. This page is ready once it is there.",
  ending: "The server is ending: nothing new is taken.",
  failed: "The server's engine has failed. Its log says why; start it anew.",
  gone: "The server does not answer. This page goes on as soon as it is back.",
};

const server = new Server();
const player = new Player();
const microphone = new Microphone();
const conversation = new Conversation(server, { lost: look, complain: (why) => (stopTalking(), hint(why, true)) });
let model = null;
let state = "";
let turn = null; // the newest
let abort = null; // of the document that is being written
let attached = null; // { name, modality, bytes, url }
let looking = 0;

// --- the server ----------------------------------------------------------------------------------------------------

/** See how the server is, and again after a while. */
async function look() {
  clearTimeout(looking);
  const now = await server.health();
  if (now !== "ok") model = null; // another may come
  if (now === "ok" && model === null && state !== "locked") await learn();
  else if (now !== "ok") become(now);
  clearTimeout(looking);
  looking = setTimeout(look, state === "ok" ? 5000 : 1500);
}

async function learn() {
  const asked = server.key;
  try {
    model = new Model(await server.model());
    become("ok");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) {
      if (server.key !== asked) return; // another key was given meanwhile: this answer is not about it
      server.remember(null);
      become("locked");
    } else become("gone");
  }
}

function become(now) {
  if (now === state && now !== "ok") return;
  const before = state;
  state = now;
  at("state").textContent = now === "ok" ? model.id : STATES[now];
  at("dot").dataset.state = now;
  at("banner").hidden = !(now in BANNERS);
  at("banner").textContent = BANNERS[now] ?? "";
  at("ask").hidden = now !== "locked";
  if (now === "locked") at("key").focus();
  at("facts").hidden = now !== "ok";
  if (now === "ok") introduce();
  refresh();
  if (now === "ok" && before === "locked") at("talk").focus();
}

/** Show what this model can do, and no more. */
function introduce() {
  at("sheet").replaceChildren(make("h2", "", model.id), model.table());
  const sound = model.of("sound");
  const picture = model.of("picture");
  const types = [sound ? ".wav,.flac,.mp3,.ogg,.opus" : "", picture ? "image/png,image/jpeg,image/webp,image/gif" : ""];
  at("file").accept = types.filter(Boolean).join(",");
  const what = [sound && "sound", picture && "picture"].filter(Boolean).join(" or ");
  at("attach").hidden = !what;
  at("attach").title = `Add a ${what}`;
  at("attach").setAttribute("aria-label", `Add a ${what}`);
  const text = model.of("text");
  at("typing").hidden = !text;
  at("begin").hidden = model.schedules([]).length === 0;
  usual();
  at("invitation").textContent = [
    mute() ? "" : "Hold the round button and speak.",
    text ? "Type something." : "",
    what ? `Drop a ${what}.` : "",
    "What each tower writes appears as it is written.",
  ].filter(Boolean).join(" ");
  offer();
}

/** Why nobody can talk to it here; "" if one can. */
function mute() {
  if (model.listens) return Player.possible ? "" : INSECURE;
  if (!model.of("sound")) return `${model.id} has no tower for sound: it cannot be talked to.`;
  return `${model.id} does not write text from sound: it cannot be talked to.`;
}

// --- what can be pressed now ---------------------------------------------------------------------------------------

function refresh() {
  const ready = state === "ok";
  const busy = Boolean(turn?.open) || player.playing;
  at("talk").disabled = !ready || mute() !== "";
  at("attach").disabled = at("begin").disabled = !ready;
  at("text").disabled = !ready;
  at("stop").disabled = !busy;
  at("send").disabled = !(ready && at("schedule").options.length && (at("text").value.trim() || attached));
  at("dock").classList.toggle("playing", player.playing);
}

player.onchange = refresh;

function hint(text, wrong = false) {
  at("hint").textContent = text;
  at("hint").dataset.kind = wrong ? "failed" : "";
}

/** What is said beside the button when there is nothing else to say. */
function usual() {
  if (model !== null) hint(mute() || HINT, mute() !== "");
}

function given() {
  const names = attached ? [attached.modality.name] : [];
  const text = model.of("text");
  return text && (at("text").value.trim() || !attached) ? [...names, text.name] : names;
}

/** Which schedules there are for what is given now. */
function offer() {
  const kept = at("schedule").value;
  const found = model.schedules(given());
  at("schedule").replaceChildren(...found.map((schedule) => {
    const option = make("option", "", `→ ${schedule.join(" → ")}`);
    option.value = JSON.stringify(schedule);
    return option;
  }));
  if (found.some((schedule) => JSON.stringify(schedule) === kept)) at("schedule").value = kept;
  at("schedule").hidden = found.length < 2;
  at("text").placeholder = attached ? "Add words, if you like" : "Or type something";
  refresh();
}

// --- turns ---------------------------------------------------------------------------------------------------------

function begin() {
  stop();
  at("welcome").hidden = true;
  turn = new Turn(model, (samples) => player.play(samples));
  at("turns").append(turn.element);
  while (at("turns").childElementCount > KEPT) at("turns").firstChild.remove();
  refresh();
  return turn;
}

/** Follow what is new, unless somebody reads further up. */
function scroll(whatever = false) {
  const { scrollHeight } = document.documentElement;
  if (whatever || scrollHeight - innerHeight - scrollY < 400) scrollTo({ top: scrollHeight });
}

function sounded(to, samples, name) {
  if (!to.open) return;
  to.writing(name).sound(samples);
  player.add(samples);
  scroll();
}

function finish(to, why = "", failed = false) {
  to.end(why, failed);
  if (to === turn) player.end();
  refresh();
  scroll();
}

/** Write no more, and be silent. */
function stop() {
  if (turn?.open) {
    conversation.cancel();
    abort?.abort();
    turn.end("Stopped");
  }
  player.clear();
  refresh();
}

// --- talking -------------------------------------------------------------------------------------------------------

let talking = null; // of the button, while it is held

async function startTalking() {
  if (talking !== null || at("talk").disabled) return;
  const held = (talking = { pieces: [], turn: null, ended: false });
  at("talk").setAttribute("aria-pressed", "true");
  hint("…");
  player.open().catch(() => {});
  stop();
  try {
    await microphone.open();
  } catch (error) {
    if (talking === held) letGo();
    hint(error.message, true);
    return;
  }
  if (talking !== held || held.ended || model === null) {
    hint("The microphone is there. Hold the button, and talk.");
    return;
  }
  at("talk").classList.add("on");
  hint("Listening… let go when you have done");
  conversation.open(model.id);
  held.turn = begin();
  const segment = held.turn.add(model.of("sound").name, false);
  held.turn.tell("Listening");
  scroll(true);
  microphone.start((samples) => {
    held.pieces.push(samples);
    conversation.append(samples);
    segment.sound(samples);
    at("talk").style.setProperty("--level", Math.min(1, 6 * levelOf(samples)).toFixed(3));
  });
}

async function stopTalking() {
  const held = talking;
  if (held === null || held.ended) return;
  held.ended = true;
  player.open().catch(() => {});
  microphone.resume();
  if (held.turn === null) {
    letGo();
    return;
  }
  await new Promise((resolve) => setTimeout(resolve, TAIL));
  await microphone.stop();
  letGo();
  if (!held.turn.open) {
    conversation.clear(); // it was stopped, or the server is gone
    return;
  }
  if (joined(held.pieces).length < LEAST * RATE + (TAIL / 1000) * RATE) {
    conversation.clear();
    held.turn.element.remove();
    held.turn.end();
    hint("Hold the button for as long as you talk.", true);
    refresh();
    return;
  }
  answer(held.turn);
}

function letGo() {
  talking = null;
  at("talk").classList.remove("on");
  at("talk").setAttribute("aria-pressed", "false");
  at("talk").style.removeProperty("--level");
  usual();
}

function answer(to) {
  const [text, sound] = [to.model.of("text").name, to.model.of("sound").name];
  to.tell(`The ${text} tower listens`);
  conversation.respond({
    written(more) {
      if (to.open) to.writing(text).token(null, more);
      scroll();
    },
    sounded: (samples) => sounded(to, samples, sound),
    finished(response) {
      const failed = response.status === "failed";
      if (to.open && response.usage) count(to, response.usage, text);
      finish(to, failed ? response.status_details.error.message : "", failed);
    },
    failed: (why) => finish(to, why, true),
  });
}

/** A spoken conversation tells how many tokens there were when all is done. */
function count(to, usage, text) {
  const [heard, ...written] = to.segments;
  heard.count(usage.input_token_details.audio_tokens);
  for (const segment of written) {
    const { text_tokens: words, audio_tokens: sounds } = usage.output_token_details;
    segment.count(segment.modality.name === text ? words : sounds);
  }
}

const button = at("talk");
button.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  button.setPointerCapture(event.pointerId);
  startTalking();
});
for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) button.addEventListener(name, stopTalking);
button.addEventListener("contextmenu", (event) => event.preventDefault());
const holds = (event) => event.key === " " || event.key === "Enter";
button.addEventListener("keydown", (event) => {
  if (!holds(event)) return;
  event.preventDefault();
  if (!event.repeat) startTalking();
});
button.addEventListener("keyup", (event) => {
  if (holds(event)) event.preventDefault(), stopTalking();
});
button.addEventListener("blur", stopTalking);
button.addEventListener("click", (event) => {
  // a screen reader or a voice presses without holding: once to begin, once to end
  if (event.detail === 0) talking === null ? startTalking() : stopTalking();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
at("stop").addEventListener("click", stop);

// --- typing, and files ---------------------------------------------------------------------------------------------

/** Have the next segments of a document written. `segments`: modality, value, and how it is shown. */
async function write(segments, schedule, settings = {}) {
  player.open().catch(() => {});
  const to = begin();
  const own = (abort = new AbortController());
  for (const { modality, show } of segments) show(to.add(modality, false));
  to.tell("Waiting for the first token");
  scroll(true);
  const told = segments.map(({ modality, value }) => ({ modality, ...value }));
  const body = { model: model.id, document: told, schedule, settings, audio_format: "pcm" };
  try {
    for await (const event of server.write(body, own.signal)) follow(to, event);
    if (to.open) finish(to);
  } catch (error) {
    if (error.name === "AbortError") return;
    finish(to, error.message, true);
    if (error instanceof Gone || [401, 404, 503].includes(error.status)) {
      model = null; // another server may be there now
      look();
    }
  }
}

function follow(to, event) {
  if (!to.open) return;
  switch (event.type) {
    case "segment.started":
      to.add(event.modality, true);
      break;
    case "token":
      to.segments[event.segment].token(event.id, event.text);
      break;
    case "audio.delta":
      sounded(to, samplesOf(event.audio), event.modality);
      break;
    case "segment.done":
      if (event.rest) to.segments[event.segment].text(event.rest);
      break;
    case "document.done":
      event.document.segments.forEach((segment, number) => {
        to.segments[number].count(segment.tokens);
        if (segment.image) to.segments[number].picture(segment.image);
      });
  }
  if (event.type !== "document.done") scroll();
}

at("typing").addEventListener("submit", (event) => {
  event.preventDefault();
  if (at("send").disabled) return;
  const text = at("text").value.trim();
  const segments = [];
  if (attached) segments.push(segmentOf(attached));
  if (text) segments.push({ modality: model.of("text").name, value: { text }, show: (s) => s.text(text) });
  const schedule = JSON.parse(at("schedule").value);
  at("text").value = "";
  attach(null);
  write(segments, schedule);
});

at("begin").addEventListener("click", () => {
  const [schedule] = model.schedules([]);
  write([], schedule, { [schedule[0]]: { do_sample: true } });
  at("text").focus({ preventScroll: true });
});

at("text").addEventListener("input", offer);
at("schedule").addEventListener("change", refresh);

function segmentOf({ modality, bytes, url, samples }) {
  if (modality.kind === "picture") return { modality: modality.name, value: { image: url }, show: (s) => s.picture(url) };
  const show = (s) => (samples ? s.sound(samples) : s.text("a sound file"));
  return { modality: modality.name, value: { audio: base64OfBytes(bytes) }, show };
}

async function take(file) {
  if (!file || state !== "ok") return;
  const picture = file.type.startsWith("image/");
  const modality = model.of(picture ? "picture" : "sound");
  if (!modality) {
    hint(`${model.id} has no tower for ${picture ? "pictures" : "sound"}: it reads ${model.modalities.map((m) => m.name).join(", ")}.`, true);
    return;
  }
  const bytes = new Uint8Array(await file.arrayBuffer());
  const url = picture ? `data:${file.type};base64,${base64OfBytes(bytes)}` : null;
  attach({ name: file.name, modality, bytes, url, samples: picture ? null : await decoded(bytes) });
  at("send").focus();
}

function attach(file) {
  attached = file;
  at("given").hidden = !file;
  at("given").replaceChildren();
  if (file) {
    const away = make("button", "away", "×");
    away.type = "button";
    away.setAttribute("aria-label", `Do without ${file.name}`);
    away.addEventListener("click", () => (attach(null), at("text").focus()));
    at("given").append(make("span", "", file.name), away);
    hint(`${file.name} is ready to be sent`);
  } else usual();
  at("file").value = "";
  if (model) offer();
}

at("attach").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => take(at("file").files[0]));

let over = 0; // elements that a drag has entered and not left
const files = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragenter", (event) => files(event) && (over++, (at("drop").hidden = false)));
addEventListener("dragleave", (event) => files(event) && --over <= 0 && (at("drop").hidden = true));
addEventListener("dragover", (event) => files(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!files(event)) return;
  event.preventDefault();
  over = 0;
  at("drop").hidden = true;
  take(event.dataTransfer.files[0]);
});

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  server.remember(at("key").value.trim());
  at("key").value = "";
  state = "";
  look();
});

look();
