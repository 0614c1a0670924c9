
// ── the data: asked of the server that this page comes from ─────────────────────────────────────────────────────────

const ORDERS = [["most telling", "telling", "desc"], ["most active", "density", "desc"], ["rarest", "density", "asc"],
  ["greatest activation", "max", "desc"], ["smallest activation", "max", "asc"], ["number", "id", "asc"], ["number, last first", "id", "desc"]];

async function ask(name, given = {}, sent = null) {
  const address = `/api/${name}${sent ? "" : `?${new URLSearchParams(given)}`}`;
  let answer;
  try {
    answer = await fetch(address, sent ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(sent) } : {});
  } catch {
    throw new Error("The server does not answer. Start it again with forebay serve.");
  }
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error ?? `The server refuses (${answer.status}).`);
  Object.assign(report.texts, found.texts);
  return found;
}

const source = {
  live: true,
  hint: "Number or text",
  part: (name) => name === "features" ? ask("dictionaries") : name === "lens" || name === "attention" ? ask("sequences") : ask(name),
  texts: chooser,
  async lens(part, i) {
    const found = await ask("lens", { sequence: i });
    return found.absent ? found : found.shown[0];
  },
  async attention(part, i, layer) {
    const found = await ask("attention", { sequence: i, layer });
    return found.absent ? found : { ...found.shown[0], layers: found.layers, weights: found.shown[0].weights[0] };
  },
  dictionary: (one) => ask("dictionary", { dictionary: one.name }),
  title: (one) => `All ${whole(one.n_feature)} features`,
  has: () => true,
  features: (one, sorted, search, offset, limit) => ask("features", { dictionary: one.name, sort: ORDERS[sorted][1], order: ORDERS[sorted][2], search, offset, limit }),
  feature: (one, id) => ask("feature", { dictionary: one.name, id }),
};

/** Sequences, some at a time, by how they begin; or one by its number. */
function chooser(part, chosen) {
  const limit = 25;
  let { shown, offset, total } = part;
  const named = (one) => `${one.sequence}: ${one.tokens.map((id) => running(id)).join("")}`.slice(0, 80);
  const wrong = el("span", { class: "bad small", role: "alert" });
  const select = el("select", { class: "texts", "aria-label": "Text", onchange: () => take(Number(select.value)) });
  const number = el("input", { type: "number", min: 0, max: total - 1, value: 0, "aria-label": "Sequence", onchange: () => turn(Number(number.value)) });
  const back = el("button", { type: "button", onclick: () => turn(offset - limit) }, "Earlier"), on = el("button", { type: "button", onclick: () => turn(offset + limit) }, "Later");
  function fill(own) {
    select.replaceChildren(...shown.map((one) => el("option", { value: one.sequence, selected: one.sequence === own }, named(one))));
    back.disabled = offset === 0;
    on.disabled = offset + limit >= total;
  }
  function take(sequence) {
    number.value = sequence;
    chosen(sequence);
  }
  async function turn(to) {
    const sequence = Math.max(0, Math.min(Math.floor(to) || 0, total - 1));
    try {
      ({ shown, offset, total } = await ask("sequences", { offset: limit * Math.floor(sequence / limit), limit }));
      wrong.replaceChildren();
    } catch (error) {
      wrong.replaceChildren(error.message);
      return;
    }
    fill(sequence);
    take(sequence);
  }
  fill(0);
  return [el("label", {}, "Sequence", number, ` of ${whole(total)}`), select, back, on, wrong];
}

/** Progress while a run goes on: asked for again every few seconds, as long as the page is seen. */
function follow(draw) {
  const again = async () => {
    if (document.hidden) return setTimeout(again, 3000);
    try {
      const part = await ask("overview");
      draw(part);
      if (part.complete) return null;
    } catch (error) {
      draw(null, error);
    }
    return setTimeout(again, 3000);
  };
  setTimeout(again, 3000);
}

