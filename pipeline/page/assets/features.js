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

