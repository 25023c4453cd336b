"use strict";
// Without scripts the page is complete; this adds sorting, a filter, figures at the pointer, and copying.
const summary = JSON.parse(document.getElementById("data").textContent);
const rows = [...document.querySelectorAll("#layers tbody tr")]; // in running order, however they are sorted later
for (const table of document.querySelectorAll("table.sorted")) {
  const body = table.tBodies[0];
  const value = (row, column) => row.cells[column].textContent.trim();
  const number = (text) => (text === "∞" ? Infinity : parseFloat(text.replaceAll(",", "")));
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.title = "sort by this column";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("n");
      const now = head.getAttribute("aria-sort");
      const descending = now ? now === "ascending" : numeric && column > 0;
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const compare = (a, b) => {
        if (!numeric) return value(a, column).localeCompare(value(b, column), undefined, { numeric: true }) * (descending ? -1 : 1);
        const [x, y] = [number(value(a, column)), number(value(b, column))];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // what has no number stays last
        return (x - y || 0) * (descending ? -1 : 1);
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
const filter = document.getElementById("filter");
filter.closest(".tools").hidden = false;
filter.addEventListener("input", () => {
  const wanted = filter.value.toLowerCase();
  let shown = 0;
  for (const row of rows) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
    shown += !row.hidden;
  }
  document.getElementById("shown").textContent = wanted ? `${shown} shown` : "";
});
const tip = document.getElementById("tip");
const short = (number) => (typeof number === "number" ? String(Number(number.toPrecision(2))) : number);
function told(layer, chart) {
  const input = layer.activation_bits === null ? "float32" : `${layer.activation_bits} bits`;
  const lines = [layer.name, `weights ${layer.weight_bits} bits, input ${input}`];
  lines.push(`${layer.float_bytes.toLocaleString("en")} → ${layer.size_bytes.toLocaleString("en")} bytes`);
  lines.push(`error ${short(layer.error)}, plain rounding ${short(layer.baseline_error)}; kept: ${layer.solver}`);
  if (chart.classList.contains("heat")) {
    lines.push("sensitivity:");
    const chosen = summary.planned.chosen[layer.name];
    for (const [option, loss] of Object.entries(summary.planned.table[layer.name])) {
      lines.push(`${option}: ${short(loss)}${option === chosen ? ", chosen" : ""}`);
    }
  }
  return lines.join("\n");
}
for (const chart of document.querySelectorAll("svg.columns")) {
  const [left, right] = [84, 988]; // of the columns, in units of the drawing
  const width = (right - left) / summary.layers.length;
  const pointed = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  pointed.setAttribute("class", "pointed");
  const column = (event) => {
    const box = chart.getBoundingClientRect();
    return Math.floor((((event.clientX - box.left) / box.width) * 1000 - left) / width);
  };
  const leave = () => {
    tip.hidden = true;
    pointed.remove();
  };
  chart.addEventListener("pointermove", (event) => {
    const k = column(event);
    if (!(k in summary.layers)) return leave();
    tip.textContent = told(summary.layers[k], chart);
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8))}px`;
    const place = { x: left + k * width, y: 14, width, height: chart.dataset.bottom - 14 };
    for (const [name, value] of Object.entries(place)) pointed.setAttribute(name, value);
    if (!pointed.isConnected) chart.append(pointed);
  });
  chart.addEventListener("pointerleave", leave);
  chart.addEventListener("click", (event) => {
    const row = rows[column(event)];
    if (!row) return;
    document.querySelectorAll("tr.found").forEach((other) => other.classList.remove("found"));
    row.hidden = false;
    row.classList.add("found");
    row.scrollIntoView({ block: "center" });
  });
}
const copy = document.getElementById("copy");
copy.hidden = false;
copy.addEventListener("click", async () => {
  const text = document.getElementById("data").textContent;
  const said = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(text);
    said.textContent = "copied";
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    said.textContent = document.execCommand("copy") ? "copied" : "the browser does not allow it";
    area.remove();
  }
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
