// ── features ────────────────────────────────────────────────────────────────────────────────────────────────────────

const PAGE = 25;

function features(part) {
  if (part.absent) return [missing(part)];
  const held = el("div");
  const draw = (i) => into(held, () => part.shown[i].absent ? part.shown[i] : source.dictionary(part.shown[i]), dictionary);
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
        counted: `${whole(one.n_token)} tokens${one.skip_positions ? `, ${leading(one.skip_positions)} of every sequence left out` : ""}` })),
      el("div", {}, el("h2", {}, "How often features fire"), el("div", { class: "chart" },
        bars("Features by firing rate", counts, (i) => `at ${percent(10 ** edges[i])} to ${percent(10 ** edges[i + 1])} of the tokens`, [percent(10 ** edges[0]), "every token"])))),
    el("h2", {}, source.title(one)),
    source.live || one.features.length ? browser(one) : el("p", { class: "quiet" }, "None to show.")];
}

function browser(one) {
  let rows = [], total = 0, first = 0, chosen = 0, sorted = 0, asked = 0, waiting = null, typed = null;
  const search = el("input", { type: "search", placeholder: one.searched === "numbers" ? "Number" : source.hint, "aria-label": "Search features", "aria-keyshortcuts": "/", oninput: () => {
    clearTimeout(waiting);
    if (source.live) waiting = setTimeout(find, 150);
    else find();
  } });
  const list = el("ul", { class: "list", role: "listbox", tabindex: 0, "aria-label": "Features", onkeydown: keys });
  const count = el("span", { class: "quiet small", role: "status", "aria-live": "polite" });
  const back = el("button", { type: "button", onclick: () => pick(Math.max(0, first - PAGE)) }, "Back"), on = el("button", { type: "button", onclick: () => pick(first + PAGE) }, "More");
  const heading = el("div", { class: "heading" }, el("span", {}, "feature"), el("span", {}, "fires at"), el("span", {}, "up to"));
  const card = el("article");

  const find = () => load(0);
  /** Loads the page that holds a place in the list, and chooses that place. */
  async function load(at) {
    const mine = asked += 1, from = PAGE * Math.floor(Math.max(0, at) / PAGE);
    const late = setTimeout(() => { if (mine === asked) count.textContent = "Loading …"; }, 120);
    let found;
    try {
      found = typed ? { total: typed.shown.length, shown: typed.shown.slice(from, from + PAGE) } : await source.features(one, sorted, search.value, from, PAGE);
    } catch (error) {
      if (mine === asked) count.replaceChildren(failed(error, () => load(at)));
      return;
    } finally {
      clearTimeout(late);
    }
    if (mine !== asked) return;
    ({ total, shown: rows } = found);
    first = from;
    choose(at);
  }
  function pick(at) {
    const to = Math.max(0, Math.min(at, total - 1));
    if (PAGE * Math.floor(to / PAGE) === first) choose(to);
    else load(to);
  }
  function choose(at) {
    chosen = Math.max(0, Math.min(at, total - 1));
    list.replaceChildren(...rows.map((row, n) => el("li", { role: "option", id: `feature-${row.id}`, "aria-selected": String(first + n === chosen), onclick: () => pick(first + n) },
      el("span", {}, `#${row.id}`), el("span", {}, percent(row.rate)), el("span", {}, real(row.values ? Math.max(...row.values) : row.max)))));
    list.hidden = !total;
    if (searching) search.focus();
    searching = false;
    const own = rows[chosen - first];
    if (own) list.setAttribute("aria-activedescendant", `feature-${own.id}`);
    count.textContent = total ? `${whole(first + 1)}–${whole(first + rows.length)} of ${whole(total)}` : "Nothing found.";
    back.disabled = first === 0;
    on.disabled = first + PAGE >= total;
    into(card, async () => own && source.feature(one, own.id), (feature) => feature ? featureOf(feature, one, go, typed && { ids: typed.tokens, values: own.values }) : []);
    document.getElementById(`feature-${own?.id}`)?.scrollIntoView({ block: "nearest" });
  }
  function go(id) {
    typing?.clear();
    search.value = String(id);
    find();
  }
  function keys(event) {
    const to = { ArrowDown: chosen + 1, ArrowUp: chosen - 1, PageDown: chosen + PAGE, PageUp: chosen - PAGE, Home: 0, End: total - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    pick(to);
  }
  /** The features of a typed text instead of all, or all again. */
  function show(found) {
    typed = found;
    asking.hidden = found !== null;
    heading.lastChild.textContent = found ? "in text" : "up to";
    find();
  }
  const typing = source.live ? textBox(one, show) : null;
  const asking = el("div", { class: "row" }, search, choice("Sort", ORDERS.map(([name]) => name), (i) => { sorted = i; find(); }));
  focusSearch = () => search.focus();
  find();
  return [typing?.form, el("div", { class: "browser" },
    el("div", {}, asking, heading, list, el("div", { class: "row" }, back, on, count)), card)];
}

function featureOf(feature, one, go, typed) {
  const [low, high] = feature.range;
  const bin = (n) => real(low + (high - low) * n / feature.histogram.length);
  const linked = ([id, n]) => [source.has(one, id) ? el("button", { type: "button", onclick: () => go(id) }, `#${id}`) : `#${id}`, ` ${whole(n)}`];
  const [most, few] = [feature.together_of, feature.together_of < feature.n_active];
  return [
    el("h2", {}, `Feature ${feature.id}`),
    typed ? [el("h3", {}, "In your text"), typedTokens(typed)] : null,
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
        el("p", { class: "quiet small" }, few ? `Counted at its ${whole(most)} strongest tokens.` : `Counted at all ${whole(most)} of its tokens.`),
        feature.together.length ? el("div", { class: "row" }, feature.together.map((other) => el("span", {}, linked(other)))) : el("p", { class: "quiet" }, "No other does."))),
    el("h3", {}, "Raises and lowers the logits of"),
    feature.logits.absent ? missing({ absent: `Not known: ${feature.logits.absent}.` }) : logits(feature.logits)];
}

/** The tokens of a typed text, darker where the feature fires more strongly. */
function typedTokens({ ids, values }) {
  const most = Math.max(...values);
  return el("p", { class: "own-text" }, ids.map((id, at) => token(id, most > 0 ? Math.max(0, (values[at] ?? 0) / most) : 0,
    { class: values[at] === null ? "tok said" : "tok", title: values[at] === null ? "left out" : values[at] ? real(values[at]) : null })));
}

function logits(found) {
  const [ids] = found.tokens, [values] = found.values, most = Math.max(...values.map(Math.abs)) || 1;
  const side = (from, to, kind) => el("div", {}, el("div", { class: "meter" }, ids.slice(from, to).map((id, k) => [
    el("span", { class: "code cut" }, shown(id)), el("span", { class: "n" }, real(values[from + k])),
    el("i", { class: kind, share: Math.abs(values[from + k]) / most })])));
  return el("div", { class: "pair" }, side(0, found.top, null), side(found.top, 2 * found.top, "less"));
}

