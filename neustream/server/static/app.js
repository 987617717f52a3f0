import { OUTCOMES, line, mark, scatter, svg } from "/ui/plots.js";

const $ = (id) => document.getElementById(id);
const SILENT_MS = 2500; // after so long without a snapshot the feed is lost
const RETRY_MS = 1000;
const MOST_DOTS = 1000;
let key = null;
let dots = [];
let models = "";

const headers = () => (key === null ? {} : { authorization: `Bearer ${key}` });

function element(name, content = "", attributes = {}) {
  const node = document.createElement(name);
  node.append(content);
  for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
  return node;
}

function say(id, text, bad = false) {
  if ($(id).textContent !== text) $(id).textContent = text;
  $(id).className = bad ? "bad" : "";
}

// -- the feed ----------------------------------------------------------------------------------------

/** What follows `data: ` in each event of a response, as it comes. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((each) => each.startsWith("data: "));
      if (data !== undefined) yield data.slice(6);
    }
  }
}

async function watch() {
  const gone = new AbortController();
  let timer = setTimeout(() => gone.abort(), SILENT_MS);
  const response = await fetch("/ui/events", { headers: headers(), signal: gone.signal });
  if (response.status === 401) return askForKey(timer);
  if (!response.ok) throw new Error((await response.json()).error.message);
  dots = [];
  let listed = false;
  for await (const data of events(response)) {
    clearTimeout(timer);
    timer = setTimeout(() => gone.abort(), SILENT_MS);
    const shot = JSON.parse(data);
    say("feed", "live");
    show(shot);
    if (shot.state === "ready" && !listed) { listed = true; listModels(); }
  }
  clearTimeout(timer);
}

function askForKey(timer) {
  clearTimeout(timer);
  say("feed", "waits for a key", true);
  if ($("keyform").hidden) { $("keyform").hidden = false; $("key").focus(); }
  if (key !== null) $("keynote").textContent = "That key was not taken.";
  return new Promise((go) => $("keyform").addEventListener("submit", (event) => {
    event.preventDefault();
    key = $("key").value;
    $("keyform").hidden = true;
    $("keynote").textContent = "";
    go();
  }, { once: true }));
}

async function follow() {
  for (;;) {
    try {
      await watch();
    } catch (error) {
      const why = error.name === "AbortError" || error instanceof TypeError ? "" : ` (${error.message})`;
      say("feed", `disconnected${why}, trying again`, true);
    }
    await new Promise((go) => setTimeout(go, RETRY_MS));
  }
}

// -- what it shows -----------------------------------------------------------------------------------

const seconds = (value) => (value === null ? "-" : value < 10 ? `${value.toFixed(2)} s` : `${Math.round(value)} s`);
const share = ([good, all]) => (all ? `${Math.round((100 * good) / all)} % of ${all}` : "-");

function show(shot) {
  say("state", shot.reason ? `${shot.state}: ${shot.reason}` : shot.state, shot.state !== "ready");
  say("running", `${shot.running}`);
  say("waiting", `${shot.waiting}`);
  say("wait", seconds(shot.wait_s));
  const tokens = shot.tokens_per_s;
  say("tokens", tokens.length ? `${tokens[tokens.length - 1]}` : "-");
  $("tokenline").replaceChildren(line(tokens, "Tokens a second"));
  const caches = Object.entries(shot.kv);
  const kv = caches.map(([name, [used, blocks]]) => `${caches.length > 1 ? `${name}: ` : ""}${used} / ${blocks}`);
  say("kv", kv.join(", ") || "-");
  showClasses(shot.classes);
  showModules(shot.modules);
  $("cluster").hidden = shot.cluster === null;
  if (shot.cluster !== null) showCluster(shot.cluster);
  showOpen(shot.open);
  const refused = Object.entries(shot.refused).map(([reason, count]) => `${reason}: ${count}`);
  say("refused", refused.join(", ") || "none");
  dots = [...dots, ...shot.dots].slice(-MOST_DOTS);
  if (shot.dots.length || !$("legend").children.length) showDots();
}

function row(head, ...cells) {
  const made = element("tr");
  made.append(element("th", head, { scope: "row" }), ...cells.map((cell) => element("td", cell)));
  return made;
}

function showClasses(classes) {
  const names = Object.keys(classes).sort();
  const minute = names.map((name) => classes[name]["60s"]);
  say("attained", share([0, 1].map((at) => minute.reduce((sum, each) => sum + each[at], 0))));
  const rows = names.map((name) => {
    const of = classes[name];
    return row(name || "(none)", share(of["10s"]), share(of["60s"]), share(of.all), `${of["10s"][2]}`);
  });
  $("classes").replaceChildren(...rows);
}

function showModules(modules) {
  const last = (values) => { const known = values.filter((v) => v !== null); return known.length ? known[known.length - 1] : "-"; };
  const cell = (values, label) => {
    const made = document.createDocumentFragment();
    made.append(line(values, label, 72), `${last(values)}`);
    return made;
  };
  $("modules").replaceChildren(...modules.map((of) => row(of.model, of.module,
    cell(of.batch, `${of.module}, requests a step`), cell(of.ms, `${of.module}, milliseconds`))));
}

function showCluster(of) {
  $("instances").replaceChildren(...Object.entries(of.instances).map(([name, each]) => row(`${name} (${each.place})`,
    each.state, `${each.live}`, `${each.waiting}`, seconds(each.backlog_s), `${each.moved_in} / ${each.moved_out}`)));
  const ms = (value) => `${Math.round(1000 * value)} ms`;
  const moves = Object.entries(of.moves).map(([reason, count]) => `${reason}: ${count}`);
  if ("p50" in of.downtime_s) moves.push(`standing still P50 ${ms(of.downtime_s.p50)}, P99 ${ms(of.downtime_s.p99)}`);
  say("moves", moves.join(", ") || "none");
  say("lost", `${of.lost}; requests begun anew: ${of.restarted}`);
  const told = Object.entries(of.forecasts).map(([what, ends]) =>
    `${what}: ${share([ends.on_time, ends.on_time + ends.not_on_time])} on time`);
  for (const [what, error] of Object.entries(of.forecast_error_s)) {
    told.push(`${what} came later than forecast by P5 ${ms(error.p5)}, P50 ${ms(error.p50)}, P95 ${ms(error.p95)}`);
  }
  say("forecasts", told.join(", ") || "none");
}

function bar(slack, budget) {
  if (slack === null) return "no promise";
  const made = document.createDocumentFragment();
  const left = Math.max(-1, Math.min(1, slack / (budget || 1)));
  const box = element("span", "", { class: slack < 0 ? "bar over" : "bar", "aria-hidden": "true" });
  const fill = element("i");
  fill.style.left = `${left < 0 ? 50 + 50 * left : 50}%`;
  fill.style.width = `${Math.abs(left) * 50}%`;
  box.append(fill);
  made.append(box, element("b", slack < 0 ? `late by ${seconds(-slack)}` : `${seconds(slack)} left`));
  return made;
}

function showOpen(open) {
  $("open").replaceChildren(...open.map(([id, kind, name, age, done, most, slack, budget]) =>
    row(id.slice(0, 20), kind, name || "(none)", age.toFixed(1), `${done} / ${most ?? "?"}`, bar(slack, budget))));
}

function showDots() {
  const kind = document.querySelector("input[name=kind]:checked").value;
  const shown = dots.filter((dot) => dot[1] === kind);
  const [plot, counts] = scatter(shown, kind === "text" ? "tokens" : "steps");
  $("dots").replaceChildren(plot);
  $("legend").replaceChildren(...counts.map(([name, count]) => {
    const item = element("li");
    item.append(svg("svg", { width: 14, height: 14, "aria-hidden": "true" }, mark(name, 7, 7)));
    item.append(element("span", `${OUTCOMES[name].label}: ${count}`));
    return item;
  }));
}

// -- a request of one's own --------------------------------------------------------------------------

async function listModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) return;
  const found = (await response.json()).data;
  const names = JSON.stringify(found.map((model) => model.id));
  if (names === models) return;
  models = names;
  $("model").replaceChildren(...found.map((model) =>
    element("option", model.id, { value: model.id, "data-kind": model.neustream.kind })));
}

function asked() {
  const image = $("model").selectedOptions[0].dataset.kind === "image";
  const slo = {};
  for (const name of image ? ["e2e"] : ["ttft", "tpot", "e2e"]) if ($(name).value) slo[`${name}_ms`] = Number($(name).value);
  const body = { model: $("model").value, prompt: $("prompt").value };
  if (Object.keys(slo).length) body.slo = slo;
  if (image) return ["/v1/images/generations", { ...body, num_inference_steps: Number($("most").value) }];
  const options = { include_usage: true, include_slo: true };
  return ["/v1/completions", { ...body, max_tokens: Number($("most").value), stream: true, stream_options: options }];
}

async function send() {
  const [path, body] = asked();
  const answer = $("answer"), picture = $("picture");
  answer.textContent = "";
  picture.hidden = true;
  const response = await fetch(path, {
    method: "POST", headers: { ...headers(), "content-type": "application/json" }, body: JSON.stringify(body),
  });
  if (!response.ok) throw new Error(`${response.status}: ${(await response.json()).error.message}`);
  if (!body.stream) {
    const made = await response.json();
    picture.src = `data:image/${made.output_format};base64,${made.data[0].b64_json}`;
    picture.hidden = false;
    return (response.headers.get("x-neustream-outcome") || "made, nothing was promised").replace("_", " ");
  }
  let kept = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.choices.length) answer.append(chunk.choices[0].text);
    else kept = chunk.usage.neustream;
  }
  if (kept === null) throw new Error("the stream was cut");
  const verdict = body.slo ? (kept.on_time ? "on time" : "late") : "whole, nothing was promised";
  return `${verdict}; first token after ${Math.round(kept.ttft_ms)} ms, all after ${Math.round(kept.e2e_ms)} ms`;
}

$("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = $("try").querySelector("button");
  button.disabled = true;
  say("verdict", "sent");
  try {
    say("verdict", await send());
  } catch (error) {
    say("verdict", error.message, true);
  }
  button.disabled = false;
  button.focus();
});
$("kinds").addEventListener("change", showDots);
follow();
