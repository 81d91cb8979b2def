"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const draw = (name, attributes = {}) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };

  // --- the table of all cells ---

  const table = find("cells");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const mark = () => {
    let before = null;
    for (const row of body.rows) {
      row.classList.toggle("first", before !== null && before.dataset.model !== row.dataset.model);
      if (!row.hidden) before = row;
    }
  };
  for (const button of table.tHead.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const column = Number(button.dataset.column);
      const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : button.dataset.first === "down";
      for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const number = (text) => (text === "" ? NaN : Number(text));
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)], [m, n] = [number(x), number(y)];
        if (!Number.isNaN(m) && !Number.isNaN(n)) return down ? n - m : m - n;
        if (x === "" || y === "") return (x === "") - (y === ""); // what was not measured comes last
        return down ? y.localeCompare(x) : x.localeCompare(y);
      };
      body.append(...rows.sort(compare));
      mark();
    });
  }
  find("filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.dataset.words.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    mark();
  });

  // one group of columns at a time, from the start where not all of them have room
  const group = find("group");
  if (group) {
    const spans = [...table.tHead.rows[1].cells].map((cell) => cell.dataset.group);
    const pick = () => {
      for (const cell of table.tHead.rows[0].cells) cell.hidden = Boolean(group.value && cell.dataset.group && cell.dataset.group !== group.value);
      for (const row of [table.tHead.rows[1], ...rows]) {
        [...row.cells].forEach((cell, i) => { cell.hidden = Boolean(group.value && spans[i] && spans[i] !== group.value); });
      }
    };
    const box = table.parentElement;
    if (box.scrollWidth > box.clientWidth + 1) group.selectedIndex = 1;
    group.addEventListener("change", pick);
    pick();
  }

  // --- the policies in the figures ---

  for (const button of document.querySelectorAll(".chips button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", on);
      for (const element of document.querySelectorAll(`.chart .s${button.dataset.series}`)) element.classList.toggle("lit", on);
      const some = document.querySelector('.chips [aria-pressed="true"]') !== null;
      for (const panels of document.querySelectorAll(".panels")) panels.classList.toggle("picked", some);
    });
  }

  // --- samples ---

  if (!data.tasks.length) return;
  const view = { model: find("model"), task: find("task"), entry: find("entry"), changed: find("changed"), place: 0 };

  const bits = (text) => [...text].flatMap((digit) => [8, 4, 2, 1].map((bit) => Boolean(parseInt(digit, 16) & bit)));
  const veil = (tile, kept) => {
    const [rowCount, columnCount] = tile.grid, [left, top, right, bottom] = tile.box;
    const width = (right - left) / columnCount, height = (bottom - top) / rowCount;
    let path = "";
    for (let row = 0; row < rowCount; row++) {
      let start = null;
      for (let column = 0; column <= columnCount; column++) {
        const dropped = column < columnCount && !kept[row * columnCount + column];
        if (dropped && start === null) start = column;
        else if (!dropped && start !== null) {
          const x = left + start * width, y = top + row * height;
          path += `M${x} ${y}h${(column - start) * width}v${height}H${x}z`;
          start = null;
        }
      }
    }
    return path;
  };
  const outline = ([left, top, right, bottom]) => `M${left} ${top}H${right}V${bottom}H${left}z`;

  const plate = (picture, image, answer) => {
    const [left, top, right, bottom] = picture.view;
    const svg = draw("svg", { class: "plate", viewBox: `${left} ${top} ${right - left} ${bottom - top}`, role: "img" });
    if (image.source) svg.append(draw("image", { href: image.source, width: image.width, height: image.height, preserveAspectRatio: "none" }));
    const boxes = picture.tiles.map((tile) => tile.box);
    const seen = [0, 1, 2, 3].map((i) => Math[i < 2 ? "min" : "max"](...boxes.map((box) => box[i])));
    if (seen.some((value, i) => value !== picture.view[i])) {
      svg.append(draw("path", { class: "unseen", "fill-rule": "evenodd", d: outline(picture.view) + outline(seen) }));
    }
    let kept = 0, all = 0, path = "", later = "";
    for (const tile of picture.tiles) {
      const count = tile.grid[0] * tile.grid[1];
      const set = answer.kept[tile.number] < 0 ? Array(count).fill(true) : bits(data.kept[answer.kept[tile.number]]);
      path += veil(tile, set);
      kept += set.filter(Boolean).length;
      if (answer.last[tile.number] >= 0) {
        const last = bits(data.kept[answer.last[tile.number]]);
        later += veil(tile, set.map((there, i) => last[i] || !there));
      }
      all += count;
    }
    svg.append(draw("path", { class: "veil", d: path }));
    if (later) svg.append(draw("path", { class: "veil later", d: later }));
    if (boxes.length > 1) svg.append(draw("path", { class: "seams", d: boxes.map(outline).join("") }));
    svg.append(draw("path", { class: "edge", d: outline(picture.view) }));
    const name = picture.thumbnail ? "Thumbnail" : "Image";
    svg.setAttribute("aria-label", `${name}: ${kept} of ${all} patches kept, the others faded`);
    return svg;
  };

  const sign = (policy) => {
    const svg = draw("svg", { class: "mark", viewBox: "-1.25 -1.25 2.5 2.5", "aria-hidden": "true" });
    svg.append(draw("path", { d: data.looks[policy].path, style: `fill:${data.looks[policy].colour}` }));
    return svg;
  };

  // an answer's text, what is hallucinated in it marked
  const prose = (answer) => {
    const parts = [];
    let end = 0;
    for (const [from, to, object] of answer.marks) {
      parts.push(answer.text.slice(end, from));
      const hint = make("span", { class: "hidden" }, " (not in the image)");
      parts.push(make("mark", { title: `${object}: not in the image` }, answer.text.slice(from, to), hint));
      end = to;
    }
    parts.push(answer.text.slice(end));
    if (!answer.text) parts.push(make("i", { class: "same" }, "(empty)"));
    return parts;
  };
  const verdict = (answer) => (answer.verdict ? [make("span", { class: `tag ${answer.verdict}` }, answer.verdict)] : []);
  const name = (entry) => (entry.budget === "\u2013" ? entry.policy : `${entry.policy}, ${entry.budget}`);
  const fill = (select, options) => {
    const before = select.value;
    select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
    if (options.some(([value]) => String(value) === before)) select.value = before;
  };

  const task = () => data.tasks[Number(view.task.value)];
  const given = () => task().answers.filter((one) => data.entries[one.entry].model === view.model.value);
  const stock = () => given().find((one) => data.entries[one.entry].unpruned);
  const current = () => given().find((one) => String(one.entry) === view.entry.value) ?? given()[0];
  const places = () => {
    const all = task().samples.map((_, i) => i), [before, after] = [stock(), current()];
    if (!view.changed.checked || !before) return all;
    return all.filter((i) => before.given[i]?.text !== after.given[i]?.text);
  };

  const show = () => {
    const shown = places(), before = stock(), after = current();
    view.place = Math.min(Math.max(view.place, 0), Math.max(shown.length - 1, 0));
    find("count").textContent = shown.length ? `${view.place + 1} of ${shown.length}` : "none";
    find("back").disabled = view.place === 0;
    find("next").disabled = view.place >= shown.length - 1;
    const sample = find("sample");
    sample.hidden = !shown.length || !after.given[shown[view.place]];
    find("nothing").hidden = !sample.hidden;
    if (sample.hidden) return;
    const number = shown[view.place], asked = task().samples[number], answer = after.given[number];
    const image = data.images[answer.image], layout = data.layouts[answer.layout];

    const main = layout.filter((one) => !one.thumbnail), small = layout.filter((one) => one.thumbnail);
    find("pictures").replaceChildren(
      ...main.map((one) => plate(one, image, answer)),
      ...(small.length ? [make("div", { class: "thumbnails" }, ...small.map((one) => plate(one, image, answer)))] : []),
    );
    const entry = data.entries[after.entry];
    const inside = answer.last.some((one) => one >= 0) ? " Half faded: those that it drops before its last layer." : "";
    find("kept").textContent = `${name(entry)}: ${answer.tokens[0]} of ${answer.tokens[1]} visual tokens enter the language model.${inside}`;

    const items = [["Question", [asked.question]]];
    if (asked.label) items.push([task().kind === "chair" ? "In the image" : "Truth", [asked.label]]);
    if (before) items.push(["Answer of the unpruned model", [...prose(before.given[number]), ...verdict(before.given[number])]]);
    items.push([`Answer with ${name(entry)}`, [...prose(answer), ...verdict(answer)]]);
    find("words").replaceChildren(...items.map(([title, parts]) => make("div", {}, make("dt", {}, title), make("dd", {}, ...parts))));
    find("which").textContent = `sample ${asked.id}` + (asked.split ? `, ${asked.split}` : "");

    find("answers").replaceChildren(...given().filter((one) => one.given[number]).map((one) => {
      const other = data.entries[one.entry], said = one.given[number];
      const button = make("button", { type: "button" }, sign(other.policy), ` ${other.policy}`);
      const same = before && one !== before && said.text === before.given[number].text;
      const row = make("tr", one === after ? { "aria-current": "true" } : {},
        make("th", { scope: "row", class: "name" }, button), make("td", {}, other.budget), make("td", { class: "figure" }, String(said.tokens[0])),
        make("td", { class: "answer" }, ...(same ? [make("span", { class: "same" }, "as unpruned")] : prose(said)), ...verdict(said)));
      row.addEventListener("click", () => { view.entry.value = String(one.entry); show(); });
      return row;
    }));
  };

  const choose = () => {
    const own = data.tasks.map((one, i) => [i, one.name]);
    fill(view.task, own.filter(([i]) => data.tasks[i].answers.some((one) => data.entries[one.entry].model === view.model.value)));
    fill(view.entry, given().map((one) => [one.entry, name(data.entries[one.entry])]));
    show();
  };
  const models = [...new Set(data.entries.map((entry) => entry.model))];
  fill(view.model, models.map((model) => [model, model]));
  choose();
  const middle = given().filter((one) => !data.entries[one.entry].unpruned);
  if (middle.length) view.entry.value = String(middle[Math.min(1, middle.length - 1)].entry);
  view.changed.disabled = !stock();
  show();

  view.model.addEventListener("change", choose);
  view.task.addEventListener("change", () => { view.place = 0; choose(); });
  view.entry.addEventListener("change", show);
  view.changed.addEventListener("change", () => { view.place = 0; show(); });
  find("plain").addEventListener("change", (event) => find("pictures").classList.toggle("plain", !event.target.checked));
  const turn = (by) => { view.place += by; show(); };
  find("back").addEventListener("click", () => turn(-1));
  find("next").addEventListener("click", () => turn(1));
  find("sample").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") { turn(event.key === "ArrowLeft" ? -1 : 1); event.preventDefault(); }
  });
})();
