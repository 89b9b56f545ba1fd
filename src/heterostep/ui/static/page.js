// The page's script: the form to the server, a job's progress back, and two videos that play in step.
const $ = (id) => document.getElementById(id);
const form = $("form");
const POLL = 400;  // milliseconds between looks at a running job
const WAIT = 250;  // milliseconds after the last change until an estimate is asked for

// Whose jobs are shown: this browser's. Closing the page ends nothing; opening it again shows them.
let client = null;
try { client = localStorage.getItem("heterostep-client"); } catch { /* storage may be switched off */ }
if (!client) {
  client = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  try { localStorage.setItem("heterostep-client", client); } catch { /* then for this page alone */ }
}

let about = { defaults: null };
let shown = null;  // the id of the job that is looked at
let running = null;  // the id of this page's job that waits or runs
let firstFrame = null;  // a File
let timer = 0;

const show = (element, yes = true) => { element.hidden = !yes; };
const seconds = (value) => {
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  return value < 5400 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
};

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    $("lost").textContent = "The program behind this page does not answer: it was ended, or is not reachable.";
    show($("lost"));
    throw new Lost();
  }
  show($("lost"), false);
  if (answer.headers.get("content-type")?.includes("json")) {
    const content = await answer.json();
    if (!answer.ok) throw new Fault(content);
    return content;
  }
  if (!answer.ok) throw new Fault({ message: `the page's program failed (${answer.status})`, field: "" });
  return answer.blob();
}
class Lost extends Error {}
class Fault extends Error {
  constructor({ message, field }) { super(message); this.field = field; }
}

// A line as a sentence; names of files and options at its beginning stay as they are.
const sentence = (text) => (/^[a-z]+[ ,:]/.test(text) ? text[0].toUpperCase() + text.slice(1) : text) + (text.endsWith(".") ? "" : ".");

// Faults, told under the field that they are about.
function tell(fault) {
  const place = form.querySelector(`[data-error="${CSS.escape(fault.field)}"]`) ?? form.querySelector('[data-error=""]');
  place.textContent = sentence(fault.message);
  show(place);
  const input = fault.field && form.elements[fault.field];
  if (input) input.setAttribute("aria-invalid", "true");
  if (place.closest("details")) $("more").open = true;
  return input || place;
}
function clear(field) {
  for (const place of form.querySelectorAll("[data-error]")) {
    if (field !== undefined && place.dataset.error !== field && place.dataset.error !== "") continue;
    show(place, false);
    form.elements[place.dataset.error]?.removeAttribute?.("aria-invalid");
  }
}

function contents(withImage = true) {
  const data = new FormData(form);
  data.delete("image");
  if (withImage && firstFrame) data.append("image", firstFrame, firstFrame.name);
  data.append("client", client);
  return data;
}

// Target and time.
function targetText() {
  const value = Number($("target").value), part = $("dial").value === "runtime" ? "time" : "evaluations";
  const names = { 0.25: "a quarter", 0.5: "half", 0.75: "three quarters", 1: "all" };
  $("target-text").textContent = names[value] ? `${names[value]} of the dense ${part}` : `${value} of the dense ${part}`;
}
let asked = 0;
async function estimate() {
  const mine = ++asked;
  let known;
  try {
    known = await ask("/api/estimate", { method: "POST", body: contents() });
  } catch (fault) {
    if (mine === asked && fault instanceof Fault) { $("estimate").textContent = ""; tell(fault); }
    return;
  }
  if (mine !== asked) return;
  const parts = [];
  if (known.seconds === null) {
    parts.push("Time unknown yet: the first run at this size is measured");
  } else {
    parts.push(`About ${seconds(known.seconds)} ${known.whole ? "with" : "and"} decoding`);
    if ($("dense").checked) {
      parts.push(known.made ? "the dense video is there already" : `before it about ${seconds(known.dense_seconds)} for the dense video`);
    }
  }
  if (known.ahead && !running) parts.push(known.ahead === 1 ? "one video is before yours" : `${known.ahead} videos are before yours`);
  $("estimate").textContent = parts.join("; ") + ".";
}
function changed(event) {
  targetText();
  const field = event?.target?.name;
  clear(field);
  // A target depends on these, too.
  if (["steps", "policy", "dial", "sparse_share"].includes(field)) for (const each of ["target", "policy"]) clear(each);
  clearTimeout(timer);
  timer = setTimeout(estimate, WAIT);
}
form.addEventListener("input", (event) => { if (event.target.type !== "file") changed(event); });

// The first frame.
function shape() {
  const of = about.defaults ?? { width: 16, height: 9 };
  return `${$("width").value || of.width} / ${$("height").value || of.height}`;
}
async function take(file) {
  clear("image");
  firstFrame = file;
  show($("image-note"), false);
  show($("preview"), false);
  show($("remove"), file !== null);
  // The browser's own field shows the file, too, where it was dropped or drawn.
  const files = new DataTransfer();
  if (file) files.items.add(file);
  $("image").files = files.files;
  if (!file) { changed(); return; }
  try {
    const seen = await ask("/api/image", { method: "POST", body: contents() });
    if (firstFrame !== file) return;
    URL.revokeObjectURL($("preview").src);
    $("preview").src = URL.createObjectURL(file);
    $("preview").style.aspectRatio = shape();
    show($("preview"));
    $("image-note").textContent = seen.note ?? "";
    show($("image-note"), seen.note !== null);
    changed();
  } catch (fault) {
    if (firstFrame !== file || !(fault instanceof Fault)) return;
    if (fault.field === "image") { firstFrame = null; $("image").value = ""; show($("remove"), false); }
    tell(fault);
  }
}
$("image").addEventListener("change", () => take($("image").files[0] ?? null));
$("remove").addEventListener("click", () => take(null));
$("draw").addEventListener("click", async () => {
  clear();
  try {
    const query = new URLSearchParams({ prompt: $("prompt").value, seed: $("seed").value });
    const drawn = await ask(`/api/scene?${query}`);
    await take(new File([drawn], "first.png", { type: "image/png" }));
  } catch (fault) { if (fault instanceof Fault) tell(fault); }
});
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}
$("dice").addEventListener("click", () => {
  $("seed").value = Math.floor(Math.random() * 2 ** 31);
  changed();
});

// Making a video.
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  clear();
  $("generate").disabled = true;
  try {
    const job = await ask("/api/jobs", { method: "POST", body: contents() });
    running = shown = job.id;
    display(job);
    history();
    reveal();
    watch(job.id);
  } catch (fault) {
    if (fault instanceof Fault) tell(fault).focus?.();
  } finally {
    $("generate").disabled = running !== null;
  }
});
async function watch(id) {
  let patience = POLL;
  for (;;) {
    await new Promise((done) => setTimeout(done, patience));
    patience = POLL;
    let job;
    try {
      job = await ask(`/api/jobs/${id}`);
    } catch (fault) {
      if (fault instanceof Lost) { patience = 10 * POLL; continue; }
      job = { id, state: "failed", message: fault.message, field: "" };
    }
    if (shown === id) display(job);
    if (["done", "cancelled", "failed"].includes(job.state)) {
      if (job.state === "failed" && shown === id) tell(new Fault(job)).scrollIntoView({ behavior: "smooth", block: "center" });
      running = null;
      $("generate").disabled = false;
      history();
      estimate();
      return;
    }
  }
}
$("cancel").addEventListener("click", async () => {
  $("cancel").disabled = true;
  try { display(await ask(`/api/jobs/${shown}/cancel`, { method: "POST" })); } catch { /* told by the next look */ }
});

// Where the page is scrolled away from the result, on a phone above all.
function reveal() {
  const { top } = $("result").getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) $("result").scrollIntoView({ behavior: "smooth" });
}

// What is known of a job.
function display(job) {
  const active = job.state === "waiting" || job.state === "running", done = job.state === "done";
  show($("empty"), false);
  show($("progress"), active);
  show($("ended"), !active && !done);
  for (const part of ["made", "after"]) show($(part), done);
  if (active) {
    const at = job.progress;
    const name = at?.run === "dense" ? "Dense video" : "heterostep's video";
    const phase = job.phase[0].toUpperCase() + job.phase.slice(1);
    $("phase").textContent = job.state === "waiting" ? (job.ahead > 1 ? `Waiting: ${job.ahead} in the queue, with yours` : "Waiting: next in the queue")
      : at && job.phase !== "cancelling" ? `${name}: ${job.phase}` : phase;
    const counts = [];
    if (at?.done) {
      counts.push(`step ${at.done} of ${at.steps}`, `${seconds(at.elapsed)} so far`);
      if (job.phase === "denoising") counts.push(at.remaining === null ? "time left unknown" : `about ${seconds(at.remaining)} left`);
      $("bar").value = at.done / at.steps;
    } else {
      $("bar").removeAttribute("value");
    }
    $("counts").textContent = counts.join(", ");
    $("cancel").disabled = job.phase === "cancelling";
  }
  if (job.state === "cancelled") $("ended-text").textContent = "Cancelled. Nothing of it was kept.";
  if (job.state === "failed") $("ended-text").textContent = sentence(`It could not be made: ${job.message}`);
  const steps = done ? job.result.active : active ? job.progress?.active : null;
  show($("plan"), Boolean(steps?.length));
  if (steps?.length) strip(steps, done ? steps.length : job.progress.done, done ? "heterostep" : job.progress.run);
  if (done) result(job);
  else pause();
}
function strip(active, made, run) {
  const bars = active.map((share, step) => {
    const bar = document.createElement("i");
    bar.classList.toggle("run", share > 0);
    bar.classList.toggle("ahead", step >= made);
    bar.style.setProperty("--share", share);
    return bar;
  });
  $("strip").replaceChildren(...bars);
  $("strip").classList.toggle("many", bars.length > 90);
  const evaluated = active.filter((share) => share > 0).length;
  const partly = active.some((share) => share > 0 && share < 1) ? ", some for part of the tokens" : "";
  const text = `${evaluated} of ${active.length} are ${made < active.length ? "planned to be evaluated" : "evaluated"}${partly}, ` +
    (evaluated < active.length ? "the others extrapolated" : "as without heterostep");
  $("plan-caption").textContent = text + (run === "dense" ? "" : made < active.length ? "; the plan may still change" : "");
  $("strip").setAttribute("aria-label", `Steps: ${text}.`);
}

function result(job) {
  const made = job.result, base = `/api/jobs/${job.id}/`;
  const fresh = $("fast-video").dataset.job !== job.id;
  const dense = made.files.dense !== undefined;
  const ratio = dense ? made.seconds / made.dense_seconds : null;
  const likeness = !dense ? "" : made.psnr === null ? ", identical" : `, ${made.psnr.toFixed(1)} dB PSNR to it`;
  $("verdict").textContent = dense ? `${ratio.toFixed(2)} of the dense time${likeness}` : `Made in ${seconds(made.seconds)}`;
  const settings = [`${made.width} x ${made.height}`, `${made.frames} frames`, `${job.steps} steps`, `seed ${job.seed}`];
  if (job.image) settings.push(`from ${job.image}`);
  $("made-prompt").textContent = `“${job.prompt}”, ${settings.join(", ")}`;
  $("dense-caption").textContent = dense ? seconds(made.dense_seconds) : "";
  $("fast-caption").textContent = seconds(made.seconds);
  show($("dense-figure"), dense);
  $("videos").classList.toggle("alone", !dense);
  if (fresh) {
    $("fast-video").dataset.job = job.id;
    for (const video of [$("dense-video"), $("fast-video")]) video.style.aspectRatio = `${made.width} / ${made.height}`;
    $("fast-video").src = base + made.files.heterostep;
    if (dense) $("dense-video").src = base + made.files.dense;
    else $("dense-video").removeAttribute("src");
    player.open(made.fps, made.frames, dense);
  }
  const [least, most] = made.evaluations;
  show($("heat-image"), made.files.heat !== undefined);
  if (made.files.heat) $("heat-image").src = base + made.files.heat;
  $("heat-caption").textContent = made.files.heat
    ? `Where the evaluations went: tokens were evaluated ${least} to ${most} times.`
    : `Every token was evaluated ${most} times: whole steps ran, so there is no map to draw.`;
  pairs($("summary"), made.summary);
  $("code").textContent = made.code;
  $("command").textContent = made.command;
  const names = { heterostep: "video", dense: "dense video", both: "side by side", heat: "heat map", report: "report (JSON)" };
  $("downloads").replaceChildren("Save:", ...Object.entries(names).filter(([key]) => made.files[key]).map(([key, name]) => {
    const link = document.createElement("a");
    link.href = `${base}${made.files[key]}?download`;
    link.download = made.files[key];
    link.textContent = name;
    return link;
  }));
}
function pairs(list, lines) {
  list.replaceChildren(...Object.entries(lines).map(([name, text]) => {
    const row = document.createElement("div"), term = document.createElement("dt"), value = document.createElement("dd");
    term.textContent = name === "psnr" ? "PSNR" : name[0].toUpperCase() + name.slice(1);
    value.textContent = text;
    row.append(term, value);
    return row;
  }));
}
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const code = $(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

// Both videos from one clock: the faster one's video leads, the dense one is set right where it drifts from it.
const player = {
  fps: 16, frames: 1, both: false, playing: false, ticking: false,
  open(fps, frames, both) {
    Object.assign(this, { fps, frames, both, playing: !matchMedia("(prefers-reduced-motion: reduce)").matches });
    this.seek(0);
    this.apply();
  },
  get lead() { return $("fast-video"); },
  get videos() { return this.both ? [this.lead, $("dense-video")] : [this.lead]; },
  apply() {
    for (const video of this.videos) {
      if (this.playing) video.play().catch(() => { this.playing = false; this.label(); });
      else video.pause();
    }
    this.label();
    if (this.playing && !this.ticking) { this.ticking = true; this.tick(); }
  },
  label() { $("play").textContent = this.playing ? "Pause" : "Play"; },
  seek(time) { for (const video of this.videos) video.currentTime = time; },
  step(by) {
    this.playing = false;
    this.apply();
    const frame = Math.min(Math.max(Math.floor(this.lead.currentTime * this.fps + 1e-3) + by, 0), this.frames - 1);
    this.seek((frame + 0.5) / this.fps);
    $("moment").value = (frame + 0.5) / this.frames;
  },
  // Goes round while the videos play.
  tick() {
    const { lead } = this;
    if (!this.playing || $("made").hidden) { this.ticking = false; return; }
    if (lead.ended) { this.seek(0); this.apply(); }
    for (const video of this.videos.slice(1)) {
      if (!lead.seeking && !video.seeking && Math.abs(video.currentTime - lead.currentTime) > 0.75 / this.fps) {
        video.currentTime = lead.currentTime;
      }
    }
    $("moment").value = lead.currentTime * this.fps / this.frames;
    this.number();
    requestAnimationFrame(() => this.tick());
  },
  number() {
    const frame = Math.min(Math.floor(this.lead.currentTime * this.fps + 1e-3) + 1, this.frames);
    $("frame").textContent = `${frame} / ${this.frames}`;
  },
};
function pause() { if (player.playing) { player.playing = false; player.apply(); } }
$("play").addEventListener("click", () => { player.playing = !player.playing; player.apply(); });
$("back").addEventListener("click", () => player.step(-1));
$("forth").addEventListener("click", () => player.step(1));
$("moment").addEventListener("input", () => {
  player.playing = false;
  player.apply();
  player.seek($("moment").value * player.frames / player.fps);
});
$("fast-video").addEventListener("seeked", () => player.number());
$("fast-video").addEventListener("loadeddata", () => player.number());

// What this browser has made.
async function history() {
  let jobs;
  try { jobs = await ask(`/api/jobs?client=${client}`); } catch { return []; }
  show($("history-section"), jobs.length > 0);
  $("history").replaceChildren(...jobs.map((job) => {
    const item = document.createElement("li"), button = document.createElement("button"), words = document.createElement("div");
    const prompt = document.createElement("b"), state = document.createElement("small");
    const image = document.createElement(job.result ? "img" : "span");
    if (job.result) { image.src = `/api/jobs/${job.id}/${job.result.files.poster}`; image.alt = ""; } else image.className = "blank";
    prompt.textContent = job.prompt;
    const what = job.dial === "runtime" ? "time" : "evaluations";
    state.textContent = `${job.target} of the ${what}, ${job.state === "done" ? seconds(job.result.seconds) : job.state}`;
    words.append(prompt, state);
    button.type = "button";
    button.append(image, words);
    button.setAttribute("aria-current", String(job.id === shown));
    button.addEventListener("click", async () => {
      shown = job.id;
      for (const other of $("history").querySelectorAll("button")) other.setAttribute("aria-current", String(other === button));
      try { display(await ask(`/api/jobs/${job.id}`)); } catch (fault) { if (fault instanceof Fault) tell(fault); }
      reveal();
    });
    item.append(button);
    return item;
  }));
  return jobs;
}

// A plan for a GPU.
$("plan-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.submitter ?? $("plan-form").querySelector("button");
  button.disabled = true;
  button.textContent = "Planning …";
  show($("plan-error"), false);
  show($("plan-result"), false);
  try {
    const made = await ask("/api/plan", { method: "POST", body: new FormData($("plan-form")) });
    $("plan-verdict").textContent = made.verdict;
    $("plan-verdict").className = `verdict ${made.fits === null ? "" : made.fits ? "yes" : "no"}`;
    pairs($("plan-lines"), made.lines);
    show($("plan-result"));
  } catch (fault) {
    if (fault instanceof Fault) {
      $("plan-error").textContent = sentence(fault.message);
      show($("plan-error"));
    }
  } finally {
    button.disabled = false;
    button.textContent = "Plan";
  }
});

async function begin() {
  about = await ask("/api/about");
  $("about").textContent = `${about.model ?? "The bundled model"} on ${about.device}, heterostep ${about.version}`;
  if (about.model) $("model").placeholder = about.model;
  $("model").disabled = about.only;
  if (about.defaults) {
    for (const [id, name] of Object.entries({ width: "width", height: "height", frames: "num_frames", guidance: "guidance_scale" })) {
      $(id).placeholder = about.defaults[name];
    }
  }
  show($("world"), about.model === null);
  show($("draw"), about.model === null);
  $("plan_model").replaceChildren(...about.models.map((name) => new Option(name, name)));
  if (about.models.includes("wan2.1-t2v-1.3b")) $("plan_model").value = "wan2.1-t2v-1.3b";
  if (about.vram) $("plan_vram").value = about.vram;
  const jobs = await history();
  const active = jobs.find((job) => job.state === "waiting" || job.state === "running");
  const last = active ?? jobs[0];
  if (last) {
    shown = last.id;
    display(last);
    history();
  }
  if (active) {
    running = active.id;
    $("generate").disabled = true;
    watch(active.id);
  }
  targetText();
  estimate();
}
begin().catch((fault) => { if (fault instanceof Fault) tell(fault); });
