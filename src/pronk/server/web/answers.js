// An answer coming in: its pieces put together, how it ended, how fast it was.

import { ApiError, streamChat } from "./api.js";

/** Fills `message` with the answer to `body`; `progress` is called after each piece. Never throws:
 *  what went wrong stands in the message. */
export async function receive(message, body, key, signal, progress) {
  const time = { began: performance.now(), first: null, last: null };
  let usage = null;
  try {
    for await (const event of streamChat(body, key, signal)) {
      usage = event.usage ?? usage;
      if (absorb(message, event.choices?.[0])) {
        time.last = performance.now();
        time.first ??= time.last;
      }
      progress();
    }
    message.finish ??= "stop";
  } catch (error) {
    fail(message, error);
  }
  // What the end cut off cannot be answered or sent back.
  for (const call of message.tool_calls ?? []) call.cut = !isJson(call.arguments);
  message.stats = figures(time, usage);
}

/** Adds a piece of the answer; whether there was any. */
function absorb(message, choice) {
  if (!choice) return false;
  const { content, refusal, tool_calls: calls } = choice.delta ?? {};
  message.content += (content ?? "") + (refusal ?? "");
  for (const piece of calls ?? []) {
    message.tool_calls ??= [];
    const at = Math.min(piece.index ?? 0, message.tool_calls.length);
    const call = message.tool_calls[at]
      ??= { id: piece.id ?? `call_${message.id}_${at}`, name: "", arguments: "" };
    call.name += piece.function?.name ?? "";
    call.arguments += piece.function?.arguments ?? "";
  }
  message.finish = choice.finish_reason ?? message.finish;
  return Boolean(content || refusal || calls?.length);
}

function fail(message, error) {
  if (error.name === "AbortError") {
    message.finish = "stopped";
    return;
  }
  if (!(error instanceof ApiError)) console.error(error);
  const { kind = "server", retryAfter = null } = error;
  message.finish = "error";
  const text = error instanceof ApiError ? error.message : `Its answer cannot be read: ${error.message}`;
  message.error = { kind, text, retryAt: retryAfter === null ? null : Date.now() + retryAfter * 1000 };
}

function figures({ began, first, last }, usage) {
  if (first === null) return null;
  const tokens = usage?.completion_tokens;
  return { first: (first - began) / 1000, prompt: usage?.prompt_tokens, completion: tokens,
    cached: usage?.prompt_tokens_details?.cached_tokens,
    speed: tokens > 1 && last > first ? ((tokens - 1) * 1000) / (last - first) : null };
}

function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}
