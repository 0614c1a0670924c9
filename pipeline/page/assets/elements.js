
const report = JSON.parse(document.getElementById("report").textContent);

// ── elements ────────────────────────────────────────────────────────────────────────────────────────────────────────
// Whatever comes out of a run becomes text: nothing here reads markup.

function el(name, given = {}, ...children) {
  return filled(document.createElement(name), given, children);
}

function svg(name, given = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), given, children);
}

function filled(element, given, children) {
  for (const [key, value] of Object.entries(given)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "share") element.style.setProperty("--p", `${(100 * value).toFixed(1)}%`);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

function choice(label, options, chosen) {
  const select = el("select", { onchange: () => chosen(Number(select.value)) },
    options.map((text, i) => el("option", { value: i }, text)));
  return el("label", {}, label, select);
}

function grid(headings, rows) {
  const cell = (name, value, i) => el(name, { class: headings[i].startsWith("#") ? "n" : null, scope: name === "th" ? "col" : null }, value);
  return el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Table" }, el("table", {},
    el("thead", {}, el("tr", {}, headings.map((text, i) => cell("th", text.replace("#", ""), i)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value, i) => cell("td", value, i)))))));
}

function pairs(table) {
  return el("dl", {}, Object.entries(table).map(([key, value]) => [el("dt", {}, key), el("dd", {}, value)]));
}

/** What is asked for, drawn into an element: until it comes that it is on its way, and if it does not, why. */
async function into(held, ask, draw) {
  const mine = held.asked = (held.asked ?? 0) + 1;
  const late = setTimeout(() => mine === held.asked && held.replaceChildren(el("p", { class: "quiet wait", "aria-live": "polite" }, "Loading …")), 120);
  held.setAttribute("aria-busy", "true");
  let found, wrong = null;
  try { found = await ask(); } catch (error) { wrong = error; }
  clearTimeout(late);
  if (mine !== held.asked) return;
  held.removeAttribute("aria-busy");
  const drawn = wrong ? failed(wrong, () => into(held, ask, draw)) : draw(found);
  held.replaceChildren(...[drawn].flat(Infinity).filter((child) => child !== null && child !== undefined));
}

const failed = (error, again) => el("div", { class: "failed", role: "alert" },
  el("p", { class: "bad" }, error.message), el("button", { type: "button", onclick: again }, "Try again"));

const missing = (part) => el("p", { class: "quiet absent" }, part.absent);

// ── numbers and tokens ──────────────────────────────────────────────────────────────────────────────────────────────

const none = "–";
const whole = (n) => n === null || n === undefined ? none : Math.round(n).toLocaleString("en-US");
/** The first tokens of a sequence that are left out, in words. */
const leading = (n) => n === 1 ? "the first token" : `the first ${whole(n)} tokens`;
const percent = (p) => p === null ? none : p >= 0.01 ? `${(100 * p).toFixed(1)}%` : p >= 1e-4 ? `${(100 * p).toFixed(3)}%` : p === 0 ? "0%" : `${Number((100 * p).toPrecision(2))}%`;

function real(x) {
  if (x === null || x === undefined) return none;
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return x.toExponential(2);
  return size === 0 || size >= 1000 ? Math.round(x).toLocaleString("en-US") : x.toPrecision(4);
}

function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let at = 0;
  while (n >= 1000 && at < units.length - 1) { n /= 1000; at += 1; }
  return `${at ? Number(n.toPrecision(3)) : n} ${units[at]}`;
}

function duration(s) {
  if (s < 60) return `${Math.round(s)} s`;
  if (s < 3600) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} days`;
}

const unseen = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;
const codePoint = (one) => `⟨U+${one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
const ends = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(unseen, codePoint);

/** A token alone: every space can be seen, and what has no shape of its own is named. */
function shown(id) {
  if (id < 0) return none;
  const text = report.texts[id];
  return text === undefined ? `#${id}` : text === "" ? "∅" : ends(text).replaceAll(" ", "·").replaceAll("\u00a0", "⍽");
}

/** A token within a line of text: single spaces are spaces, and ends of lines are shown. */
function running(id) {
  const text = report.texts[id];
  return text === undefined ? `#${id} ` : /^\s+$/.test(text) && text !== " " ? shown(id) : ends(text);
}

function token(id, share, given = {}) {
  return el("span", { class: "tok", share: Math.min(0.75, 0.75 * share), ...given }, running(id));
}

// ── charts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const WIDTH = 560, HEIGHT = 210, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 26;

function ticks(low, high) {
  const raw = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw);
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step / 1e6; x += step) found.push(x);
  return found;
}

/** Lines over layers, the first with a band about it. `band` holds [low, high] a point. */
function lines(label, xs, ys, band) {
  const all = [...ys, ...band.flat()].filter((y) => y !== null);
  if (!all.length) return el("p", { class: "quiet" }, "No finite values.");
  const high = Math.max(...all) || 1, low = Math.min(0, ...all);
  const x = (i) => LEFT + (WIDTH - LEFT - RIGHT) * (xs.length > 1 ? i / (xs.length - 1) : 0.5);
  const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low || 1);
  const path = (points) => points.map(([i, value], n) => `${n ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const line = ys.map((value, i) => [i, value]).filter(([, value]) => value !== null);
  const edge = band.map(([a, b], i) => [i, a, b]).filter(([, a, b]) => a !== null && b !== null);
  const around = [...edge.map(([i, a]) => [i, a]), ...edge.reverse().map(([i, , b]) => [i, b])];
  const every = Math.ceil(xs.length / 16);
  return el("div", { class: "chart" }, svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, role: "img", "aria-label": label },
    ticks(low, high).map((value) => [
      svg("path", { class: "axis", d: `M${LEFT} ${y(value)}H${WIDTH - RIGHT}` }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, Number(value.toPrecision(6)).toLocaleString("en-US"))]),
    xs.map((text, i) => i % every ? null : svg("text", { x: x(i), y: HEIGHT - 8, "text-anchor": "middle" }, text)),
    around.length > 2 ? svg("path", { class: "band", d: `${path(around)}Z` }) : null,
    svg("path", { class: "line", d: path(line) }),
    line.map(([i, value]) => svg("circle", { class: "dot", cx: x(i), cy: y(value), r: 2.6 }, svg("title", {}, `${xs[i]}: ${real(value)}`)))));
}

/** Bars side by side. `names` is the text of each, `edges` what stands below the first, and the last. */
function bars(label, counts, names, edges) {
  const most = Math.max(...counts, 1), height = 120, width = 420, base = height - 18;
  const step = width / counts.length;
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label },
    counts.map((count, i) => svg("rect", { class: "fill", x: (i * step + 0.5).toFixed(2), width: (step - 1).toFixed(2),
      y: count ? Math.min(base - 1, base * (1 - count / most)) : base, height: count ? Math.max(1, base * count / most) : 0 },
      svg("title", {}, `${names(i)}: ${whole(count)}`))),
    svg("path", { class: "axis", d: `M0 ${base}H${width}` }),
    svg("text", { x: 0, y: height - 4 }, edges[0]),
    svg("text", { x: width, y: height - 4, "text-anchor": "end" }, edges[1]));
}

