const data = JSON.parse(document.getElementById("data").textContent);

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

// Colours stand as "@name" in the figures, so that one figure serves light and dark.
function themed(value) {
  if (typeof value === "string") return value.startsWith("@") ? color(value.slice(1)) : value;
  if (Array.isArray(value)) return value.map(themed);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
  }
  return value;
}

function drawOne(name) {
  const figure = data.figures[name], place = document.getElementById("plot-" + name);
  if (!place) return;
  const layout = themed(figure.layout);
  layout.paper_bgcolor = "rgba(0,0,0,0)";
  layout.plot_bgcolor = "rgba(0,0,0,0)";
  layout.font = { family: "system-ui, sans-serif", size: 13, color: color("ink") };
  for (const axis of ["xaxis", "yaxis"]) {
    layout[axis].gridcolor = color("line");
    layout[axis].linecolor = color("line");
  }
  // A narrow legend has a line per arm: give it room, so that the plot keeps its own.
  if (layout.showlegend && place.clientWidth < 560) layout.height += 17 * figure.data.filter(t => t.showlegend !== false).length;
  Plotly.react(place, themed(figure.data), layout, { displayModeBar: false, responsive: true });
}

// One chart at a time, so that the page answers in between: it is of use before its charts are there.
function draw() {
  for (const name of Object.keys(data.figures)) setTimeout(() => drawOne(name), 0);
}

function cell(row, text, label, kind) {
  const td = row.insertCell();
  td.textContent = text;
  td.dataset.label = label;
  td.className = "text" + (kind ? " " + kind : "");
}

// Only textContent is ever set: item texts are never parsed as HTML.
function showDifferences() {
  const select = document.getElementById("pair");
  if (!select || !select.value) return;
  const [a, b] = JSON.parse(select.value);
  const body = document.getElementById("differences");
  body.replaceChildren();
  for (const heading of ["a", "b"]) {
    document.getElementById("name-" + heading).textContent = heading === "a" ? a : b;
  }
  const rows = [];
  data.items.forEach((item, i) => {
    const one = data.answers[a][i], two = data.answers[b][i];
    if (one && two && one[1] !== two[1]) rows.push([item, one, two]);
  });
  rows.sort((x, y) => Math.abs(y[1][1] - y[2][1]) - Math.abs(x[1][1] - x[2][1]));
  for (const [item, one, two] of rows.slice(0, data.max_rows)) {
    const row = body.insertRow();
    cell(row, item[0], "item");
    if (data.shows_text) {
      cell(row, item[1], "input");
      cell(row, item[2], "right answer");
    }
    for (const [name, given, other] of [[a, one, two], [b, two, one]]) {
      const shown = data.shows_text ? given[0] + " (" + given[1].toFixed(2) + ")" : given[1].toFixed(2);
      cell(row, shown, name, given[1] > other[1] ? "right" : "wrong");
    }
  }
  const more = rows.length > data.max_rows ? ", the first " + data.max_rows + " shown" : "";
  document.getElementById("difference-count").textContent = rows.length + " items differ" + more + ".";
}

addEventListener("load", draw);  // plotly stands below this script
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
matchMedia("(max-width: 600px)").addEventListener("change", draw);
const select = document.getElementById("pair");
if (select) select.addEventListener("change", showDifferences);
showDifferences();
