// Requests to the server, and its errors in words.

let key = sessionStorage.getItem("key") || "";

export function useKey(text) {
  key = text;
  sessionStorage.setItem("key", text);
}

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const MEANING = {
  401: "The server wants an API key.",
  403: "This API key may not do that.",
  408: "Sending the request took too long.",
  413: "The request is larger than the server takes.",
  429: "The server is busy.",
  503: "The server cannot take the request now.",
};

async function request(path, options) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  const said = body.error?.message || "";
  const wait = Number(response.headers.get("Retry-After"));
  const again = wait > 0 ? `Try again in ${wait} s.` : "";
  const known = MEANING[response.status] || (said ? "" : `The server answered with status ${response.status}.`);
  return new ServerError([known, said, again].filter(Boolean).join(" "), response.status);
}

export async function modelName() {
  const response = await request("../v1/models");
  return (await response.json()).data[0].id;
}

// The body of a chat completion with one image and a question.
function bodyOf({ model, image, question }, more) {
  const content = [{ type: "image_url", image_url: { url: image } }, { type: "text", text: question }];
  return JSON.stringify({ model, messages: [{ role: "user", content }], ...more });
}

// What would be chosen at any budget.
export async function preview(asked, signal) {
  const response = await request("preview", { method: "POST", body: bodyOf(asked), signal });
  return response.json();
}

// Ask, hand each piece of the answer to onText, and return what the server says of the whole.
export async function ask(asked, budgetMs, onText, signal) {
  const body = bodyOf(asked, { stream: true, latency_budget_ms: budgetMs });
  const response = await request("../v1/chat/completions", { method: "POST", body, signal });
  let last = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new ServerError(event.error.message);
    const piece = event.choices?.[0]?.delta?.content;
    if (piece) onText(piece);
    last = event.budgetvlm || last;
  }
  if (!last) throw new ServerError("The connection ended before the answer did.");
  return last;
}

// The events of a stream, see https://html.spec.whatwg.org/multipage/server-sent-events.html
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let done, value;
    try {
      ({ done, value } = await reader.read());
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection broke before the answer was there.");
    }
    if (done) return;
    const parts = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
