// ── a text of the reader's own ──────────────────────────────────────────────────────────────────────────────────────

/** A box for a text; `show` takes the features that fire in it, or null for all of the dictionary's again. */
function textBox(one, show) {
  const said = el("span", { class: "quiet small", "aria-live": "polite" });
  const text = el("textarea", { rows: 2, maxlength: 16000, "aria-label": "Text to read", placeholder: "Type a text to see which features fire in it", onkeydown: (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  } });
  const read = el("button", { type: "submit" }, "Read"), every = el("button", { type: "button", hidden: true, onclick: () => { clear(); show(null); } }, "All features");
  const form = el("form", { class: "typed", onsubmit: submit }, text, el("div", { class: "row" }, read, every, said));
  let asked = 0;
  async function submit(event) {
    event.preventDefault();
    if (!text.value) return;
    const mine = asked += 1;
    read.disabled = true;
    said.className = "quiet small";
    said.textContent = "The model reads. The first time it has to be loaded …";
    try {
      const found = await ask("typed", {}, { dictionary: one.name, text: text.value });
      if (mine !== asked) return;
      said.textContent = `${whole(found.tokens.length)} tokens; ${found.shown.length ? `the ${whole(found.shown.length)} features that fire strongest` : "no feature fires"}${found.skip_positions ? `; ${leading(found.skip_positions)} left out` : ""}.`;
      every.hidden = false;
      show(found);
    } catch (error) {
      said.className = "bad small";
      said.textContent = error.message;
    } finally {
      read.disabled = false;
    }
  }
  function clear() {
    asked += 1;
    every.hidden = true;
    said.textContent = "";
  }
  return { form, clear: () => { if (!every.hidden) { clear(); show(null); } } };
}

