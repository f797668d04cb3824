// Sliders: volume, horizon, device price, cost of an error. The verdict is decided again at each step.
const rules = data.decision;
const own = {
  requests_per_month: rules.decision.requests_per_month, horizon_months: rules.decision.horizon_months,
  usd_per_hour: rules.usd_per_hour, error_usd: rules.decision.error_usd,
};
const settings = { ...own };
const RANGES = {
  requests_per_month: [10, 1e9], horizon_months: [1, 60],
  usd_per_hour: own.usd_per_hour ? [own.usd_per_hour / 100, own.usd_per_hour * 100] : [0.01, 100], error_usd: [1e-6, 100],
};
const ownVerdict = document.getElementById("verdict").textContent;
const STANDINGS = { worse: "worse", equal: "practically equal", open: "not told apart" };
const kept = [];  // the figures' own words, for the way back

// The same words as evaluation/wording.py.
function grouped(value) { return value.toLocaleString("en-US", { maximumFractionDigits: 0 }); }

function money(value) {
  if (value === null || value === undefined) return "n/a";
  if (value === 0) return "0";
  const size = Math.abs(Number(value.toPrecision(3)));
  if (size >= 1000) return grouped(value);
  if (size >= 1) return Number(value.toPrecision(3)).toFixed(2);
  return Number(value.toPrecision(3)).toFixed(Math.min(12, 2 - Math.floor(Math.log10(size))));
}

function counted(value) {
  if (value === null || value === undefined) return "n/a";
  for (const [size, word] of [[1e12, "trillion"], [1e9, "billion"], [1e6, "million"]]) {
    if (value >= size) return Number((value / size).toPrecision(3)) + " " + word;
  }
  return value >= 10 ? grouped(value) : String(Number(value.toPrecision(3)));
}

function costed(value) {
  return rules.is_priced || (value > 0 && value < 100) ? money(value) : counted(value);
}

function isMoved() { return Object.keys(own).some(key => settings[key] !== own[key]); }

// Position 0..1000 to a value, by the logarithm; the first position of a cost of errors is none.
function valueAt(key, position) {
  const [low, high] = RANGES[key];
  if (key === "error_usd" && position === 0) return null;
  const value = low * (high / low) ** (position / 1000);
  return key === "horizon_months" ? Math.round(value) : Number(value.toPrecision(2));
}

function positionOf(key, value) {
  const [low, high] = RANGES[key];
  if (!value) return 0;
  return Math.min(1000, Math.max(0, Math.round(1000 * Math.log(value / low) / Math.log(high / low))));
}

function shownSetting(key) {
  const value = settings[key];
  if (key === "error_usd") return value === null ? "not counted" : money(value) + " USD";
  return key === "usd_per_hour" ? money(value) : counted(value);
}

function setFigure(key, value, note) {
  const card = document.querySelector(`[data-figure="${CSS.escape(key)}"]`);
  if (!card) return;
  card.classList.toggle("moved", isMoved());
  card.querySelector("dd span").textContent = value;
  card.querySelector("small").textContent = note;
}

function breakEvenWords(b) {
  return { crosses: `${counted(b.requests)} requests`, never: "never", always: "from the first request" }[b.status] || "unknown";
}

function showFigures() {
  const [at] = atSettings(rules, settings), unit = rules.is_priced ? "usd" : "device_seconds";
  const usd = own.usd_per_hour ? settings.usd_per_hour / own.usd_per_hour : 1;
  for (const arm of at.arms) {
    if (!arm.cost) continue;
    const cost = arm.cost["request_" + unit];
    const span = cost.low === null || cost.high === null ? "" : `${costed(1000 * cost.low)} to ${costed(1000 * cost.high)}`;
    if (cost.value !== null) setFigure("request:" + arm.name, costed(1000 * cost.value), span);
  }
  const { best_prompted: a, best_tuned: b } = rules.decision;
  if (a && b) setFigure("break_even", breakEvenWords(breakEven(rules, settings, a, b)), usd === 1 ? "" : "interval: at the run's own price");
  setFigure("volume", counted(volumeOf(settings)), `${grouped(settings.requests_per_month)} a month for ${settings.horizon_months} months`);
  if (own.usd_per_hour) setFigure("price", `${money(settings.usd_per_hour)} USD`, usd === 1 ? "" : "yours");
}

function restoreFigures() {
  for (const [node, text] of kept) node.textContent = text;
  for (const card of document.querySelectorAll(".figures .moved")) card.classList.remove("moved");
}

function showTotals(choice) {
  const body = document.getElementById("total-rows"), [at, d] = atSettings(rules, settings);
  body.replaceChildren();
  const done = at.arms.filter(arm => arm.status === "done");
  const worth = arm => lossUsd(arm, d) ?? totalCost(arm, d).usd ?? totalCost(arm, d).device_seconds ?? Infinity;
  done.sort((x, y) => worth(x) - worth(y));
  for (const arm of done) {
    const total = totalCost(arm, d), all = rules.is_priced ? total.usd : total.device_seconds;
    const once = arm.cost ? arm.cost[rules.is_priced ? "fixed_usd" : "fixed_device_seconds"] : null;
    const fixed = once === null ? null : timesPaid(arm, d) * once;
    const loss = lossUsd(arm, d), row = body.insertRow();
    if (arm.name === choice.arm) row.className = "chosen";
    const standing = arm.name === choice.leader ? "leads" : choice.rejected[arm.name] ? "misses a limit" : STANDINGS[choice.standings[arm.name]] || "-";
    const cells = [
      ["arm", arm.name], ["fixed", costed(fixed)], ["requests", all === null || fixed === null ? "n/a" : costed(all - fixed)], ["total", costed(all)],
      ["wrong answers", loss === null ? "-" : money(loss - total.usd)], ["in all", costed(loss ?? all)], ["against the leader", standing],
    ];
    for (const [label, text] of cells) {
      const td = row.insertCell();
      td.textContent = text;
      td.dataset.label = label;
    }
  }
}

function decideAgain() {
  const choice = choose(rules, settings), words = verdictOf(choice);
  const verdict = document.getElementById("verdict");
  const text = isMoved() ? words[0].toUpperCase() + words.slice(1) : ownVerdict;
  // A live region speaks when its text changes: it keeps still where the answer stays.
  if (verdict.textContent !== text) verdict.textContent = text;
  document.getElementById("moved").hidden = !isMoved();
  if (isMoved()) showFigures(); else restoreFigures();
  showTotals(choice);
}

function showSlider(input) {
  const shown = shownSetting(input.dataset.key);
  document.getElementById("shown-" + input.dataset.key).textContent = shown;
  input.setAttribute("aria-valuetext", shown);
}

function startSliders() {
  for (const card of document.querySelectorAll(".figures [data-figure]")) {
    for (const node of card.querySelectorAll("dd span, small")) kept.push([node, node.textContent]);
  }
  const inputs = [...document.querySelectorAll("#sliders input")];
  for (const input of inputs) {
    const key = input.dataset.key;
    input.value = positionOf(key, settings[key]);
    showSlider(input);
    input.addEventListener("input", () => {
      settings[key] = valueAt(key, Number(input.value));
      showSlider(input);
      decideAgain();
    });
  }
  document.getElementById("reset").addEventListener("click", () => {
    Object.assign(settings, own);
    for (const input of inputs) {
      input.value = positionOf(input.dataset.key, own[input.dataset.key]);
      showSlider(input);
    }
    decideAgain();
    if (inputs.length) inputs[0].focus();
  });
  decideAgain();
}

startSliders();
