"use strict";

// The page is built from the JSON beside this script.  Texts become text nodes and attribute values, never HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const tip = document.getElementById("tip");
const hidden = new Set(); // numbers of the groups that are switched off
const WIDTH = 900, HEIGHT = 380, LEFT = 60, RIGHT = 16, TOP = 10, BOTTOM = 46;
const REACH = 14; // pixels within which a point answers to the mouse

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "circle", "line", "text"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function section(title, text, ...children) {
  page.append(make("h2", {}, title), ...(text ? [make("p", {}, text)] : []), ...children);
}

// Tables -------------------------------------------------------------------------------------------------------------

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null); // what is missing comes last
  return typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortableTable(id, { columns, rows }) {
  if (!rows.length) return "";
  const body = make("tbody");
  const lines = rows.map((group, row) => {
    const cells = columns.map(({ shown }) => make("td", shown[row].length > 60 ? { class: "long" } : {}, shown[row]));
    if (group !== null && cells.length) {
      const dot = make("i");
      dot.style.background = data.groups[group].colour;
      cells[0].prepend(dot);
    }
    return make("tr", group === null ? {} : { "data-group": group }, ...cells);
  });
  body.append(...lines);
  const heads = columns.map(({ name, order }) => {
    const button = make("button", { type: "button" }, name);
    const head = make("th", { scope: "col" }, button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const missing = (row) => order[row] === null;
      const sorted = [...lines.keys()].sort((a, b) =>
        missing(a) || missing(b) ? compare(order[a], order[b]) : (down ? -1 : 1) * compare(order[a], order[b]));
      body.append(...sorted.map((row) => lines[row]));
    });
    return head;
  });
  const table = make("table", { id }, make("thead", {}, make("tr", {}, ...heads)), body);
  return make("div", { class: "wide" }, table);
}

// Figures ------------------------------------------------------------------------------------------------------------

function ticks(low, high, most = 7) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found.map((value) => Number(value.toPrecision(6)));
}

function extent(values, least, most) {
  const known = values.filter((value) => value !== null);
  let low = Math.min(...known), high = Math.max(...known);
  if (low === high) [low, high] = [low - 1, high + 1];
  const margin = 0.03 * (high - low);
  return [Math.max(low - margin, least), Math.min(high + margin, most)];
}

function axes(xLabel, xRange, yLabel, yRange) {
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${yLabel}, ${xLabel}` });
  const x = (value) => LEFT + ((value - xRange[0]) / (xRange[1] - xRange[0])) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - yRange[0]) / (yRange[1] - yRange[0])) * (HEIGHT - TOP - BOTTOM);
  for (const value of ticks(...xRange)) {
    svg.append(make("line", { class: "grid", x1: x(value), x2: x(value), y1: TOP, y2: HEIGHT - BOTTOM }),
      make("text", { x: x(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, String(value)));
  }
  for (const value of ticks(...yRange)) {
    svg.append(make("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      make("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, String(value)));
  }
  const bottom = HEIGHT - BOTTOM;
  svg.append(make("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: bottom, y2: bottom }),
    make("line", { class: "axis", x1: LEFT, x2: LEFT, y1: TOP, y2: HEIGHT - BOTTOM }),
    make("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 8, "text-anchor": "middle" }, xLabel),
    make("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(14 ${(TOP + bottom) / 2}) rotate(-90)` },
      yLabel));
  return { svg, x, y };
}

function layer(group) {
  return make("g", { "data-group": group, class: hidden.has(group) ? "off" : "" });
}

// Points answer to the mouse: each has a place, its group and a text; `alike` names the points that light up together.
function answer(svg, points) {
  const lit = [];
  const clear = () => {
    tip.hidden = true;
    for (const node of lit.splice(0)) node.classList.remove("near");
  };
  svg.addEventListener("mouseleave", clear);
  svg.addEventListener("mousemove", (event) => {
    const scale = WIDTH / svg.getBoundingClientRect().width;
    const box = svg.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    let found = null, least = REACH * scale;
    for (const point of points) {
      const distance = Math.hypot(point.x - x, point.y - y);
      if (distance < least && !hidden.has(point.group)) [found, least] = [point, distance];
    }
    clear();
    if (!found) return;
    for (const point of points) {
      if (point.node && (point === found || (point.alike !== undefined && point.alike === found.alike))) {
        point.node.classList.add("near");
        lit.push(point.node);
      }
    }
    tip.textContent = found.text;
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  });
}

function chooser(label, options, chosen) {
  const select = make("select", {}, ...Object.entries(options).map(([value, text]) => make("option", { value }, text)));
  select.addEventListener("change", chosen);
  return { select, node: make("label", {}, `${label} `, select) };
}

function figure(id, choosers, draw) {
  const node = make("figure", { id }, ...choosers.map((chooser) => chooser.node));
  let drawn = null;
  const redraw = () => {
    drawn?.remove();
    tip.hidden = true;
    node.append(drawn = draw());
  };
  for (const { select } of choosers) select.addEventListener("change", redraw);
  redraw();
  return node;
}

const round = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits));

function curves() {
  const { names, axes: over, lines } = data.curves;
  const what = chooser("what", names, () => {});
  const by = chooser("over", over, () => {});
  return figure("curves", [what, by], () => {
    const drawn = lines[what.select.value][by.select.value];
    if (!drawn.length) return make("p", {}, "None of the runs has such a model.");
    const edges = drawn.flatMap(({ y, deviation }) => y.flatMap((v, i) => [v - (deviation[i] ?? 0), v + (deviation[i] ?? 0)]));
    const { svg, x, y } = axes(over[by.select.value], extent(drawn.flatMap((line) => line.x), 0, Infinity),
      names[what.select.value], extent(edges, 0, 100));
    const points = [];
    for (const line of drawn) {
      const { colour, dashes, label } = data.groups[line.group];
      const group = layer(line.group);
      const at = (i, sign) => `${x(line.x[i])},${y(Math.min(100, Math.max(0, line.y[i] + sign * (line.deviation[i] ?? 0))))}`;
      const forth = line.x.map((_, i) => at(i, 1)), back = line.x.map((_, i) => at(i, -1)).reverse();
      if (line.seeds > 1) {
        group.append(make("path", { d: `M${[...forth, ...back].join("L")}Z`, fill: colour, "fill-opacity": 0.13 }));
      }
      group.append(make("path", { d: `M${line.x.map((_, i) => at(i, 0)).join("L")}`, fill: "none", stroke: colour,
        "stroke-width": 2, "stroke-dasharray": dashes.map((dash) => 2 * dash).join(" ") }));
      line.x.forEach((place, i) => {
        const node = make("circle", { cx: x(place), cy: y(line.y[i]), r: 3, fill: colour });
        group.append(node);
        const several = line.seeds > 1 ? ` ± ${round(line.deviation[i])} over ${line.seeds} seeds` : ", one seed";
        points.push({ x: x(place), y: y(line.y[i]), group: line.group, node,
          text: `${label}\n${over[by.select.value]}: ${round(place, by.select.value === "round" ? 0 : 2)}\n` +
            `${round(line.y[i])} %${several}` });
      });
      svg.append(group);
    }
    answer(svg, points);
    return svg;
  });
}

function clientPoints() {
  const places = {
    rank: "rank of the client, worst to best (%)",
    examples: "training examples of the client",
    entropy: "entropy of the client's labels (1: all alike)",
    ...(data.clients.some((run) => run.alone.some((value) => value !== null))
      ? { alone: "accuracy of the client's local-only model (%)" } : {}),
  };
  const over = chooser("against", places, () => {});
  return figure("clients", [over], () => {
    const key = over.select.value;
    const columns = data.clients.map((run) => {
      if (key !== "rank") return run[key];
      const order = [...run.accuracy.keys()].sort((a, b) => run.accuracy[a] - run.accuracy[b]);
      const rank = [];
      order.forEach((client, place) => { rank[client] = (100 * (place + 0.5)) / order.length; });
      return rank;
    });
    const { svg, x, y } = axes(places[key], extent(columns.flat(), key === "rank" ? 0 : -Infinity, Infinity),
      "client accuracy (%)", extent(data.clients.flatMap((run) => run.accuracy), -3, 103));
    const points = [];
    if (key === "alone") {
      const [low, high] = extent(columns.flat(), 0, 100);
      svg.append(make("line", { class: "axis", x1: x(low), y1: y(low), x2: x(high), y2: y(high) }));
    }
    data.clients.forEach((run, number) => {
      const { colour, label } = data.groups[run.group];
      const group = layer(run.group);
      run.client.forEach((client, i) => {
        const place = columns[number][i];
        if (place === null) return;
        const node = make("circle", { cx: x(place), cy: y(run.accuracy[i]), r: 3, fill: colour, "fill-opacity": 0.55 });
        group.append(node);
        const alone = run.alone[i] === null ? ""
          : `\nalone: ${round(run.alone[i])} % (${run.accuracy[i] < run.alone[i] ? "hurt" : "not hurt"})`;
        points.push({ x: x(place), y: y(run.accuracy[i]), group: run.group, node, alike: `${run.partition}/${client}`,
          text: `client ${client} of ${label}, seed ${run.seed}\naccuracy: ${round(run.accuracy[i])} %${alone}\n` +
            `${run.examples[i]} training examples of ${run.classes[i]} classes, entropy ${round(run.entropy[i])}` });
      });
      svg.append(group);
    });
    answer(svg, points);
    return svg;
  });
}

function costs() {
  return figure("costs", [], () => {
    const { svg, x, y } = axes("bytes sent, up and down, all clients (MB)",
      extent(data.costs.map((cost) => cost.megabytes), -Infinity, Infinity), "mean client accuracy, last round (%)",
      extent(data.costs.map((cost) => cost.accuracy), -3, 103));
    const points = data.costs.map(({ group, seed, megabytes, accuracy }) => {
      const { colour, label } = data.groups[group];
      const node = make("circle", { cx: x(megabytes), cy: y(accuracy), r: 5, fill: colour, "fill-opacity": 0.7 });
      const place = layer(group);
      place.append(node);
      svg.append(place);
      return { x: x(megabytes), y: y(accuracy), group, node,
        text: `${label}, seed ${seed}\n${round(accuracy)} %, ${round(megabytes)} MB` };
    });
    answer(svg, points);
    return svg;
  });
}

// Methods are switched on and off everywhere at once ---------------------------------------------------------------------

function switches() {
  const nav = make("nav", { "aria-label": "methods" });
  const turn = (group, off) => {
    off ? hidden.add(group) : hidden.delete(group);
    buttons[group].setAttribute("aria-pressed", String(!off));
    for (const node of document.querySelectorAll(`[data-group="${group}"]`)) node.classList.toggle("off", off);
  };
  const buttons = data.groups.map(({ label, colour, dashes }, group) => {
    const sample = make("svg", { viewBox: "0 0 26 10" }, make("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: colour,
      "stroke-width": 3, "stroke-dasharray": dashes.map((dash) => 2 * dash).join(" ") }));
    const button = make("button", { type: "button", "aria-pressed": "true" }, sample, label);
    button.addEventListener("click", () => turn(group, !hidden.has(group)));
    return button;
  });
  const all = make("button", { type: "button" }, "all or none");
  all.addEventListener("click", () => {
    const off = hidden.size === 0;
    buttons.forEach((_, group) => turn(group, off));
  });
  nav.append(...buttons, all);
  return nav;
}

document.title = data.title;
page.append(make("h1", {}, data.title), make("p", {}, data.about), switches());
section("Claims, and what they rest on", data.claims.basis,
  ...data.claims.notes.map((note) => make("p", {}, note)), sortableTable("claims", data.claims.table));
section("Methods", "Accuracy on the clients' own test data, mean over clients; ± is the sample standard deviation over " +
  "seeds. Hurt: clients worse off than with their local-only model.", sortableTable("methods", data.tables.methods));
section("Convergence", "Lines: mean over seeds; bands: plus and minus one sample standard deviation over seeds, none for " +
  "one seed.", curves());
section("Clients", "A point is a client of a run, at the run's last evaluation; the same client lights up in all runs.",
  clientPoints());
section("Accuracy against communication", "A point is a run; bytes of all training rounds.", costs());
section("Runs", "", sortableTable("runs", data.tables.runs));
section("Where the runs differ", "Settings, versions and machines that are not the same in all runs; empty: not a setting " +
  "of this method.", sortableTable("settings", data.tables.settings));
section("What they have in common", "", make("details", {}, make("summary", {}, "settings, versions and machine"),
  sortableTable("common", data.tables.common)));
