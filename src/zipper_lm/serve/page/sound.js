// Sound: float samples at 24 kHz, 16-bit samples in base64, and files.

export const RATE = 24000;

/** Base64 of 16-bit little-endian samples -> Float32Array. */
export function samplesOf(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length >> 1 }, (_, n) => view.getInt16(2 * n, true) / 32768);
}

/** Float32Array -> base64 of 16-bit little-endian samples. */
export function base64Of(samples) {
  const view = new DataView(new ArrayBuffer(2 * samples.length));
  samples.forEach((x, n) => view.setInt16(2 * n, Math.round(Math.max(-1, Math.min(1, x)) * 32767), true));
  return base64OfBytes(new Uint8Array(view.buffer));
}

export function base64OfBytes(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(text);
}

/** Several pieces as one. */
export function joined(pieces) {
  const all = new Float32Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    all.set(piece, at);
    at += piece.length;
  }
  return all;
}

/** How loud: the root of the mean square, 0 to 1. */
export function levelOf(samples) {
  let sum = 0;
  for (const x of samples) sum += x * x;
  return Math.sqrt(sum / Math.max(1, samples.length));
}

/** A sound file's samples, where the browser can read it; else null (the server may read it all the same). */
export async function decoded(bytes) {
  try {
    const sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes.slice().buffer);
    return sound.getChannelData(0).slice();
  } catch {
    return null;
  }
}

/** A WAV file that can be kept. */
export function wavOf(samples) {
  const head = new DataView(new ArrayBuffer(44));
  const name = (at, text) => [...text].forEach((c, n) => head.setUint8(at + n, c.charCodeAt(0)));
  name(0, "RIFF"), head.setUint32(4, 36 + 2 * samples.length, true), name(8, "WAVEfmt ");
  head.setUint32(16, 16, true), head.setUint16(20, 1, true), head.setUint16(22, 1, true);
  head.setUint32(24, RATE, true), head.setUint32(28, 2 * RATE, true), head.setUint16(32, 2, true);
  head.setUint16(34, 16, true), name(36, "data"), head.setUint32(40, 2 * samples.length, true);
  const body = Uint8Array.from(atob(base64Of(samples)), (c) => c.charCodeAt(0));
  return new Blob([head.buffer, body], { type: "audio/wav" });
}
