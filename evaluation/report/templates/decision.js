// The rules of evaluation/decision/rules.py, for the sliders; tests hold the two equal.
const LIMITS = [
  ["minimum_metric", arm => arm.metric], ["minimum_format_validity", arm => arm.format_validity],
  ["minimum_consistency", arm => arm.consistency], ["maximum_p95_seconds", arm => arm.p95_seconds],
  ["maximum_total_usd", (arm, d) => totalCost(arm, d).usd],
  ["deadline_hours", arm => arm.ready_seconds === null ? null : arm.ready_seconds / 3600],
];
const OF_GENERATED = ["minimum_format_validity", "minimum_consistency"];

function times(m, factor) {
  const by = v => v === null ? null : v * factor;
  return { value: by(m.value), low: by(m.low), high: by(m.high) };
}

function repriced(arm, factor, usdPerSecond) {
  const cost = arm.cost;
  if (!cost || cost.request_device_seconds.value === null) return arm;
  let fixed = cost.fixed_usd;
  if (fixed !== null && cost.fixed_device_seconds !== null) fixed += (factor - 1) * cost.fixed_device_seconds * usdPerSecond;
  return { ...arm, cost: { ...cost, fixed_usd: fixed, request_usd: times(cost.request_usd, factor) } };
}

// Data and decision at the sliders' settings; a price that has not moved changes nothing.
function atSettings(data, settings) {
  const { usd_per_hour: price, ...rest } = settings;
  let arms = data.arms;
  if (price && data.usd_per_hour && price !== data.usd_per_hour) {
    arms = arms.map(arm => repriced(arm, price / data.usd_per_hour, data.usd_per_hour / 3600));
  }
  return [{ ...data, arms }, { ...data.decision, ...rest }];
}

function volumeOf(d) { return d.requests_per_month * d.horizon_months; }

// What was trained is paid again at every change of the data.
function timesPaid(arm, d) { return arm.is_paid_once ? 1 : 1 + d.changes_per_month * d.horizon_months; }

function totalCost(arm, d) {
  const cost = arm.cost, v = volumeOf(d);
  if (!cost) return { usd: null, device_seconds: null, low: null, high: null };
  const times = timesPaid(arm, d);
  const line = (fixed, request) => fixed === null || request === null ? null : times * fixed + v * request;
  const usd = cost.request_usd, seconds = cost.request_device_seconds;
  let low = usd.low, high = usd.high;
  if (usd.value !== null && seconds.value && seconds.low !== null && seconds.high) {
    low = usd.value * seconds.low / seconds.value;
    high = usd.value * seconds.high / seconds.value;
  }
  return {
    usd: line(cost.fixed_usd, usd.value), device_seconds: line(cost.fixed_device_seconds, seconds.value),
    low: line(cost.fixed_usd, low), high: line(cost.fixed_usd, high),
  };
}

function isCheaper(a, b) {
  if (a.usd !== null && b.usd !== null) return a.usd < b.usd;
  if (a.device_seconds !== null && b.device_seconds !== null) return a.device_seconds < b.device_seconds;
  return false;
}

function missedLimits(arm, d) {
  return LIMITS.filter(([limit, measured]) => {
    const bound = d[limit];
    if (bound === null || bound === undefined || (OF_GENERATED.includes(limit) && !arm.is_generated)) return false;
    const value = measured(arm, d);
    return value === null || !(limit.startsWith("minimum") ? value >= bound : value <= bound);
  }).map(([limit]) => limit);
}

function usdPerPoint(d) { return d.error_usd === null ? null : d.error_usd * volumeOf(d); }

function lossUsd(arm, d) {
  const usd = totalCost(arm, d).usd, perPoint = usdPerPoint(d);
  return usd === null || arm.metric === null || perPoint === null ? null : usd + perPoint * (1 - arm.metric);
}

function pairOf(pairs, a, b) {
  const minus = v => v === null ? null : -v;
  for (const p of pairs) {
    if (p.a === a && p.b === b) return p;
    if (p.a === b && p.b === a) return { ...p, a, b, difference: minus(p.difference), low: minus(p.high), high: minus(p.low) };
  }
  return null;
}

function metricGap(pair, margin) {
  if (pair.difference === null || pair.low === null || pair.high === null) return null;
  return { value: pair.difference, low: pair.low, high: pair.high, margin, floor: 0 };
}

function moneyGap(pair, ours, theirs, perPoint, margin) {
  const points = metricGap(pair, margin);
  if (!points || ours.usd === null || theirs.usd === null) return null;
  const ends = t => t.low === null || t.high === null ? [t.usd, t.usd] : [t.low, t.high];
  const [theirLow, theirHigh] = ends(theirs), [ourLow, ourHigh] = ends(ours);
  const below = Math.hypot(theirs.usd - theirLow, ourHigh - ours.usd);
  const above = Math.hypot(theirHigh - theirs.usd, ours.usd - ourLow);
  const value = theirs.usd - ours.usd + perPoint * points.value;
  return {
    value, margin: perPoint * margin, floor: Math.max(below, above),
    low: value - Math.hypot(below, perPoint * (points.value - points.low)),
    high: value + Math.hypot(above, perPoint * (points.high - points.value)),
  };
}

function stateOf(gap, isSeparate) {
  if (!gap) return "open";
  if (-gap.margin <= gap.low && gap.high <= gap.margin) return "equal";
  return gap.low > 0 && isSeparate ? "worse" : "open";
}

function roundUp(value) {
  const step = value > 0 ? 10 ** Math.max(0, Math.floor(Math.log10(value)) - 1) : 1;
  return Math.ceil(value / step) * step;
}

function moreItems(gap, pair, z) {
  if (!gap || !pair || pair.n < 2 || gap.high <= gap.low) return null;
  const half = (gap.high - gap.low) / 2;
  if (half <= gap.floor) return null;
  const square = v => v * v;
  const sd = Math.sqrt(square(half) - square(gap.floor)) / z * Math.sqrt(pair.n);
  const lead = Math.abs(gap.value), totals = [];
  if (lead > gap.floor) {
    const rest = Math.sqrt(square(lead) - square(gap.floor));
    if (rest) totals.push(Math.ceil(square(pair.z_to_decide * sd / rest)));
  }
  if (gap.margin - lead > gap.floor) {
    const rest = Math.sqrt(square(gap.margin - lead) - square(gap.floor));
    totals.push(Math.ceil(square(z * sd / rest)));
  }
  return totals.length ? roundUp(Math.max(Math.min(...totals) - pair.n, pair.n / 10)) : null;
}

function standingOf(data, leader, arm, d, isMoney) {
  const pair = pairOf(data.pairs, leader.name, arm.name);
  if (!pair) return { arm, state: "open", pair: null, gap: null };
  const perPoint = usdPerPoint(d);
  const gap = isMoney && perPoint !== null
    ? moneyGap(pair, totalCost(leader, d), totalCost(arm, d), perPoint, d.equivalence_margin)
    : metricGap(pair, d.equivalence_margin);
  const isSeparate = isMoney || pair.p_adjusted === null || pair.p_adjusted < 1 - data.confidence;
  return { arm, pair, gap, state: stateOf(gap, isSeparate) };
}

// The first of the arms with the greatest value, as Python's max.
function best(arms, value) {
  return arms.reduce((top, arm) => value(arm) > value(top) ? arm : top);
}

function choose(data, settings) {
  const [at, d] = atSettings(data, settings);
  const done = at.arms.filter(arm => arm.status === "done" && arm.metric !== null);
  const rejected = {};
  for (const arm of done) {
    const missed = missedLimits(arm, d);
    if (missed.length) rejected[arm.name] = missed;
  }
  const eligible = done.filter(arm => !(arm.name in rejected));
  const choice = { state: done.length ? "none" : "nothing", arm: null, leader: null, rival: null, more_items: null, standings: {}, rejected };
  if (!eligible.length) return choice;
  const isMoney = eligible.every(arm => lossUsd(arm, d) !== null);
  const leader = best(eligible, arm => isMoney ? -lossUsd(arm, d) : arm.metric);
  const standings = eligible.filter(arm => arm !== leader).map(arm => standingOf(at, leader, arm, d, isMoney));
  choice.leader = leader.name;
  for (const s of standings) choice.standings[s.arm.name] = s.state;
  return pick(choice, leader, standings, data.z, d, isMoney);
}

function pick(choice, leader, standings, z, d, isMoney) {
  const cheaper = (a, b) => isCheaper(totalCost(a, d), totalCost(b, d));
  const equal = standings.filter(s => s.state === "equal");
  let arm = leader;
  for (const s of equal) if (cheaper(s.arm, arm)) arm = s.arm;
  const rivals = standings.filter(s => s.state === "open" && (isMoney || !cheaper(arm, s.arm)));
  if (!rivals.length) return { ...choice, state: equal.length ? "equal" : "take", arm: arm.name };
  const needed = rivals.map(s => [moreItems(s.gap, s.pair, z), s.arm.name]).filter(([n]) => n !== null);
  needed.sort(([n, a], [m, b]) => m - n || (a < b ? 1 : -1));
  const [more, rival] = needed[0] || [null, rivals[0].arm.name];
  return { ...choice, state: "open", more_items: more, rival };
}

function verdictOf(choice) {
  switch (choice.state) {
    case "take": return `take ${choice.arm}`;
    case "equal": return `practically equal: take the cheaper, ${choice.arm}`;
    case "open": return "too close to call" + (choice.more_items === null ? "" : `: about ${choice.more_items.toLocaleString("en-US")} more items`);
    case "none": return "none meets your limits";
  }
  return "no arm finished: nothing to compare";
}

// Requests after which the arm with the higher fixed cost has cost less; evaluation/costs/crossover.py.
function breakEven(data, settings, nameA, nameB) {
  const [at, d] = atSettings(data, settings);
  let [a, b] = [nameA, nameB].map(name => at.arms.find(arm => arm.name === name));
  const unit = data.is_priced ? "usd" : "device_seconds";
  const part = arm => arm && arm.cost ? [arm.cost["fixed_" + unit], arm.cost["request_" + unit].value] : [null, null];
  if ([...part(a), ...part(b)].includes(null)) return { a: nameA, b: nameB, status: "unknown", requests: null };
  let extra = part(b)[0] - part(a)[0], saving = part(a)[1] - part(b)[1];
  if (unit === "usd" && d.error_usd) {
    const pair = pairOf(at.pairs, nameB, nameA);
    if (!pair || pair.difference === null) return { a: nameA, b: nameB, status: "unknown", requests: null };
    saving += d.error_usd * pair.difference;
  }
  if (extra < 0 && saving < 0) { [a, b] = [b, a]; extra = -extra; saving = -saving; }
  const named = { a: a.name, b: b.name };
  if (extra <= 0 && saving > 0) return { ...named, status: "always", requests: 0 };
  return { ...named, status: saving > 0 ? "crosses" : "never", requests: saving > 0 ? extra / saving : null };
}
