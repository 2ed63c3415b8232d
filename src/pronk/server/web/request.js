// From a chat's settings, which are the texts that somebody typed, to the body of a request.

export const EMPTY = { system: "", temperature: "", top_p: "", top_k: "", min_p: "", max_tokens: "",
  seed: "", format: "text", schema: "", tools: "", tool_choice: "auto" };

const NUMBERS = {
  temperature: { least: 0, most: 2 },
  top_p: { least: 0, most: 1, above: true },
  top_k: { least: 0, whole: true },
  min_p: { least: 0, most: 1 },
  max_tokens: { least: 1, whole: true },
  seed: { least: 0, whole: true },
};

function readNumber(text, { least, most = Infinity, above = false, whole = false }) {
  const value = Number(text);
  if (whole && !Number.isSafeInteger(value)) throw new Error("Must be a whole number");
  if (!Number.isFinite(value)) throw new Error("Must be a number");
  if (value < least || value > most || (above && value === least)) {
    const range = most === Infinity ? `at least ${least}` : `${above ? "above" : "from"} ${least}${
      above ? ", at most" : " to"} ${most}`;
    throw new Error(`Must be ${range}`);
  }
  return value;
}

function readJson(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`Not JSON: ${error.message}`);
  }
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

function readSchema(text) {
  if (!text.trim()) throw new Error("A JSON schema is needed for this format");
  const schema = readJson(text);
  if (!isObject(schema)) throw new Error("A schema is an object: {…}");
  return schema;
}

function readTools(text) {
  const tools = readJson(text);
  if (!Array.isArray(tools)) throw new Error("Tools are a list: [{…}]");
  const seen = new Set();
  tools.forEach((tool, i) => {
    const f = tool?.function;
    const where = `Tool ${i + 1}`;
    if (tool?.type !== "function" || !isObject(f)) {
      throw new Error(`${where}: must be {"type": "function", "function": {…}}`);
    }
    if (!/^[\w.-]{1,64}$/.test(f.name ?? "")) {
      throw new Error(`${where}: its name must be 1 to 64 letters, digits, “_”, “-” or “.”`);
    }
    if (seen.has(f.name)) throw new Error(`${where}: the name ${f.name} is taken already`);
    if (f.parameters !== undefined && !isObject(f.parameters)) {
      throw new Error(`${where}: “parameters” must be a JSON schema`);
    }
    seen.add(f.name);
  });
  return tools;
}

/** The parameters that the settings ask for, and what is wrong: {parameters, errors: {field}}. */
export function readSettings(settings) {
  const parameters = {};
  const errors = {};
  const attempt = (field, read) => {
    try {
      read();
    } catch (error) {
      errors[field] = error.message;
    }
  };
  for (const [name, limits] of Object.entries(NUMBERS)) {
    if (settings[name]?.trim()) {
      attempt(name, () => { parameters[name] = readNumber(settings[name], limits); });
    }
  }
  if (settings.format === "json_object") parameters.response_format = { type: "json_object" };
  if (settings.format === "json_schema") {
    attempt("schema", () => {
      const schema = readSchema(settings.schema);
      const json_schema = { name: "answer", strict: true, schema };
      parameters.response_format = { type: "json_schema", json_schema };
    });
  }
  if (settings.tools?.trim()) {
    attempt("tools", () => {
      const tools = readTools(settings.tools);
      if (!tools.length) return;
      parameters.tools = tools;
      if (settings.tool_choice !== "auto") parameters.tool_choice = settings.tool_choice;
    });
  }
  return { parameters, errors };
}

/** The messages as the API wants them; answers that failed before their first word are left out. */
function toApi(messages, system) {
  const out = system.trim() ? [{ role: "system", content: system }] : [];
  for (const { role, content, tool_calls = [], tool_call_id } of messages) {
    const calls = tool_calls.filter((call) => !call.cut);
    if (role === "tool") out.push({ role, content, tool_call_id });
    else if (role === "user") out.push({ role, content });
    else if (calls.length) {
      out.push({ role, content: content || null, tool_calls: calls.map((call) => ({ id: call.id,
        type: "function", function: { name: call.name, arguments: call.arguments } })) });
    } else if (content) out.push({ role, content });
  }
  return out;
}

export function buildBody(messages, settings, model) {
  const { parameters } = readSettings(settings);
  return { model, messages: toApi(messages, settings.system ?? ""), stream: true,
    stream_options: { include_usage: true }, ...parameters };
}
