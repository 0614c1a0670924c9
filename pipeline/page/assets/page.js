
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

const missing = (part) => el("p", { class: "quiet absent" }, part.absent);

// ── numbers and tokens ──────────────────────────────────────────────────────────────────────────────────────────────

const none = "–";
const whole = (n) => n === null || n === undefined ? none : Math.round(n).toLocaleString("en-US");
const percent = (p) => p === null ? none : p >= 0.01 ? `${(100 * p).toFixed(1)}%` : p >= 1e-4 ? `${(100 * p).toFixed(3)}%` : p === 0 ? "0%" : `${(100 * p).toExponential(1)}%`;

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

// ── overview ────────────────────────────────────────────────────────────────────────────────────────────────────────

function overview(part) {
  const rows = part.steps.map((step) => [
    step.name,
    el("div", { class: step.units_done === step.units ? "bar whole" : "bar" }, el("i", { share: step.units ? step.units_done / step.units : 1 })),
    `${whole(step.units_done)} / ${whole(step.units)}`,
    step.failed.length ? el("span", { class: "bad" }, whole(step.failed.length)) : "0",
    `${whole(step.tokens_done)} / ${whole(step.n_token)}`,
    bytes(step.nbytes),
    step.tokens_per_second === null ? none : whole(step.tokens_per_second),
    step.left === 0 ? "done" : step.left === null ? "?" : duration(step.left)]);
  const model = part.steps.map((step) => step.model).find((one) => Object.keys(one).length) ?? {};
  const failures = part.steps.flatMap((step) => step.failures.map((one) => [step.name, whole(one.unit), whole(one.attempts), el("span", { class: "code cut" }, ends(one.error))]));
  const said = part.steps.flatMap((step) => [
    step.left === 0 ? null : `${step.name}: ${step.at_work ? `${whole(step.at_work)} at work when this was made` : "nobody was at work when this was made"}.`,
    step.unreadable ? `${step.name}: ${whole(step.unreadable)} records cannot be read; forebay status names them.` : null]);
  return [
    el("h2", {}, "Model"), pairs(model),
    el("h2", {}, "Steps"),
    grid(["step", "", "#units", "#failed", "#tokens", "#size", "#tokens/s", "#left"], rows),
    said.map((line) => line && el("p", { class: "quiet" }, line)),
    failures.length ? [el("h2", {}, "Failed units"), grid(["step", "#unit", "#attempts", "error"], failures)] : [],
    el("h2", {}, "Where it comes from"),
    part.steps.map((step) => el("details", {}, el("summary", {}, step.name),
      el("h3", {}, "Arrays"),
      grid(["array", "dimensions", "dtype"], step.arrays.map((array) => [
        el("span", { class: "code" }, array.path), array.dims.map((dim, i) => `${dim} ${whole(array.shape[i])}`).join(" × "), array.dtype])),
      el("h3", {}, "Settings"), pairs({ ...step.parameters, compression: step.compression }),
      el("h3", {}, "Versions"), pairs(step.versions),
      el("h3", {}, "Files and their hashes"), pairs(step.files),
      el("h3", {}, "Fingerprint"), el("p", { class: "code cut" }, step.fingerprint))),
    part.recipe ? el("details", {}, el("summary", {}, "Recipe, defaults filled in"), el("pre", {}, ends(JSON.stringify(part.recipe, null, 2)).replaceAll("↵", "\n"))) : null];
}

// ── norms ───────────────────────────────────────────────────────────────────────────────────────────────────────────

function norms(part) {
  if (part.absent) return [missing(part)];
  const held = el("div");
  const kinds = [...part.shown.filter((one) => one.layers), ...part.shown.filter((one) => !one.layers)];
  const draw = (i) => held.replaceChildren(...normsOf(kinds[i]));
  draw(0);
  return [el("div", { class: "row" }, choice("Hook point", kinds.map((one) => one.hook), draw)), held];
}

function normsOf(kind) {
  const found = [];
  if (kind.layers) {
    const names = kind.layers.map((layer) => layer === null ? kind.hook : String(layer));
    const at = (q) => kind.quantiles.findIndex((one) => Math.abs(one - q) < 1e-9);
    found.push(
      el("p", { class: "quiet" }, `Norms of ${whole(kind.n_token)} tokens, each ${whole(kind.width)} wide; the first token of every sequence is left out. The line is the median, the band holds 90%.`),
      lines(`Norm of ${kind.hook} by layer`, names, kind.quantile_norm.map((row) => row[at(0.5)]), kind.quantile_norm.map((row) => [row[at(0.05)], row[at(0.95)]])),
      el("h3", {}, "By layer"),
      grid(["#layer", "#mean", "#spread", "#least", "#5%", "#median", "#95%", "#greatest", "#kurtosis", "#not finite"],
        names.map((name, i) => [name, real(kind.mean_norm[i]), real(kind.std_norm[i]), real(kind.min_norm[i]),
          real(kind.quantile_norm[i][at(0.05)]), real(kind.quantile_norm[i][at(0.5)]), real(kind.quantile_norm[i][at(0.95)]),
          real(kind.max_norm[i]), real(kind.kurtosis[i]), percent((kind.nan_fraction[i] ?? 0) + (kind.infinite_fraction[i] ?? 0))])),
      el("h3", {}, "Largest values"),
      el("p", { class: "quiet" }, "From the first position on. Massive are those above 100 in magnitude that are more than 1,000 times their layer's median (Sun et al. 2024)."),
      grid(["#layer", "#value", "#times the median", "", "#channel", "#sequence", "#position", "token"],
        kind.largest.flatMap((row, i) => row.map((one) => [names[i], real(one.value), real(one.ratio),
          one.massive ? el("span", { class: "bad" }, "massive") : "", String(one.channel), whole(one.sequence), whole(one.position), el("span", { class: "code" }, shown(one.token_id))]))));
  }
  const all = kind.recorded;
  if (all) {
    const names = all.layers ?? all.abs_max.map(() => kind.hook);
    found.push(
      el("h3", {}, "As recorded when it was captured"),
      el("p", { class: "quiet" }, `Of all values of ${whole(all.n_token)} tokens, first positions included.`),
      grid(["#layer", "#greatest magnitude", "#root mean square norm", "#relative error of storing"],
        names.map((name, i) => [String(name), real(all.abs_max[i]), all.rms_norm ? real(all.rms_norm[i]) : none,
          all.relative_error ? real(all.relative_error[i]) : none])));
  }
  return found.length ? found : [el("p", { class: "quiet" }, "Nothing is recorded of it yet.")];
}

// ── logit lens ──────────────────────────────────────────────────────────────────────────────────────────────────────

const nameOf = (one) => `sequence ${one.sequence} (document ${one.document})`;

function lens(part) {
  if (part.absent) return [missing(part)];
  const held = el("div");
  const draw = (i) => held.replaceChildren(...lensOf(part.shown[i]));
  draw(0);
  return [
    el("p", { class: "quiet" }, "What the model would say next if each layer's residual stream were its last. Colour is the probability of the strongest token; underlined is the token that really follows. Arrow keys move."),
    el("div", { class: "row" }, choice("Text", part.shown.map(nameOf), draw)), held];
}

function lensOf(one) {
  const detail = el("div", { class: "detail", "aria-live": "polite" });
  const rows = one.layers.map((_, i) => one.layers.length - 1 - i);  // the last layer on top
  const cells = rows.map((layer) => one.position.map((_, at) => el("td", {
    role: "gridcell", tabindex: -1, share: 0.7 * (one.probability[layer][at][0] ?? 0),
    class: one.next[at] >= 0 && one.top[layer][at][0] === one.next[at] ? "true" : null,
    onmouseenter: () => tell(layer, at), onfocus: () => tell(layer, at), onclick: (event) => event.currentTarget.focus(),
  }, shown(one.top[layer][at][0]))));
  function tell(layer, at) {
    const rank = one.rank[layer][at];
    detail.replaceChildren(
      el("h3", {}, `Layer ${one.layers[layer]}, position ${one.position[at]}, after `, el("span", { class: "code" }, shown(one.tokens[at]))),
      el("div", { class: "meter" }, one.top[layer][at].map((id, k) => [
        el("span", { class: "code cut" }, shown(id)), el("span", { class: "n" }, percent(one.probability[layer][at][k])),
        el("i", { share: one.probability[layer][at][k] ?? 0 })])),
      el("p", { class: "quiet" }, one.next[at] < 0 ? "Nothing follows here." : ["What follows is ", el("span", { class: "code" }, shown(one.next[at])),
        rank === null ? "." : `, rank ${whole(rank)}: ${rank ? `${whole(rank)} tokens are stronger` : "the strongest"}.`]));
  }
  walk(cells);
  tell(one.layers.length - 1, 0);
  return [
    detail,
    el("div", { class: "wide lens" }, el("table", { role: "grid", "aria-label": "Logit lens, layer by position" },
      el("thead", {}, el("tr", { role: "row" }, el("th", { scope: "col" }, "layer"), one.tokens.map((id) => el("th", { scope: "col", title: shown(id) }, shown(id))))),
      el("tbody", {}, rows.map((layer, i) => el("tr", { role: "row" }, el("th", { scope: "row" }, String(one.layers[layer])), cells[i])))))];
}

/** Arrow keys, Home and End among cells [row][column], of which one takes part in the order of Tab. */
function walk(cells) {
  if (!cells.length || !cells[0].length) return;
  let here = [0, 0];
  cells[0][0].tabIndex = 0;
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -1e6], End: [0, 1e6] };
  cells.forEach((row, i) => row.forEach((cell, j) => {
    cell.addEventListener("focus", () => {
      cells[here[0]][here[1]].tabIndex = -1;
      here = [i, j];
      cell.tabIndex = 0;
    });
    cell.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      const bound = (value, n) => Math.max(0, Math.min(n - 1, value));
      cells[bound(i + step[0], cells.length)][bound(j + step[1], row.length)].focus();
    });
  }));
}

// ── attention ───────────────────────────────────────────────────────────────────────────────────────────────────────

function attention(part) {
  if (part.absent) return [missing(part)];
  const held = el("div");
  let sequence = 0, layer = 0;
  const draw = () => held.replaceChildren(...attentionOf(part, part.shown[sequence], layer));
  redraws.push(draw);
  draw();
  return [
    el("p", { class: "quiet" }, "Each square is a head: a row a query, a column a key, darker where more of the weight lies. Point at a square, or move in it with the arrow keys, to see where a token looks."),
    el("div", { class: "row" },
      choice("Text", part.shown.map(nameOf), (i) => { sequence = i; draw(); }),
      choice("Layer", part.layers.map(String), (i) => { layer = i; draw(); })), held];
}

function attentionOf(part, one, layer) {
  const n = one.tokens.length;
  const detail = el("div", { class: "detail low", "aria-live": "polite" });
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
  const figures = one.weights[layer].map((packed, head) => {
    const raw = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    const view = new DataView(raw.buffer);
    const weight = (query, key) => key > query ? 0 : view.getUint16(query * (query + 1) + 2 * key, true) / 65535;
    const canvas = el("canvas", { width: n, height: n, tabindex: 0, role: "img", "aria-label": `Head ${head} of layer ${part.layers[layer]}` });
    const context = canvas.getContext("2d"), image = context.createImageData(n, n);
    for (let query = 0; query < n; query += 1) {
      for (let key = 0; key <= query; key += 1) image.data.set([...colour, 255 * Math.sqrt(weight(query, key))], 4 * (query * n + key));
    }
    context.putImageData(image, 0, 0);
    let query = n - 1, key = 0;
    const tell = () => detail.replaceChildren(
      el("h3", {}, `Head ${head}: `, el("span", { class: "code" }, shown(one.tokens[query])), ` (${query}) looks at `,
        el("span", { class: "code" }, shown(one.tokens[key])), ` (${key}) with ${weight(query, key).toFixed(3)}`),
      el("p", {}, one.tokens.map((id, at) => token(id, Math.sqrt(weight(query, at)), {
        class: at === query ? "tok own" : at > query ? "tok said" : "tok", title: at <= query ? weight(query, at).toFixed(3) : null }))));
    const bound = (value) => Math.max(0, Math.min(n - 1, value));
    canvas.addEventListener("mousemove", (event) => {
      const box = canvas.getBoundingClientRect();
      query = bound(Math.floor(n * (event.clientY - box.top) / box.height));
      key = Math.min(query, bound(Math.floor(n * (event.clientX - box.left) / box.width)));
      tell();
    });
    canvas.addEventListener("focus", tell);
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      query = bound(query + step[0]);
      key = Math.min(query, bound(key + step[1]));
      tell();
    });
    if (!head) tell();
    return el("figure", { class: "head" }, canvas, el("figcaption", {}, `head ${head}`));
  });
  return [detail, el("div", { class: "heads" }, figures)];
}

// ── features ────────────────────────────────────────────────────────────────────────────────────────────────────────

const PAGE = 25;
const ORDERS = [["most telling", null], ["most active", (f) => -f.rate], ["rarest", (f) => f.rate], ["greatest activation", (f) => -f.max], ["number", (f) => f.id]];

function features(part) {
  if (part.absent) return [missing(part)];
  const held = el("div");
  const draw = (i) => held.replaceChildren(...dictionary(part.shown[i]));
  draw(0);
  return [part.shown.length > 1 ? el("div", { class: "row" }, choice("Dictionary", part.shown.map((one) => one.name), draw)) : null, held];
}

function dictionary(one) {
  if (one.absent) return [el("h2", {}, one.name), missing(one)];
  const { edges, counts } = one.rates;
  return [
    el("div", { class: "sides" },
      el("div", {}, el("h2", {}, one.name), pairs({ ...one.about,
        fit: `L0 ${real(one.fit.l0)}, FVU ${real(one.fit.fvu)}, cosine ${real(one.fit.cosine)} (of ${whole(one.n_fit)} tokens)`,
        features: `${whole(one.n_feature)}: ${whole(one.dead)} dead, ${whole(one.dense)} dense (above 10%)`,
        counted: `${whole(one.n_token)} tokens, the first ${whole(one.skip_positions)} of every sequence left out` })),
      el("div", {}, el("h2", {}, "How often features fire"), el("div", { class: "chart" },
        bars("Features by firing rate", counts, (i) => `at ${percent(10 ** edges[i])} to ${percent(10 ** edges[i + 1])} of the tokens`, [percent(10 ** edges[0]), "every token"])))),
    el("h2", {}, `The ${whole(one.features.length)} most telling features`),
    one.features.length ? browser(one) : el("p", { class: "quiet" }, "None to show.")];
}

function browser(one) {
  const place = new Map(one.features.map((feature, i) => [feature.id, i]));
  const texts = [];
  const words = (i) => texts[i] ??= [...one.features[i].contexts.map((context) => context.tokens.map((id) => report.texts[id] ?? "").join("")),
    ...(one.logits.tokens ? one.logits.tokens[i].slice(0, one.logits.top).map((id) => report.texts[id] ?? "") : [])].join("\n").toLowerCase();
  let order = one.features.map((_, i) => i), first = 0, chosen = 0, sorted = 0;
  const search = el("input", { type: "search", placeholder: "Number or text", "aria-label": "Search features", "aria-keyshortcuts": "/", oninput: () => find() });
  const list = el("ul", { class: "list", role: "listbox", tabindex: 0, "aria-label": "Features", onkeydown: keys });
  const count = el("span", { class: "quiet small", role: "status" });
  const back = el("button", { type: "button", onclick: () => turn(-PAGE) }, "Back"), on = el("button", { type: "button", onclick: () => turn(PAGE) }, "More");
  const card = el("article", { "aria-live": "polite" });

  function find() {
    const text = search.value.trim().toLowerCase();
    const matches = one.features.map((_, i) => i).filter((i) => !text || String(one.features[i].id) === text || words(i).includes(text));
    const key = ORDERS[sorted][1];
    order = key ? matches.sort((a, b) => key(one.features[a]) - key(one.features[b]) || a - b) : matches;
    first = 0;
    pick(0);
  }
  function turn(by) {
    first = Math.max(0, Math.min(first + by, PAGE * Math.floor((order.length - 1) / PAGE)));
    pick(first);
  }
  function pick(at) {
    chosen = Math.max(0, Math.min(at, order.length - 1));
    first = PAGE * Math.floor(chosen / PAGE);
    const page = order.slice(first, first + PAGE);
    list.replaceChildren(...page.map((i, n) => el("li", { role: "option", id: `feature-${i}`, "aria-selected": String(first + n === chosen), onclick: () => pick(first + n) },
      el("span", {}, `#${one.features[i].id}`), el("span", {}, percent(one.features[i].rate)), el("span", {}, real(one.features[i].max)))));
    list.hidden = !order.length;
    if (order.length) list.setAttribute("aria-activedescendant", `feature-${order[chosen]}`);
    count.textContent = order.length ? `${whole(first + 1)}–${whole(first + page.length)} of ${whole(order.length)}` : "Nothing found.";
    back.disabled = first === 0;
    on.disabled = first + PAGE >= order.length;
    card.replaceChildren(...(order.length ? featureOf(one, order[chosen], go) : []));
  }
  function go(id) {
    search.value = "";
    find();
    pick(order.indexOf(place.get(id)));
  }
  function keys(event) {
    const to = { ArrowDown: chosen + 1, ArrowUp: chosen - 1, PageDown: chosen + PAGE, PageUp: chosen - PAGE, Home: 0, End: order.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    pick(to);
    document.getElementById(`feature-${order[chosen]}`)?.scrollIntoView({ block: "nearest" });
  }
  focusSearch = () => search.focus();
  one.features.place = place;
  pick(0);
  return el("div", { class: "browser" },
    el("div", {},
      el("div", { class: "row" }, search, choice("Sort", ORDERS.map(([name]) => name), (i) => { sorted = i; find(); })),
      el("div", { class: "heading" }, el("span", {}, "feature"), el("span", {}, "fires at"), el("span", {}, "up to")),
      list, el("div", { class: "row" }, back, on, count)),
    card);
}

function featureOf(one, i, go) {
  const feature = one.features[i], [low, high] = feature.range;
  const bin = (n) => real(low + (high - low) * n / feature.histogram.length);
  const linked = ([id, n]) => [one.features.place.has(id) ? el("button", { type: "button", onclick: () => go(id) }, `#${id}`) : `#${id}`, ` ${n} of ${feature.contexts.length || n}`];
  return [
    el("h2", {}, `Feature ${feature.id}`),
    el("p", { class: "quiet" }, `Fires at ${whole(feature.n_active)} tokens (${percent(feature.rate)}), up to ${real(feature.max)}, ${real(feature.mean)} on average when it does.${feature.dense ? " Dense." : ""}`),
    el("h3", {}, "Strongest contexts"),
    el("div", { class: "contexts" }, feature.contexts.map((context) => el("div", {},
      el("span", { class: "n quiet small", title: `document ${context.document}, sequence ${context.sequence}, position ${context.position}` }, real(context.values[context.at])),
      el("span", {}, context.tokens.map((id, at) => token(id, feature.max > 0 ? Math.max(0, (context.values[at] ?? 0) / feature.max) : 0,
        { class: at === context.at ? "tok own" : "tok", title: context.values[at] ? real(context.values[at]) : null })))))),
    el("div", { class: "pair" },
      el("div", {}, el("h3", {}, "Activations when it fires"), el("div", { class: "chart" },
        bars(`Activations of feature ${feature.id}`, feature.histogram, (n) => `${bin(n)} to ${bin(n + 1)}`, [bin(0), bin(feature.histogram.length)]))),
      el("div", {}, el("h3", {}, "Fires at the same tokens"),
        feature.together.length ? el("div", { class: "row" }, feature.together.map((other) => el("span", {}, linked(other)))) : el("p", { class: "quiet" }, "No other does."))),
    el("h3", {}, "Raises and lowers the logits of"),
    one.logits.absent ? missing({ absent: `Not known: ${one.logits.absent}.` }) : logits(one.logits, i)];
}

function logits(found, i) {
  const ids = found.tokens[i], values = found.values[i], most = Math.max(...values.map(Math.abs)) || 1;
  const side = (from, to, kind) => el("div", {}, el("div", { class: "meter" }, ids.slice(from, to).map((id, k) => [
    el("span", { class: "code cut" }, shown(id)), el("span", { class: "n" }, real(values[from + k])),
    el("i", { class: kind, share: Math.abs(values[from + k]) / most })])));
  return el("div", { class: "pair" }, side(0, found.top, null), side(found.top, 2 * found.top, "less"));
}

// ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────

const redraws = [];
let focusSearch = () => {};

const PARTS = [["overview", "Overview", overview], ["norms", "Norms", norms], ["lens", "Logit lens", lens], ["attention", "Attention", attention], ["features", "Features", features]];
const tabs = document.getElementById("tabs"), parts = document.getElementById("parts");
const drawn = new Set();

for (const [key, title] of PARTS) {
  tabs.append(el("button", { type: "button", role: "tab", id: `tab-${key}`, "aria-controls": key, onclick: () => open(key) }, title));
  parts.append(el("section", { id: key, role: "tabpanel", "aria-labelledby": `tab-${key}`, hidden: true }));
}

function open(key) {
  const panel = document.getElementById(key);
  if (!drawn.has(key)) {
    drawn.add(key);
    filled(panel, {}, PARTS.find(([name]) => name === key)[2](report[key]));
  }
  for (const [name] of PARTS) {
    const tab = document.getElementById(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === key));
    tab.tabIndex = name === key ? 0 : -1;
    if (name === key) tabs.scrollLeft = tab.offsetLeft - tabs.offsetLeft - (tabs.clientWidth - tab.offsetWidth) / 2;
    document.getElementById(name).hidden = name !== key;
  }
  if (location.hash !== `#${key}`) history.replaceState(null, "", `#${key}`);
}

tabs.addEventListener("keydown", (event) => {
  const here = PARTS.findIndex(([key]) => document.getElementById(`tab-${key}`) === document.activeElement);
  const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: PARTS.length - 1 }[event.key];
  if (here < 0 || to === undefined) return;
  event.preventDefault();
  const [key] = PARTS[(to + PARTS.length) % PARTS.length];
  open(key);
  document.getElementById(`tab-${key}`).focus();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  event.preventDefault();
  open("features");
  focusSearch();
});

const theme = document.getElementById("theme"), dark = matchMedia("(prefers-color-scheme: dark)");
function paint(name) {
  document.documentElement.dataset.theme = name;
  theme.textContent = name === "dark" ? "Light" : "Dark";
  redraws.forEach((draw) => draw());
}
theme.addEventListener("click", () => paint(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
dark.addEventListener("change", () => paint(dark.matches ? "dark" : "light"));

document.getElementById("name").textContent = report.name;
const state = document.getElementById("state");
state.textContent = report.overview.complete ? "complete" : "not complete";
state.classList.add(report.overview.complete ? "good" : "bad");
document.getElementById("foot").textContent = `Made ${report.made} by forebay ${report.forebay}.`;
paint(dark.matches ? "dark" : "light");
const asked = location.hash.slice(1);
open(PARTS.some(([key]) => key === asked) ? asked : "overview");
window.addEventListener("hashchange", () => PARTS.some(([key]) => key === location.hash.slice(1)) && open(location.hash.slice(1)));
