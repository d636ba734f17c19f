"use strict";
// The viewer of numlstm's gates. Everything it shows is in the page: `about` (JSON), and blocks of numbers, zlib in
// base64, unpacked when they are first asked for. Numbers of an array: for each unit its lowest value and the width of
// one of `about.levels` levels (float32), then a byte for each step, unit by unit; 255 is a step without a value.
(() => {
  const about = JSON.parse(document.getElementById("about").textContent);
  const $ = (id) => document.getElementById(id);
  const state = { layer: 0, array: 0, unit: 0, step: 0, follow: -1, order: [] };
  const MISSING = 255;
  const ROW = 30, PAD = 8;

  // Numbers

  const blocks = new Map();
  async function bytes(id) {
    if (!blocks.has(id)) {
      blocks.set(id, (async () => {
        const text = $(id).textContent;
        const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
        return new Response(stream).arrayBuffer();
      })());
    }
    return blocks.get(id);
  }

  async function load(array) {
    if (!array.levels) {
      const buffer = await bytes(array.block), n = array.units;
      array.low = new Float32Array(buffer, 0, n);
      array.width = new Float32Array(buffer, 4 * n, n);
      array.levels = new Uint8Array(buffer, 8 * n);
      array.scores = new Int8Array(await bytes(array.follows));
    }
    return array;
  }

  const layer = () => about.layers[state.layer];
  const shown = () => layer().arrays[state.array];
  const named = (name) => layer().arrays.find((a) => a.name === name);

  function value(array, unit, step) {  // NaN where there is none, undefined while it is not unpacked
    if (!array || !array.levels) return undefined;
    if (unit >= array.units) return NaN;  // a projected output has fewer than the gates
    const level = array.levels[unit * about.steps + step];
    return level === MISSING ? NaN : array.low[unit] + level * array.width[unit];
  }

  function before(name, unit, step) {  // a state before a step
    const array = named(name), from = step + (layer().backwards ? 1 : -1);
    if (from < 0 || from >= about.steps) return layer().initial[name][unit] ?? NaN;
    return value(array, unit, from);
  }

  function extent(array, unit) {  // what stands for full colour
    if (array.unipolar) return 1;
    const low = array.low[unit], high = low + about.levels * array.width[unit];
    return Math.max(Math.abs(low), Math.abs(high)) || 1;
  }

  // -1 ... 1: the sign and strength of a value as they are drawn; a gate between 0 and 1 is half open at 0.
  const relative = (array, v, full) => Math.max(-1, Math.min(1, array.unipolar ? 2 * v - 1 : v / full));

  const number = (v) => v === undefined ? "…" : Number.isNaN(v) ? "none"
    : (v < 0 ? "−" : "+") + (Math.abs(v) >= 1000 || (v !== 0 && Math.abs(v) < 5e-4) ? Math.abs(v).toExponential(2)
      : Math.abs(v).toFixed(3));

  // Colours: mixed from the page's ground to blue (below) or orange (above), with ink that can be read on it

  let theme;
  function readTheme() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => {
      const hex = style.getPropertyValue(name).trim().slice(1);
      return [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16));
    };
    theme = Object.fromEntries(["ground", "ink", "soft", "plus", "minus", "line", "focus", "missing"]
      .map((name) => [name, colour("--" + name)]));
    theme.shades = Array.from({ length: 201 }, (_, k) => shade(k / 100 - 1));
  }
  const css = (c) => `rgb(${c[0]},${c[1]},${c[2]})`;
  const light = (c) => c.map((x) => x / 255).map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, k) => sum + x * [0.2126, 0.7152, 0.0722][k], 0);
  function shade(r) {
    const to = r < 0 ? theme.minus : theme.plus, part = Math.abs(r) ** 0.8;
    const ground = theme.ground.map((g, k) => Math.round(g + (to[k] - g) * part));
    return { ground: css(ground), ink: light(ground) > 0.179 ? "#000" : "#fff" };  // the better contrast of the two
  }
  const shadeOf = (r) => theme.shades[Math.round((r + 1) * 100)];

  // The view: a canvas of the size of the window onto it, drawn anew when anything moves

  const view = $("view"), canvas = $("canvas"), pen = canvas.getContext("2d");
  const FONT = "15px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace";
  let places = null;  // for text: x, width and row of each token

  const visible = (token) => token === "\n" ? "↵" : token === "\t" ? "⇥" : token === " " ? "·" : token;

  function lay() {
    pen.font = FONT;
    const widths = new Map(), words = about.level === "word", room = view.clientWidth - 2 * PAD;
    const x = new Float32Array(about.steps), w = new Float32Array(about.steps), row = new Uint32Array(about.steps);
    let at = 0, line = 0;
    for (let k = 0; k < about.steps; k++) {
      const token = about.tokens[k];
      if (!widths.has(token)) widths.set(token, pen.measureText(visible(token)).width + (words ? 8 : 1.5));
      w[k] = widths.get(token);
      if (at + w[k] > room && at > 0) { at = 0; line++; }
      x[k] = at + PAD; row[k] = line; at += w[k];
      if (token === "\n") { at = 0; line++; }
    }
    places = { x, w, row, rows: line + 1 };
    $("spacer").style.height = `${Math.max(0, places.rows * ROW + 2 * PAD - view.clientHeight)}px`;
  }

  function resize() {
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(view.clientWidth * scale);
    canvas.height = Math.round(view.clientHeight * scale);
    canvas.style.width = `${view.clientWidth}px`;
    canvas.style.height = `${view.clientHeight}px`;
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    if (about.tokens) lay(); else $("spacer").style.height = "0";
    draw();
  }

  let waiting = false;
  function draw() {
    if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; paint(); }); }
  }

  function paint() {
    const width = view.clientWidth, height = view.clientHeight;
    pen.fillStyle = css(theme.ground);
    pen.fillRect(0, 0, width, height);
    if (about.tokens) paintText(height); else paintSeries(width, height);
  }

  function firstInRow(line) {  // by halving: rows grow with the tokens
    let low = 0, high = about.steps;
    while (low < high) { const mid = (low + high) >> 1; if (places.row[mid] < line) low = mid + 1; else high = mid; }
    return low;
  }

  // A bar that rises for a value above the middle and hangs for one below: the sign without its colour.
  function bar(r, x, middle, w, half) {
    pen.fillStyle = css(theme.ink);
    const tall = Math.abs(r) * half;
    pen.fillRect(x, r < 0 ? middle : middle - tall, w, Math.max(tall, 0.6));
  }

  function paintText(height) {
    const top = view.scrollTop, array = shown(), unit = state.unit, ready = Boolean(array.levels);
    const full = ready ? extent(array, unit) : 1;
    pen.font = FONT;
    pen.textBaseline = "middle";
    const last = Math.floor((top + height - PAD) / ROW);
    for (let k = firstInRow(Math.max(0, Math.floor((top - PAD) / ROW))); k < about.steps && places.row[k] <= last; k++) {
      const x = places.x[k], w = places.w[k], y = PAD + places.row[k] * ROW - top, token = about.tokens[k];
      const v = ready ? value(array, unit, k) : 0;
      let ink = css(theme.ink);
      if (Number.isNaN(v)) {
        pen.fillStyle = css(theme.missing);
        pen.fillRect(x, y + 12, w, 2);
      } else if (ready) {
        const r = relative(array, v, full), tone = shadeOf(r);
        pen.fillStyle = tone.ground;
        pen.fillRect(x, y, w + 0.5, 19);
        ink = tone.ink;
        bar(r, x + 1, y + 23.5, w - 2, 4.5);
      }
      pen.fillStyle = ink;
      if (token === " " || token === "\n") pen.globalAlpha = 0.55;
      pen.fillText(visible(token), x + (about.level === "word" ? 4 : 0.75), y + 10);
      pen.globalAlpha = 1;
      if (k === state.step) {
        pen.strokeStyle = css(theme.focus);
        pen.lineWidth = 2.5;
        pen.strokeRect(x - 0.5, y - 1, w + 1, ROW - 1);
      }
    }
  }

  const across = (step, width) => 60 + (step + 0.5) * (width - 60 - PAD) / about.steps;

  function paintSeries(width, height) {
    const array = shown(), unit = state.unit, ready = Boolean(array.levels), full = ready ? extent(array, unit) : 1;
    const each = Math.min(220, (height - 190) / about.series.length), wide = (width - 60 - PAD) / about.steps;
    pen.font = "13px system-ui, sans-serif";
    pen.textBaseline = "top";
    about.series.forEach((series, n) => {
      const top = PAD + n * each, known = series.values.filter((v) => v !== null);
      const low = Math.min(...known), high = Math.max(...known), span = high - low || 1;
      pen.strokeStyle = css(theme.ink);
      pen.lineWidth = 1.3;
      pen.beginPath();
      let on = false;
      series.values.forEach((v, k) => {
        if (v === null) { on = false; return; }
        const y = top + 20 + (1 - (v - low) / span) * (each - 30);
        if (on) pen.lineTo(across(k, width), y); else pen.moveTo(across(k, width), y);
        on = true;
      });
      pen.stroke();
      pen.fillStyle = css(theme.ink);
      pen.fillText(series.name, PAD, top);
      pen.fillStyle = css(theme.soft);
      pen.fillText(high.toPrecision(3), PAD, top + 20);
      pen.fillText(low.toPrecision(3), PAD, top + each - 22);
    });
    const strip = PAD + about.series.length * each + 6, middle = strip + 95;
    for (let k = 0; ready && k < about.steps; k++) {
      const v = value(array, unit, k), x = across(k, width) - wide / 2;
      if (Number.isNaN(v)) {
        pen.fillStyle = css(theme.missing);
        pen.fillRect(x, strip + 12, wide, 2);
        continue;
      }
      const r = relative(array, v, full);
      pen.fillStyle = shadeOf(r).ground;
      pen.fillRect(x, strip, wide + 0.5, 26);
      bar(r, x + wide * 0.1, middle, Math.max(wide * 0.8, 0.5), 55);
    }
    pen.strokeStyle = css(theme.line);
    pen.lineWidth = 1;
    pen.strokeRect(60, strip, width - 60 - PAD, 26);
    pen.beginPath(); pen.moveTo(60, middle); pen.lineTo(width - PAD, middle); pen.stroke();
    pen.fillStyle = css(theme.ink);
    pen.fillText(array.name, PAD, strip + 5);
    const x = across(state.step, width);
    pen.strokeStyle = css(theme.focus);
    pen.lineWidth = 2;
    pen.beginPath(); pen.moveTo(x, PAD); pen.lineTo(x, middle + 58); pen.stroke();
  }

  function stepAt(event) {
    const box = view.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    if (!about.tokens) {
      const k = Math.floor((x - 60) * about.steps / (view.clientWidth - 60 - PAD));
      return k >= 0 && k < about.steps ? k : -1;
    }
    const line = Math.floor((y + view.scrollTop - PAD) / ROW);
    for (let k = firstInRow(line); k < about.steps && places.row[k] === line; k++) {
      if (x < places.x[k] + places.w[k]) return k;
    }
    return -1;
  }

  function reveal() {
    if (!about.tokens) return;
    const y = PAD + places.row[state.step] * ROW;
    if (y < view.scrollTop) view.scrollTop = Math.max(0, y - PAD);
    else if (y + ROW > view.scrollTop + view.clientHeight) view.scrollTop = y + ROW + PAD - view.clientHeight;
  }

  // Units by what they follow

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, v] of Object.entries(attributes)) made.setAttribute(key, v);
    return made;
  }

  function score(array, feature, unit) { return array.scores[feature * array.units + unit] / 100; }

  function best(array, unit) {
    let found = 0;
    for (let n = 1; n < about.features.length; n++) {
      if (Math.abs(score(array, n, unit)) > Math.abs(score(array, found, unit))) found = n;
    }
    return found;
  }

  function sort() {
    const array = shown(), list = $("units");
    const what = Array.from({ length: array.units }, (_, u) => state.follow >= 0 ? state.follow : best(array, u));
    state.order = what.map((_, u) => u);
    if (about.features.length && state.follow > -2) {
      state.order.sort((a, b) => Math.abs(score(array, what[b], b)) - Math.abs(score(array, what[a], a)) || a - b);
    }
    list.replaceChildren(...state.order.map((unit) => {
      const item = element("li", undefined, { role: "option", id: `unit-${unit}`, "data-unit": unit });
      item.append(element("span", `${unit}`));
      if (about.features.length) {
        const r = score(array, what[unit], unit);
        item.append(element("span", about.features[what[unit]], { class: "what", title: about.features[what[unit]] }), element("span", signed(r)));
      }
      return item;
    }));
    mark();
  }
  const signed = (r) => `${r < 0 ? "−" : "+"}${Math.abs(r).toFixed(2)}`;

  function mark() {
    const list = $("units"), item = $(`unit-${state.unit}`);
    for (const old of list.querySelectorAll('[aria-selected="true"]')) old.setAttribute("aria-selected", "false");
    if (!item) return;
    item.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", item.id);
    const y = item.offsetTop - list.offsetTop;
    if (y < list.scrollTop || y + item.offsetHeight > list.scrollTop + list.clientHeight) {
      list.scrollTop = y - list.clientHeight / 2;
    }
  }

  // The cell at this step

  const SVG = $("diagram-lstm").content.firstElementChild.namespaceURI;
  function svg(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, v] of Object.entries(attributes)) made.setAttribute(key, v);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function buildDiagram() {
    const holder = $("diagram"), about_ = layer();
    let picture;
    if (about_.kind === "other") {
      picture = general(about_);
    } else {
      picture = $(`diagram-${about_.kind}`).content.firstElementChild.cloneNode(true);
    }
    for (const group of picture.querySelectorAll("[data-gate]")) {
      const gate = group.dataset.gate === "$gate" ? about_.gates[0] : group.dataset.gate;
      group.dataset.gate = gate;
      const x = Number(group.dataset.x), y = Number(group.dataset.y || 198);
      group.append(svg("rect", { x: x - 30, y: y - 28, width: 60, height: 56, rx: 5 }),
        svg("rect", { x: x - 29, y, width: 58, height: 0, class: "bar" }),
        svg("text", { x, y: y - 12 }, gate), svg("text", { x, y: y + 6, class: "value", "data-value": gate }),
        svg("text", { x, y: y + 21, class: "faint" }, group.dataset.label || ""));
    }
    holder.replaceChildren(picture);
    $("equations").textContent = about_.equations;
  }

  function general(about_) {  // any cell: old states and input, gates, new states
    const n = Math.max(about_.gates.length, about_.states.length), step = Math.min(90, 420 / n);
    const picture = svg("svg", { viewBox: "0 0 460 320", role: "img",
      "aria-label": `Flow of the cell ${about_.cell}: input and old states through the gates to the new states` });
    const defs = svg("defs", {}), marker = svg("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4,
      markerWidth: 7, markerHeight: 7, orient: "auto" });
    marker.append(svg("path", { d: "M0 0 L8 4 L0 8 z" }));
    defs.append(marker);
    picture.append(defs);
    picture.append(svg("text", { x: 230, y: 310 }, "input x, old states"));
    picture.append(svg("rect", { x: 20, y: 120, width: 420, height: 26, rx: 5 }));
    picture.append(svg("text", { x: 230, y: 138, class: "faint" }, "the cell's equations (below)"));
    about_.gates.forEach((gate, k) => {
      const x = 230 + (k - (about_.gates.length - 1) / 2) * step;
      picture.append(svg("path", { class: "arrow", d: `M${x} 290 V250` }), svg("path", { class: "arrow", d: `M${x} 190 V146` }));
      picture.append(svg("g", { "data-gate": gate, "data-x": x, "data-y": 220, "data-label": "gate" }));
    });
    about_.states.forEach((name, k) => {
      const x = 230 + (k - (about_.states.length - 1) / 2) * Math.min(140, 420 / about_.states.length);
      picture.append(svg("path", { class: "arrow", d: `M${x} 120 V76` }), svg("text", { x, y: 22 }, name),
        svg("text", { x, y: 44, class: "value", "data-value": name }),
        svg("text", { x, y: 64, class: "faint", "data-value": `${name}_old`, "data-prefix": "old " }));
    });
    return picture;
  }

  function numbers() {
    const u = state.unit, t = state.step, of = {};
    for (const array of layer().arrays) of[array.name] = value(array, u, t);
    for (const name of layer().states) of[`${name}_old`] = before(name, u, t);
    of["f*c_old"] = of.f * of.c_old; of["i*g"] = of.i * of.g;
    of["z*h_old"] = of.z * of.h_old; of["(1-z)*n"] = (1 - of.z) * of.n;
    return of;
  }

  function showStep() {
    const of = numbers(), array = shown(), t = state.step;
    for (const place of $("diagram").querySelectorAll("[data-value]")) {
      place.textContent = (place.dataset.prefix || "") + number(of[place.dataset.value]);
    }
    for (const group of $("diagram").querySelectorAll("[data-gate]")) {
      const gate = named(group.dataset.gate), v = of[group.dataset.gate], box = group.querySelector(".bar");
      const middle = Number(group.dataset.y || 198), good = gate && v !== undefined && !Number.isNaN(v);
      const r = good ? Math.max(-1, Math.min(1, v)) : 0;
      // a gate fills its box from below; what may be negative rises or hangs from the middle
      const tall = good && gate.unipolar ? 54 * v : 27 * Math.abs(r);
      const y = good && gate.unipolar ? middle + 27 - tall : r < 0 ? middle : middle - tall;
      box.setAttribute("y", y);
      box.setAttribute("height", Math.max(0, tall));
      box.classList.toggle("below", r < 0);
    }
    const rows = layer().arrays.map((a) => {
      const row = element("tr");
      row.append(element("th", a.title, { scope: "row" }), element("td", number(of[a.name])));
      return row;
    });
    $("numbers").tBodies[0].replaceChildren(...rows);
    const here = about.tokens ? `“${visible(about.tokens[t])}”`
      : about.series.map((s) => `${s.name} ${s.values[t] === null ? "missing" : s.values[t]}`).slice(0, 3).join(", ");
    $("now").textContent = `Step ${t + 1} of ${about.steps}: ${here}. Unit ${state.unit}, ${array.title}: ${number(of[array.name])}`;
    if (about.expects) showExpected(t);
  }

  let expected = null;
  async function showExpected(t) {
    if (!expected) expected = new Uint16Array(await bytes(about.expects.block));
    if (t !== state.step) return;
    const top = about.expects.top, list = element("table"), n = about.steps * top;
    list.append(element("caption", "What the model expects next"));
    for (let k = 0; k < top; k++) {
      const row = element("tr"), token = about.vocabulary[expected[t * top + k]];
      const came = t + 1 < about.steps && about.tokens[t + 1] === token ? " (came)" : "";
      row.append(element("th", visible(token) + came, { scope: "row" }),
        element("td", `${(100 * expected[n + t * top + k] / 65535).toFixed(1)} %`));
      list.append(row);
    }
    $("expects").replaceChildren(list);
  }

  // The legend

  function showLegend() {
    const array = shown(), full = array.levels ? extent(array, state.unit) : 1, c = $("scale").getContext("2d");
    for (let x = 0; x < 180; x++) {
      const r = x / 89.5 - 1;
      c.fillStyle = shadeOf(Math.max(-1, Math.min(1, r))).ground;
      c.fillRect(x, 0, 1, 12);
      c.fillStyle = css(theme.ground);
      c.fillRect(x, 12, 1, 10);
      c.fillStyle = css(theme.ink);
      c.fillRect(x, r < 0 ? 17 : 17 - r * 5, 1, Math.max(Math.abs(r) * 5, 0.5));
    }
    $("low").textContent = array.unipolar ? "0, closed" : number(-full);
    $("high").textContent = array.unipolar ? "1, open" : number(full);
    $("scale").setAttribute("aria-label", array.unipolar ? "from blue, closed, to orange, open" : "from blue, negative, to orange, positive");
    $("legend-text").textContent = array.unipolar ? "(bars rise above one half and hang below it)" : "(bars rise for positive values and hang for negative ones)";
  }

  // What a person does

  async function choose(changes) {
    const fresh = "layer" in changes && changes.layer !== state.layer;
    if (fresh) {
      const name = shown().name;
      state.layer = changes.layer;
      fillArrays(name);
    }
    Object.assign(state, changes);
    if (fresh) state.array = Number($("array").value);
    const array = shown();
    state.unit = Math.max(0, Math.min(array.units - 1, state.unit));
    state.step = Math.max(0, Math.min(about.steps - 1, state.step));
    const asked = array;
    await load(array);
    if (asked !== shown()) return;
    $("unit").max = array.units - 1;
    $("unit").value = state.unit;
    $("unit").setAttribute("aria-valuetext", `unit ${state.unit}`);
    $("unit-number").textContent = state.unit;
    $("array").value = state.array;
    if (fresh) buildDiagram();
    if (fresh || "array" in changes || "follow" in changes || !state.order.length) {
      sort();
      if (changes.first) state.unit = state.order[0], $("unit").value = state.unit, $("unit-number").textContent = state.unit;
    }
    if ("unit" in changes || changes.first) mark();
    if ("step" in changes) reveal();
    showLegend();
    showStep();
    draw();
  }

  function fillArrays(preferred) {
    $("array").replaceChildren(...layer().arrays.map((a, k) => element("option", a.title, { value: k })));
    const k = layer().arrays.findIndex((a) => a.name === preferred);
    $("array").value = k < 0 ? 0 : k;
  }

  function move(by) {
    const at = state.order.indexOf(state.unit), to = Math.max(0, Math.min(state.order.length - 1, at + by));
    choose({ unit: state.order[to] });
  }

  const KEYS = {
    ArrowRight: () => choose({ step: state.step + 1 }), ArrowLeft: () => choose({ step: state.step - 1 }),
    PageDown: () => choose({ step: state.step + 50 }), PageUp: () => choose({ step: state.step - 50 }),
    Home: () => choose({ step: 0 }), End: () => choose({ step: about.steps - 1 }),
    ArrowDown: () => move(1), ArrowUp: () => move(-1),
    "]": () => choose({ array: Math.min(layer().arrays.length - 1, state.array + 1) }),
    "[": () => choose({ array: Math.max(0, state.array - 1) }),
  };

  function listen() {
    document.addEventListener("keydown", (event) => {
      const busy = event.target instanceof Element && event.target.closest("select, input, summary");
      if (busy || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
      event.preventDefault();
      KEYS[event.key]();
    });
    view.addEventListener("click", (event) => { const k = stepAt(event); if (k >= 0) choose({ step: k }); });
    view.addEventListener("scroll", draw, { passive: true });
    $("layer").addEventListener("change", (event) => choose({ layer: Number(event.target.value), unit: 0 }));
    $("array").addEventListener("change", (event) => choose({ array: Number(event.target.value) }));
    $("unit").addEventListener("input", (event) => choose({ unit: Number(event.target.value) }));
    $("follow").addEventListener("change", (event) => choose({ follow: Number(event.target.value), first: true }));
    $("units").addEventListener("click", (event) => {
      const item = event.target.closest("li");
      if (item) choose({ unit: Number(item.dataset.unit) });
    });
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readTheme(); showLegend(); draw(); });
    new ResizeObserver(resize).observe(view);
  }

  async function start() {
    $("layer").replaceChildren(...about.layers.map((l, k) => element("option", `${l.path} (${l.cell})`, { value: k })));
    $("follow").replaceChildren(element("option", "whatever it follows most", { value: -1 }),
      ...about.features.map((f, k) => element("option", f, { value: k })),
      element("option", "its number", { value: -2 }));
    fillArrays(about.layers[0].first);
    state.array = Number($("array").value);
    buildDiagram();
    await choose({ first: true, step: 0, follow: -1 });
    window.numlstm.ready = true;
    for (const l of about.layers) {  // the rest, in the background: the diagram shows them all
      for (const array of l.arrays) {
        await load(array);
        await new Promise((done) => setTimeout(done));
        if (l === layer()) showStep();
      }
    }
    window.numlstm.complete = true;
  }

  window.numlstm = { about, state, ready: false, complete: false, value: (name, unit, step) => value(named(name), unit, step) };
  readTheme();
  resize();  // the text without colours, before the numbers have arrived
  listen();
  document.addEventListener("DOMContentLoaded", () => {
    start().catch((problem) => {
      $("now").textContent = `This page can't be shown here: ${problem.message}. It takes a browser of 2023 or later.`;
      $("now").classList.add("problem");
    });
  });
})();
