// What this page asks of its server: the OpenAI API. Errors come out as ApiError, in plain words.

export class ApiError extends Error {
  /** `kind`: key, busy, context, network, refused or server; `retryAfter` in seconds or null. */
  constructor(kind, message, { status = null, retryAfter = null } = {}) {
    super(message);
    this.kind = kind;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const LOST = "The connection to the server was lost.";
const UNREACHABLE = "The server cannot be reached. Is it running, and is the network up?";

async function call(path, key, options = {}) {
  const headers = { ...(options.body && { "Content-Type": "application/json" }),
    ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("network", UNREACHABLE);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // Not ours: a proxy's page. Its status says enough.
  }
  const { status } = response;
  const message = error.message ?? `The server answered ${status} ${response.statusText}`.trim();
  return new ApiError(kindOf(status, error.code), message, {
    status, retryAfter: retryAfter(response.headers.get("Retry-After")),
  });
}

function kindOf(status, code) {
  if (status === 401) return "key";
  if (status === 429 || status === 503) return "busy";
  if (code === "context_length_exceeded") return "context";
  return status >= 500 ? "server" : "refused";
}

/** Seconds, from a number of them or from a date. */
function retryAfter(value) {
  if (!value) return null;
  const seconds = /^\s*\d+(?:\.\d+)?\s*$/.test(value)
    ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
}

/** Names of the models that are served. */
export async function listModels(key) {
  const body = await (await call("/v1/models", key)).json();
  return body.data.map((model) => model.id);
}

/** Whether the server answers at all. */
export async function isUp() {
  return fetch("/health", { cache: "no-store" }).then((response) => response.ok, () => false);
}

/** The events of a streamed chat completion, as objects, until the server says that it is done. */
export async function* streamChat(body, key, signal) {
  const options = { method: "POST", body: JSON.stringify(body), signal };
  const response = await call("/v1/chat/completions", key, options);
  if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
    throw new ApiError("server", "The server's answer is not a stream of events.");
  }
  for await (const data of dataOf(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) {
      const { message, code } = event.error;
      throw new ApiError(kindOf(Number(code) || 500, code), message ?? "The server failed.");
    }
    yield event;
  }
  throw new ApiError("network", LOST);
}

/** The `data` of each server-sent event. */
async function* dataOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    while (true) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new ApiError("network", LOST);
      });
      if (done) return; // an event without its empty line was cut off
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
