"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

  // ------------------------------------------------------------------ light and dark
  const root = document.documentElement;
  const darkSystem = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : darkSystem.matches);
  const redraws = [];
  const themed = () => {
    $("#theme").textContent = isDark() ? "Light" : "Dark";
    redraws.forEach((draw) => draw());
  };
  $("#theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    themed();
  });
  darkSystem.addEventListener("change", themed);
  matchMedia("print").addEventListener("change", themed);

  // ------------------------------------------------------------------ figures under the pointer
  for (const chart of $$(".chart")) {
    const holder = $(".points", chart);
    if (!holder) continue;
    const { x, series } = JSON.parse(holder.textContent);
    const plot = $(".plot", chart), tip = $(".tip", chart), cursor = $(".cursor", chart);
    const placed = (v) => x.log ? Math.log(v / x.low) / Math.log(x.high / x.low) : (v - x.low) / (x.high - x.low);
    const show = (event) => {
      const box = plot.getBoundingClientRect();
      const at = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      const nearest = series.map((one) => one.at.reduce((a, b) =>
        Math.abs(placed(b[0]) - at) < Math.abs(placed(a[0]) - at) ? b : a));
      const first = nearest.reduce((a, b) => Math.abs(placed(b[0]) - at) < Math.abs(placed(a[0]) - at) ? b : a);
      const left = placed(first[0]);
      tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: first[1] }));
      const lines = series.map((one, i) => [one.name, nearest[i]]).filter((line) => line[1][0] === first[0]);
      for (const [name, point] of lines.slice(0, 9)) {
        const line = document.createElement("span");
        line.append(Object.assign(document.createElement("i"), { textContent: name }), point[2]);
        tip.append(line);
      }
      if (lines.length > 9) tip.append(`and ${lines.length - 9} more`);
      cursor.hidden = tip.hidden = false;
      cursor.style.left = `${100 * left}%`;
      const wide = tip.offsetWidth, here = left * box.width; // beside the line, and never beyond the drawing
      tip.style.left = `${Math.max(0, Math.min(box.width - wide, left < 0.5 ? here + 10 : here - 10 - wide))}px`;
    };
    plot.addEventListener("pointermove", show);
    plot.addEventListener("pointerdown", show);
    plot.addEventListener("pointerleave", () => { cursor.hidden = tip.hidden = true; });
  }

  // ------------------------------------------------------------------ attention maps
  const figure = $("#maps");
  const attention = async () => {
    const data = JSON.parse($("#attention-data").textContent);
    const packed = Uint8Array.from(atob($("#attention-maps").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const size = data.tokens, triangle = (size * (size + 1)) / 2;
    const layer = $("#layer"), head = $("#head"), readout = $(".readout"), strip = $(".strip");
    const panels = $$(".map").map((box) => ({ name: box.dataset.map, box, canvas: $("canvas", box) }));
    let row = null, cell = null, reading = "student";

    const weight = (name, query, key) => {
      const level = (bytes[row[name].at * triangle + (query * (query + 1)) / 2 + key] - 128) / 127;
      return Math.sign(level) * level * level;
    };
    const percent = (value) => `${(100 * value).toFixed(Math.abs(value) < 0.0995 ? 2 : 1)} %`;
    const seen = (text) => text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";
    const colour = (probe) => getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
    const colours = () => {
      const [surface, accent, deep, negative, soft, ink] = $$("#probes i").map(colour);
      return { surface, accent, deep, negative, soft, ink };
    };
    const mixed = (a, b, t) => a.map((v, i) => v + (b[i] - v) * t);

    const draw = (panel) => {
      const { name, box, canvas } = panel;
      const has = row[name] !== null;
      canvas.hidden = !has;
      canvas.style.display = has ? "" : "none";
      $(".empty", box).hidden = has;
      $(".entropy", box).textContent = has ? row[name].entropy.toFixed(2) : "-";
      $(".monotone", box).textContent = has ? row[name].monotonicity.toFixed(2) : "-";
      if (!has) return;
      const c = colours();
      const image = new ImageData(size, size);
      const start = row[name].at * triangle;
      for (let query = 0, at = start; query < size; query++) {
        for (let key = 0; key < size; key++) {
          const place = 4 * (query * size + key);
          let shade = c.surface;
          if (key <= query) {
            const level = (bytes[at++] - 128) / 127, strength = Math.abs(level) ** 0.8;
            const full = level < 0 ? c.negative : c.accent;
            shade = strength < 0.6 ? mixed(c.surface, full, strength / 0.6) : mixed(full, level < 0 ? c.ink : c.deep, (strength - 0.6) / 0.4);
          }
          image.data.set([...shade, 255], place);
        }
      }
      const small = new OffscreenCanvas(size, size);
      small.getContext("2d").putImageData(image, 0, 0);
      const side = Math.max(64, Math.round(canvas.clientWidth * Math.min(devicePixelRatio || 1, 3)));
      canvas.width = canvas.height = side;
      const paint = canvas.getContext("2d"), unit = side / size;
      paint.imageSmoothingEnabled = side < size;
      paint.drawImage(small, 0, 0, side, side);
      paint.strokeStyle = `rgb(${c.soft})`;
      paint.lineWidth = Math.max(1, side / 420);
      paint.globalAlpha = 0.55;
      paint.beginPath();
      paint.moveTo(0, 0);
      paint.lineTo(side, side);
      if (row.kind === "linear" && data.window > 0) {
        for (let block = 2; block * data.window < size; block++) {
          const left = (block - 1) * data.window * unit, top = block * data.window * unit;
          paint.moveTo(left - data.window * unit, top);
          paint.lineTo(left, top);
          paint.lineTo(left, Math.min(size, (block + 1) * data.window) * unit);
        }
      }
      paint.stroke();
      if (cell) {
        paint.fillStyle = paint.strokeStyle = `rgb(${c.ink})`;
        paint.globalAlpha = 0.13;
        paint.fillRect(0, cell[0] * unit, (cell[0] + 1) * unit, unit);
        paint.fillRect(cell[1] * unit, cell[1] * unit, unit, (cell[0] - cell[1] + 1) * unit);
        paint.globalAlpha = 0.95;
        paint.lineWidth = Math.max(1.2, side / 300);
        const half = Math.max(unit, side / 60) / 2;
        paint.strokeRect((cell[1] + 0.5) * unit - half, (cell[0] + 0.5) * unit - half, 2 * half, 2 * half);
      }
      canvas.setAttribute("aria-label",
        `${$("h3", box).textContent}, layer ${row.layer}, head ${row.head}: entropy ${row[name].entropy.toFixed(2)} nats, monotonicity ${row[name].monotonicity.toFixed(2)}`);
    };

    const words = data.texts.map((text, i) => {
      const span = document.createElement("span");
      span.textContent = text.replace(/\n/g, "\u21b5\n") || "\u2205";
      span.addEventListener("click", () => point(i, strongest(i)));
      strip.append(span);
      return span;
    });
    const strongest = (query) => {
      const name = row[reading] ? reading : "teacher";
      let best = 0;
      for (let key = 1; key <= query; key++) if (weight(name, query, key) > weight(name, query, best)) best = key;
      return best;
    };
    const tint = () => {
      const name = row[reading] ? reading : "teacher";
      const [red, green, blue] = colours()[("accent")];
      words.forEach((span, key) => {
        const within = cell && key <= cell[0];
        const value = within ? Math.sqrt(Math.abs(weight(name, cell[0], key))) : 0;
        span.style.backgroundColor = value > 0.03 ? `rgba(${red},${green},${blue},${Math.min(0.85, value).toFixed(3)})` : "";
        if (cell && key === cell[0]) strip.scrollTop = span.offsetTop - strip.offsetTop - strip.clientHeight / 2;
        span.className = !cell ? "" : key > cell[0] ? "later" : key === cell[0] ? "here" : "";
      });
    };
    const bold = (text) => Object.assign(document.createElement("b"), { textContent: text });
    const tell = () => {
      if (!cell) return;
      const [query, key] = cell;
      const parts = panels.filter((panel) => row[panel.name]).map((panel) =>
        `${$("h3", panel.box).textContent.toLowerCase()} ${percent(weight(panel.name, query, key))}`);
      readout.replaceChildren("Token ", bold(`${query} \u201c${seen(data.texts[query])}\u201d`), " reads ",
        bold(`${key} \u201c${seen(data.texts[key])}\u201d`), `: ${parts.join(", ")}. Below, what it reads in the ${reading === "linear" ? "linear branch" : reading}.`);
    };
    const point = (query, key) => {
      cell = [Math.min(size - 1, Math.max(0, query)), 0];
      cell[1] = Math.min(cell[0], Math.max(0, key));
      tell();
      tint();
      panels.forEach(draw);
    };
    const choose = () => {
      row = data.rows.find((one) => one.layer === Number(layer.value) && one.head === Number(head.value));
      panels.forEach(draw);
      for (const dot of $$(".scatter .dot")) {
        const on = data.rows[dot.dataset.row] === row;
        dot.classList.toggle("on", on);
        if (on) dot.parentNode.append(dot); // what is drawn last lies on top
      }
      tell();
      tint();
    };
    for (const panel of panels) {
      const under = (event) => {
        const box = panel.canvas.getBoundingClientRect();
        reading = panel.name;
        point(Math.floor(((event.clientY - box.top) / box.height) * size), Math.floor(((event.clientX - box.left) / box.width) * size));
      };
      panel.canvas.addEventListener("pointermove", under);
      panel.canvas.addEventListener("pointerdown", under);
      panel.canvas.addEventListener("keydown", (event) => {
        const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
        if (!move) return;
        event.preventDefault();
        reading = panel.name;
        const [query, key] = cell || [size - 1, 0];
        point(query + move[0], key + move[1]);
      });
    }
    layer.addEventListener("change", choose);
    head.addEventListener("change", choose);
    for (const button of $$("[data-move]")) {
      button.addEventListener("click", () => {
        const select = button.dataset.move === "layer" ? layer : head;
        const count = select.options.length;
        select.selectedIndex = (select.selectedIndex + Number(button.dataset.by) + count) % count;
        choose();
      });
    }
    const scatter = $(".scatter .plot");
    scatter?.addEventListener("click", (event) => {
      const away = (dot) => { // a dot is smaller than a finger: the nearest one is meant
        const box = dot.getBoundingClientRect();
        return Math.hypot((box.left + box.right) / 2 - event.clientX, (box.top + box.bottom) / 2 - event.clientY);
      };
      const near = $$(".dot", scatter).reduce((a, b) => (away(b) < away(a) ? b : a));
      const dot = event.target.closest(".dot") || (away(near) < 24 ? near : null);
      if (!dot) return;
      const chosen = data.rows[dot.dataset.row];
      layer.value = String(chosen.layer);
      head.value = String(chosen.head);
      choose();
    });
    new ResizeObserver(() => panels.forEach(draw)).observe($(".maps"));
    redraws.push(() => { panels.forEach(draw); tint(); });
    choose();
    point(size - 1, strongest(size - 1));
    readout.append(" Point at a map, or focus one and use the arrow keys.");
    root.dataset.maps = "ready";
  };
  themed();
  if (figure) {
    attention().catch(() => { $(".readout").textContent = "This browser is too old to unpack the attention maps."; });
  }
})();
