// ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────

const redraws = [];
let focusSearch = () => {}, searching = false;

const PARTS = [["overview", "Overview", overview], ["norms", "Norms", norms], ["lens", "Logit lens", lens], ["attention", "Attention", attention], ["features", "Features", features]];
const tabs = document.getElementById("tabs"), parts = document.getElementById("parts");
const drawn = new Set();

for (const [key, title] of PARTS) {
  tabs.append(el("button", { type: "button", role: "tab", id: `tab-${key}`, "aria-controls": key, onclick: () => open(key) }, title));
  parts.append(el("section", { id: key, role: "tabpanel", "aria-labelledby": `tab-${key}`, hidden: true }));
}

function draw(key) {
  if (drawn.has(key)) return;
  drawn.add(key);
  into(document.getElementById(key), () => source.part(key), PARTS.find(([name]) => name === key)[2]);
}

/** What was recorded since is shown when a part is opened again. */
function stale() {
  for (const [key] of PARTS) if (key !== "overview" && document.getElementById(key).hidden) drawn.delete(key);
}

function open(key) {
  draw(key);
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
  searching = document.activeElement?.type !== "search";  // it is not drawn yet
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
document.getElementById("foot").textContent = `${source.live ? "Opened" : "Made"} ${report.made} by forebay ${report.forebay}.`;
paint(dark.matches ? "dark" : "light");
draw("overview");
const asked = location.hash.slice(1);
open(PARTS.some(([key]) => key === asked) ? asked : "overview");
window.addEventListener("hashchange", () => PARTS.some(([key]) => key === location.hash.slice(1)) && open(location.hash.slice(1)));
