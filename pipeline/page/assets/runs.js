// ── overview ────────────────────────────────────────────────────────────────────────────────────────────────────────

function overview(part) {
  const progress = el("div", {}, progressOf(part));
  const model = part.steps.map((step) => step.model).find((one) => Object.keys(one).length) ?? {};
  marked(part);
  if (source.live && !part.complete) follow((now, error) => {
    if (error) progress.replaceChildren(failed(error, () => location.reload()));
    else {
      progress.replaceChildren(...progressOf(now).flat(Infinity).filter(Boolean));
      marked(now);
      stale();
    }
  });
  return [el("h2", {}, "Model"), pairs(model), progress, provenance(part)];
}

function marked(part) {
  const state = document.getElementById("state");
  state.textContent = part.complete ? "complete" : "not complete";
  state.className = part.complete ? "good" : "bad";
}

function progressOf(part) {
  const rows = part.steps.map((step) => [
    step.name,
    el("div", { class: step.units_done === step.units ? "bar whole" : "bar" }, el("i", { share: step.units ? step.units_done / step.units : 1 })),
    `${whole(step.units_done)} / ${whole(step.units)}`,
    step.failed.length ? el("span", { class: "bad" }, whole(step.failed.length)) : "0",
    `${whole(step.tokens_done)} / ${whole(step.n_token)}`,
    bytes(step.nbytes),
    step.tokens_per_second === null ? none : whole(step.tokens_per_second),
    step.left === 0 ? "done" : step.left === null ? "?" : duration(step.left)]);
  const failures = part.steps.flatMap((step) => step.failures.map((one) => [step.name, whole(one.unit), whole(one.attempts), el("span", { class: "code cut" }, ends(one.error))]));
  const when = source.live ? "" : " when this was made";
  const said = part.steps.flatMap((step) => [
    step.left === 0 ? null : `${step.name}: ${step.at_work ? `${whole(step.at_work)} at work${when}` : `nobody ${source.live ? "is" : "was"} at work${when}`}.`,
    step.unreadable ? `${step.name}: ${whole(step.unreadable)} records cannot be read; forebay status names them.` : null]);
  return [
    el("h2", {}, "Steps"),
    grid(["step", "", "#units", "#failed", "#tokens", "#size", "#tokens/s", "#left"], rows),
    said.map((line) => line && el("p", { class: "quiet" }, line)),
    failures.length ? [el("h2", {}, "Failed units"), grid(["step", "#unit", "#attempts", "error"], failures)] : []];
}

function provenance(part) {
  return [
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

