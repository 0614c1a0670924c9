// ── logit lens ──────────────────────────────────────────────────────────────────────────────────────────────────────

const nameOf = (one) => `sequence ${one.sequence} (document ${one.document})`;

function lens(part) {
  if (part.absent) return [missing(part)];
  const held = el("div");
  const draw = (i) => into(held, () => source.lens(part, i), (one) => one.absent ? missing(one) : lensOf(one));
  draw(0);
  return [
    el("p", { class: "quiet" }, "What the model would say next if each layer's residual stream were its last. Colour is the probability of the strongest token; underlined is the token that really follows. Arrow keys move."),
    el("div", { class: "row" }, source.texts(part, draw)), held];
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
  const held = el("div"), layers = el("span");
  let sequence = 0, layer = 0, one = null;
  const show = () => one === null ? [] : one.absent ? missing(one) : attentionOf(one, layer);
  const draw = () => into(held, () => source.attention(part, sequence, layer), (found) => {
    one = { layers: part.layers, ...found };
    if (!one.absent && !layers.firstChild) layers.append(choice("Layer", one.layers.map(String), (i) => { layer = i; draw(); }));
    return show();
  });
  redraws.push(() => one && held.replaceChildren(...[show()].flat()));
  draw();
  return [
    el("p", { class: "quiet" }, "Each square is a head: a row a query, a column a key, darker where more of the weight lies. Point at a square, or move in it with the arrow keys, to see where a token looks."),
    el("div", { class: "row" }, source.texts(part, (i) => { sequence = i; draw(); }), layers), held];
}

function attentionOf(one, layer) {
  const n = one.tokens.length;
  const detail = el("div", { class: "detail low", "aria-live": "polite" });
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
  const figures = one.weights.map((packed, head) => {
    const raw = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    const view = new DataView(raw.buffer);
    const weight = (query, key) => key > query ? 0 : view.getUint16(query * (query + 1) + 2 * key, true) / 65535;
    const canvas = el("canvas", { width: n, height: n, tabindex: 0, role: "img", "aria-label": `Head ${head} of layer ${one.layers[layer]}` });
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

