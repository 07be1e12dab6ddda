// Shows /status, asked for once a second. Names come from clients: they become text, never markup.

import { buildChart, charts, drawChart, merge, WINDOW } from "./charts.js";
import { byId, make } from "./elements.js";
import { age, clock, count, duration, percent, short, size } from "./words.js";

const PAUSE = 1000;

let token = "";
let started = 0;
let latest = 0; // number of the last sample
let samples = [];
let minutes = []; // [time, counters] of the last minute

function tier(name, held, pinned) {
  const parts = [["used", held.used - pinned], ["pinned", pinned], ["fragmented", held.fragmented], ["free", held.free]]
    .filter(([part, bytes]) => bytes || (bytes === 0 && part !== "pinned"));
  const head = make("div", "head", make("span", "", make("b", "", name)),
    make("span", "", make("b", "", size(held.used)), held.capacity ? ` of ${size(held.capacity)} · ${percent(held.used / held.capacity)}` : ""));
  if (held.problem) head.firstChild.append(" ", make("span", "bad", held.problem));
  const bar = make("div", "bar");
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", parts.map(([part, bytes]) => `${part} ${size(bytes)}`).join(", "));
  for (const [part, bytes] of parts) {
    const segment = make("i", part);
    segment.style.width = `${(bytes / (held.capacity ?? held.used)) * 100}%`;
    segment.title = `${part} ${size(bytes)}`;
    bar.append(segment);
  }
  const legend = make("div", "legend", ...parts.map(([part, bytes]) => make("span", part, `${part} ${size(bytes)}`)));
  return make("div", `tier ${name === "memory" ? name : "disk"}`, head, bar, legend);
}

function showTiers(status) {
  // Pins hold what lies in memory there; only a block pinned while below memory alone is no part of it.
  const shown = Object.entries(status.tiers).map(([name, held]) => held.used === undefined
    ? make("div", "tier disk", make("b", "", name), " ", make("span", "bad", held.problem))
    : tier(name, held, Math.min(held.pinned ?? 0, held.used)));
  if (shown.length < 2) shown.push(make("p", "tier muted", "No tier below memory is configured."));
  byId("tiers").replaceChildren(...shown);
}

// Who is limited to tenants is shown what these hold, and no sums of the node.
function showNow(status) {
  const { leases, queues, counters } = status;
  const loaded = Object.keys(status.tiers).reduce((sum, name) => sum + (counters[`load.bytes.${name}`] ?? 0), 0);
  const tiles = [
    ["sessions", "sessions", count(status.sessions), ""],
    ["namespaces", "namespaces", count(status.namespaces), ""],
    ["tenants", "tenants", count(status.tenants), ""],
    ["objects", "objects", count(status.objects), ""],
    ["leases", "leases", count(leases.read + leases.write), leases.withdrawn ? ` ${leases.withdrawn} withdrawn` : ""],
    ["pins", "pins", count(leases.pin), leases.pin ? ` ${size(status.pinned_bytes)}` : ""],
    ["loaded", "loaded in all", queues && size(loaded), ""],
    ["waiting", "waiting for tiers", queues && count(queues.acquiring), ""],
    ["unwritten", "not written yet", queues && count(status.unwritten), status.writing_bytes ? ` ${size(status.writing_bytes)}` : ""],
  ];
  byId("now").replaceChildren(...tiles.filter(([, , value]) => value !== undefined).map(([id, name, value, more]) => {
    const shown = make("dd", "", value, make("small", "", more));
    shown.id = `now-${id}`;
    return make("div", "", make("dt", "", name), shown);
  }));
}

function fill(id, rows) {
  const table = byId(id);
  table.tBodies[0].replaceChildren(...rows);
  table.hidden = !rows.length;
  table.nextElementSibling.hidden = rows.length > 0;
}

const cell = (text, className = "") => {
  const td = make("td", className, text);
  if (typeof text === "string") td.title = text;
  return td;
};
// Of a repository's or a folder's name the last part; the rest shows on pointing at it.
function modelCell(model) {
  const td = cell(model);
  td.textContent = model.split("/").filter(Boolean).pop() ?? model;
  return td;
}
const tenantCell = (tenant) => tenant ? cell(tenant) : cell("–", "muted");

function showRecent(status) {
  fill("recent", status.recent.map((request) => {
    const save = request.what === "save";
    const bar = make("span", "found");
    for (const [part, blocks] of [[save ? "save" : "memory", request.memory], ["disk", request.below]]) {
      const piece = make("i", part);
      piece.style.width = `${(blocks / Math.max(1, request.asked)) * 100}%`;
      bar.append(piece);
    }
    const blocks = make("td", "", bar, `${count(request.memory + request.below)} / ${count(request.asked)}`);
    blocks.title = save ? `${request.memory} new` : `${request.memory} in memory, ${request.below} below`;
    return make("tr", "", cell(clock(request.at), "muted"), cell(String(request.session), "n"),
      make("td", "", make("span", "kind", request.what)), modelCell(request.model), tenantCell(request.tenant), blocks,
      cell(request.reason, "muted"), cell(duration(request.seconds), "n"));
  }));
}

function showNamespaces(status) {
  // By name, so that rows stay where they are.
  const held = status.latest_namespaces.toSorted((a, b) => a.model.localeCompare(b.model) || a.tenant.localeCompare(b.tenant));
  fill("namespaces", held.map((held) =>
    make("tr", "", modelCell(held.model), tenantCell(held.tenant), cell(short(held.blocks), "n"),
      cell(size(held.memory), "n"), cell(size(held.below), "n"))));
}

const REASONS = {
  "lookup.miss": "lookup missed", "save.dropped": "save dropped", "load.failed": "load failed",
  "commit.refused": "commit refused", "write.dropped": "not written",
  "write.failed": "write failed", "evict.lost": "evicted for good",
  "recover.dropped": "not recovered", "lease.expired": "lease expired",
};

function showReasons(status) {
  minutes.push([status.now, status.counters]);
  minutes = minutes.filter(([at]) => at >= status.now - 60);
  const before = minutes[0][1];
  const rows = Object.entries(status.counters).flatMap(([name, total]) => {
    const dot = name.lastIndexOf(".");
    const what = REASONS[name.slice(0, dot)];
    return what && total ? [{ what, reason: name.slice(dot + 1), total, lately: total - (before[name] || 0) }] : [];
  });
  rows.sort((a, b) => b.lately - a.lately || b.total - a.total);
  fill("reasons", rows.map(({ what, reason, total, lately }) =>
    make("tr", "", cell(what), cell(reason), cell(lately ? `+${count(lately)}` : "0", lately ? "n rising" : "n muted"),
      cell(count(total), "n"))));
}

function showState(state, problem = "") {
  byId("state").textContent = state;
  byId("state").className = `pill ${state}`;
  byId("problem").textContent = problem;
  byId("main").classList.toggle("stale", state === "unreachable" || state === "refused");
}

function show(status) {
  if (status.started !== started) { // another daemon than before
    [started, latest, samples, minutes] = [status.started, 0, [], []];
  }
  samples.push(...status.samples.filter((sample) => sample.number > latest));
  samples = samples.slice(-WINDOW);
  if (samples.length) latest = samples[samples.length - 1].number;
  document.title = `${status.node} · KVStore`;
  byId("node").textContent = status.node;
  byId("about").textContent = `KVStore ${status.version} · up ${age(status.now - status.started)}`;
  showState(!status.ready ? "stopping" : status.draining ? "draining" : "ready");
  showTiers(status);
  showNow(status);
  const points = merge(samples);
  for (const chart of charts) drawChart(chart, points);
  showRecent(status);
  showNamespaces(status);
  showReasons(status);
}

// -- asking ----------------------------------------------------------------------------------------

function ask(why) {
  const dialog = byId("ask");
  showState("refused");
  byId("ask-why").textContent = why;
  byId("token").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      token = byId("token").value.trim();
      dialog.close();
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault();
  });
}

async function poll() {
  let response;
  let answer;
  try {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    response = await fetch(`status?after=${latest}`, { headers, signal: AbortSignal.timeout(5000) });
    answer = await response.json();
  } catch (error) {
    showState("unreachable", "The daemon does not answer; trying again.");
    return;
  }
  if (response.ok) show(answer);
  else if (response.status === 401 || response.status === 403) await ask(answer.error);
  else showState(response.status === 503 ? "starting" : "refused", answer.error);
}

async function run() {
  for (const chart of charts) buildChart(chart, () => merge(samples));
  for (;;) {
    if (!document.hidden) await poll();
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
  }
}

run();
