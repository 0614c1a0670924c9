
// ── the data: all of them are in the page ───────────────────────────────────────────────────────────────────────────

const ORDERS = [["most telling", null], ["most active", (f) => -f.rate], ["rarest", (f) => f.rate], ["greatest activation", (f) => -f.max], ["number", (f) => f.id]];
const sought = new Map();

/** What a search looks through in a feature: its contexts, and the tokens that it raises. */
function words(one, i) {
  if (!sought.has(one)) sought.set(one, []);
  return sought.get(one)[i] ??= [...one.features[i].contexts.map((context) => context.tokens.map((id) => report.texts[id] ?? "").join("")),
    ...(one.logits.tokens ? one.logits.tokens[i].slice(0, one.logits.top).map((id) => report.texts[id] ?? "") : [])].join("\n").toLowerCase();
}

const source = {
  live: false,
  hint: "Number or text",
  part: async (name) => report[name],
  texts: (part, chosen) => choice("Text", part.shown.map(nameOf), (i) => chosen(i)),
  lens: async (part, i) => part.shown[i],
  attention: async (part, i, layer) => ({ ...part.shown[i], weights: part.shown[i].weights[layer] }),
  dictionary: async (one) => one,
  title: (one) => `The ${whole(one.features.length)} most telling features`,
  has: (one, id) => one.features.some((feature) => feature.id === id),
  async features(one, sorted, search, offset, limit) {
    const text = search.trim().toLowerCase(), key = ORDERS[sorted][1], { features } = one;
    const found = features.map((_, i) => i).filter((i) => !text || String(features[i].id) === text || words(one, i).includes(text));
    if (key) found.sort((a, b) => key(features[a]) - key(features[b]) || a - b);
    const own = found.findIndex((i) => String(features[i].id) === text);
    if (own > 0) found.unshift(...found.splice(own, 1));
    return { total: found.length, shown: found.slice(offset, offset + limit).map((i) => features[i]) };
  },
  async feature(one, id) {
    const i = one.features.findIndex((feature) => feature.id === id), { logits } = one;
    return { ...one.features[i], logits: logits.absent ? logits : { ...logits, tokens: [logits.tokens[i]], values: [logits.values[i]] } };
  },
};

