"use strict";
// The explorer of a report: passes on the left, the chosen pass's diff and one place's story and surroundings on the
// right. All text comes from the page's own data and is set as text, never as markup; nothing is loaded.
(() => {
  const data = JSON.parse(document.getElementById("run-data").textContent);
  const byId = (id) => document.getElementById(id);
  const [list, table, place, field, results, told] =
    ["pass-list", "pass-diff", "place", "search", "search-results", "pass-told"].map(byId);
  const ROWS = 600, AROUND = 3, RESULTS = 50, MOST_BOXES = 60;
  const passes = data.passes, lines = data.lines;
  const state = { pass: 0, node: "", rows: ROWS, open: new Set() };

  const make = (tag, text = "", attributes = {}) => {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };

  // Programs -------------------------------------------------------------------------------------------------------

  // The program after a pass, as numbers of lines; null where it was too large to be kept here.
  const programOf = (at) => {
    while (at > 0 && !passes[at].changed) at -= 1;
    return passes[at] ? passes[at].text : null;
  };
  const nameOf = (line) => {
    const found = /^ {2}(.+?): /.exec(lines[line]);
    return found ? found[1] : "";
  };
  const names = lines.map((_, at) => nameOf(at));

  // A program as a graph: name -> {line, operator, inputs}.
  const graphs = new Map();
  const graphOf = (at) => {
    while (at > 0 && !passes[at].changed) at -= 1;
    if (!graphs.has(at)) {
      const graph = new Map();
      const program = programOf(at) || [];
      for (const line of program) if (names[line]) graph.set(names[line], { line, operator: "", inputs: [], readers: [] });
      const head = program.length ? /^program\((.*)\)$/.exec(lines[program[0]]) : null;
      for (const found of head ? head[1].matchAll(/(\w+): /g) : [])
        graph.set(found[1], { line: program[0], operator: "input", inputs: [], readers: [] });
      for (const [name, each] of graph) {
        const call = / = ([\w.]+)\((.*)\)(?: {2,}# .*)?$/.exec(lines[each.line]);
        if (!call) continue;
        each.operator = call[1];
        for (const [, word] of call[2].matchAll(/@?([^\s,()[\]=]+)/g)) {
          const source = graph.get(word);
          if (source && !each.inputs.includes(word)) {
            each.inputs.push(word);
            source.readers.push(name);
          }
        }
      }
      graphs.set(at, graph);
    }
    return graphs.get(at);
  };

  // Diff -----------------------------------------------------------------------------------------------------------

  // Lines that stand once on both sides, in an order that both share, part the texts; between them the longest common
  // subsequence is exact where that is small. ("Patience diff".)
  const matches = (a, b) => {
    const found = [];
    const between = (fromA, toA, fromB, toB) => {
      while (fromA < toA && fromB < toB && a[fromA] === b[fromB]) found.push([fromA++, fromB++]);
      const tail = [];
      while (fromA < toA && fromB < toB && a[toA - 1] === b[toB - 1]) tail.push([--toA, --toB]);
      if (fromA < toA && fromB < toB) {
        const anchors = unique(a, b, fromA, toA, fromB, toB);
        if (anchors.length) {
          for (const [x, y] of anchors) {
            between(fromA, x, fromB, y);
            found.push([x, y]);
            [fromA, fromB] = [x + 1, y + 1];
          }
          between(fromA, toA, fromB, toB);
        } else if ((toA - fromA) * (toB - fromB) <= 4e6) {
          found.push(...common(a, b, fromA, toA, fromB, toB));
        }
      }
      found.push(...tail.reverse());
    };
    between(0, a.length, 0, b.length);
    return found;
  };
  const unique = (a, b, fromA, toA, fromB, toB) => {
    const places = new Map();
    for (let i = fromA; i < toA; i++) places.set(a[i], places.has(a[i]) ? null : [i, -1]);
    for (let j = fromB; j < toB; j++) {
      const each = places.get(b[j]);
      if (each) each[1] = each[1] < 0 ? j : Infinity;
    }
    const pairs = [...places.values()].filter((each) => each && each[1] >= 0 && each[1] < Infinity);
    const tops = [], before = new Map();
    for (const pair of pairs) { // the longest run that rises on the other side, too
      let low = 0, high = tops.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (tops[middle][1] < pair[1]) low = middle + 1; else high = middle;
      }
      before.set(pair, low ? tops[low - 1] : null);
      tops[low] = pair;
    }
    const run = [];
    for (let each = tops[tops.length - 1]; each; each = before.get(each)) run.push(each);
    return run.reverse();
  };
  const common = (a, b, fromA, toA, fromB, toB) => {
    const width = toB - fromB + 1, length = new Uint32Array((toA - fromA + 1) * width);
    for (let i = toA - fromA - 1; i >= 0; i--)
      for (let j = width - 2; j >= 0; j--)
        length[i * width + j] = a[fromA + i] === b[fromB + j] ? length[(i + 1) * width + j + 1] + 1
          : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
    const found = [];
    for (let i = 0, j = 0; i < toA - fromA && j < width - 1;) {
      if (a[fromA + i] === b[fromB + j]) found.push([fromA + i++, fromB + j++]);
      else if (length[(i + 1) * width + j] >= length[i * width + j + 1]) i++; else j++;
    }
    return found;
  };

  // Rows of two columns: [line before or -1, line after or -1]; what changed stands beside what it became.
  const known = new Map();
  const rowsOf = (at) => {
    if (known.has(at)) return known.get(at);
    const before = at ? programOf(at - 1) : [], after = programOf(at);
    let rows = null;
    if (before && after) {
      rows = [];
      let i = 0, j = 0;
      const gap = (toA, toB) => {
        const left = before.slice(i, toA), right = after.slice(j, toB);
        const becomes = new Map(right.map((line, k) => [names[line], k]).filter(([name]) => name));
        let k = 0;
        for (const line of left) {
          const there = names[line] ? becomes.get(names[line]) : undefined;
          if (there !== undefined && there >= k) {
            while (k < there) rows.push([-1, right[k++]]);
            rows.push([line, right[k++]]);
          } else rows.push([line, -1]);
        }
        while (k < right.length) rows.push([-1, right[k++]]);
      };
      for (const [x, y] of [...(at ? matches(before, after) : after.map((_, k) => [k, k])), [before.length, after.length]]) {
        if (at) gap(x, y);
        if (y < after.length) rows.push([after[y], after[y]]);
        [i, j] = [x + 1, y + 1];
      }
    }
    known.set(at, rows);
    return rows;
  };

  const cell = (line, kind, at) => {
    const made = make("td", "", { class: kind });
    if (line < 0) return made;
    const name = names[line], text = lines[line].replace(/ {3,}# /, "  # ");
    if (name) {
      const link = make("a", name, { href: link_to(at, name) });
      made.append("  ", link, text.slice(2 + name.length));
    } else made.textContent = text;
    return made;
  };

  const showDiff = () => {
    const at = state.pass, pass = passes[at], rows = rowsOf(at);
    byId("pass-title").textContent = `${String(at).padStart(3, "0")} ${pass.key}`;
    told.replaceChildren(...pass.about.map((each) => make("li", each)));
    table.replaceChildren(make("caption", at ? `The program before and after ${pass.key}.` : "The program as it was captured."));
    const more = byId("more");
    more.hidden = true;
    if (!rows) {
      const row = make("tr");
      row.append(make("td", `It is too large to be kept here; it stands in trace/${pass.stem}.txt.`));
      table.append(row);
      return;
    }
    if (at && !pass.changed) {
      const row = make("tr");
      row.append(make("td", pass.rejected ? `Its changes were rejected: ${pass.rejected}` : "The program is the same before and after."));
      table.append(row);
      return;
    }
    const body = make("tbody");
    const same = rows.map(([left, right]) => at > 0 && left === right);
    const wanted = rows.findIndex(([left, right]) => [left, right].some((each) => each >= 0 && names[each] === state.node));
    let k = 0;
    const draw_to = (end) => {
      for (; k < end; k++) body.append(rowOf(rows[k], at, same[k]));
    };
    while (k < rows.length && (body.children.length < state.rows || k <= wanted)) {
      const start = k;
      let end = k;
      while (same[end]) end++;
      const from = start + (start ? AROUND : 0), to = end - (end < rows.length ? AROUND : 0);
      if (to - from > 2 && !state.open.has(start) && !(from <= wanted && wanted < to)) {
        draw_to(from);
        body.append(fold(to - from, start));
        k = to;
      }
      draw_to(Math.max(end, start + 1));
    }
    table.append(body);
    if (k < rows.length) {
      more.hidden = false;
      more.textContent = `Show ${Math.min(ROWS, rows.length - k)} more of ${rows.length - k} lines`;
    }
    const target = table.querySelector("[aria-current]");
    if (target) target.scrollIntoView({ block: "center" });
  };

  const rowOf = ([left, right], at, same) => {
    const row = make("tr");
    if (state.node && [left, right].some((each) => each >= 0 && names[each] === state.node)) row.setAttribute("aria-current", "location");
    if (at) row.append(cell(left, left < 0 ? "empty" : same ? "" : "remove", at));
    row.append(cell(right, right < 0 ? "empty" : same ? "" : at ? "add" : "", at));
    return row;
  };

  const fold = (count, key) => {
    const row = make("tr", "", { class: "fold" }), there = make("td", "", { colspan: "2" });
    const button = make("button", `${count} unchanged lines`, { type: "button" });
    button.addEventListener("click", () => {
      state.open.add(key);
      showDiff();
    });
    there.append(button);
    row.append(there);
    return row;
  };

  // Passes ---------------------------------------------------------------------------------------------------------

  const shown = () => passes.map((_, at) => at).filter((at) => byId("unchanged").checked || at === 0 || passes[at].changed || passes[at].rejected || at === state.pass);
  const showPasses = () => {
    list.replaceChildren(...shown().map((at) => {
      const pass = passes[at], item = make("li");
      const mark = pass.rejected ? "rejected" : pass.changed && at ? "changed" : "";
      const button = make("button", "", { type: "button", "data-pass": at, tabindex: at === state.pass ? "0" : "-1", class: mark });
      if (at === state.pass) button.setAttribute("aria-current", "true");
      button.append(make("span", `${String(at).padStart(3, "0")} ${pass.key}`), make("span", pass.error, { class: "muted" }));
      if (mark) button.append(make("span", `, ${mark}`, { class: "hidden" }));
      item.append(button);
      return item;
    }));
  };
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) go(Number(button.dataset.pass), state.node);
  });
  list.addEventListener("keydown", (event) => {
    const all = shown(), here = all.indexOf(state.pass);
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || !(to in all)) return;
    event.preventDefault();
    go(all[to], state.node);
    list.querySelector("[aria-current]").focus();
  });

  // Search ---------------------------------------------------------------------------------------------------------

  // Every name of the run with the first and the last pass that changed what it is.
  const index = (() => {
    const found = new Map();
    let before = new Set();
    passes.forEach((pass, at) => {
      const program = at === 0 || pass.changed ? pass.text : null;
      if (!program) return;
      const now = new Set(program);
      for (const line of program) if (names[line] && !before.has(line)) {
        if (found.has(names[line])) found.get(names[line])[1] = at; else found.set(names[line], [at, at]);
      }
      before = now;
    });
    return [...found].map(([name, [first, last]]) => ({ name, low: name.toLowerCase(), first, last }));
  })();
  const search = () => {
    const wanted = field.value.trim().toLowerCase(), found = [];
    if (wanted) for (const each of index) {
      if (each.low.includes(wanted)) found.push(each);
      if (found.length > 5000) break;
    }
    found.sort((x, y) => (y.low.startsWith(wanted) - x.low.startsWith(wanted)) || x.name.length - y.name.length);
    results.replaceChildren(...found.slice(0, RESULTS).map((each) => {
      const item = make("li");
      item.append(make("a", each.name, { href: link_to(each.last, each.name) }), make("span", ` ${passes[each.last].key}`, { class: "muted" }));
      return item;
    }));
    const more = found.length > RESULTS ? `, the first ${RESULTS} are shown` : "";
    byId("search-count").textContent = wanted ? `${found.length > 5000 ? "more than 5000" : found.length} places${more}` : "";
  };
  field.addEventListener("input", search);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { field.value = ""; search(); }
    const first = results.querySelector("a");
    if (first && event.key === "Enter") { event.preventDefault(); location.hash = first.getAttribute("href").slice(1); }
    if (first && event.key === "ArrowDown") { event.preventDefault(); first.focus(); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(input|textarea|select)$/i.test(event.target.tagName)) { event.preventDefault(); field.focus(); }
  });

  // One place ------------------------------------------------------------------------------------------------------

  const showPlace = () => {
    place.hidden = !state.node;
    if (!state.node) return;
    byId("place-title").textContent = state.node;
    const story = byId("story");
    story.replaceChildren();
    let before = "";
    passes.forEach((pass, at) => {
      const program = programOf(at), there = program ? program.find((line) => names[line] === state.node) : undefined;
      const after = there === undefined ? "" : lines[there].trim();
      const events = [];
      if (before !== after && (at === 0 || pass.changed)) events.push([before && after ? "changed" : after ? "made" : "gone", after || before]);
      for (const kind of ["touched", "skipped"])
        for (const [reason, nodes] of pass[kind]) if (nodes.includes(state.node)) events.push([kind, reason]);
      for (const [title, table] of Object.entries(pass.figures))
        if (Object.hasOwn(table, state.node)) events.push([title, table[state.node]]);
      before = after;
      if (!events.length) return;
      const item = make("li"), inner = make("ul");
      item.append(make("a", `${String(at).padStart(3, "0")} ${pass.key}`, { href: link_to(at, state.node) }), inner);
      for (const [kind, text] of events) {
        const each = make("li");
        each.append(make("b", `${kind} `), make("code", text));
        inner.append(each);
      }
      story.append(item);
    });
    const site = Object.hasOwn(data.sites, state.node) ? data.sites[state.node] : null;
    if (site) story.append(make("li", site.told));
    byId("spreads").replaceChildren(...(site ? Object.entries(site.spreads).map(spreadOf) : []));
    if (!story.children.length) story.append(make("li", "No program that is kept here has it."));
    showGraphs();
  };

  // Scales and zero points stand beside every quantize; they are left out unless they are asked for.
  const beside = (graph, name) => /_(scale|zero_point)(_\d+)?$/.test(name) && !graph.get(name).operator;
  // The surroundings of a node in a program: nodes within some steps, in layers from inputs to outputs.
  const around = (graph, name, steps) => {
    const chosen = new Set(graph.has(name) ? [name] : []);
    let edge = [...chosen];
    for (let k = 0; k < steps; k++) {
      const next = [];
      for (const each of edge) for (const other of [...graph.get(each).inputs, ...graph.get(each).readers])
        if (!chosen.has(other) && !beside(graph, other) && chosen.size < MOST_BOXES) { chosen.add(other); next.push(other); }
      edge = next;
    }
    return chosen;
  };
  const layers = (graph, chosen) => {
    const depth = new Map();
    const deep = (name, seen) => {
      if (depth.has(name)) return depth.get(name);
      if (seen.has(name)) return 0;
      seen.add(name);
      const above = graph.get(name).inputs.filter((each) => chosen.has(each));
      depth.set(name, above.length ? 1 + Math.max(...above.map((each) => deep(each, seen))) : 0);
      return depth.get(name);
    };
    for (const name of chosen) deep(name, new Set());
    // An input stands right above the first that reads it.
    for (const name of chosen) {
      const readers = graph.get(name).readers.filter((each) => chosen.has(each));
      if (!graph.get(name).inputs.some((each) => chosen.has(each)) && readers.length)
        depth.set(name, Math.min(...readers.map((each) => depth.get(each))) - 1);
    }
    const rows = [], least = Math.min(...depth.values());
    for (const [name, at] of depth) (rows[at - least] ||= []).push(name);
    const found = rows.filter(Boolean), at = new Map();
    const number = () => found.forEach((row) => row.forEach((name, k) => at.set(name, k - (row.length - 1) / 2)));
    number();
    for (let sweep = 0; sweep < 6; sweep++) {
      const side = sweep % 2 ? "readers" : "inputs";
      for (const row of sweep % 2 ? [...found].reverse() : found) {
        const middle = (name) => {
          const others = graph.get(name)[side].filter((each) => chosen.has(each)).map((each) => at.get(each));
          return others.length ? others.reduce((x, y) => x + y, 0) / others.length : at.get(name);
        };
        const keyed = row.map((name) => [middle(name), name]).sort((x, y) => x[0] - y[0]);
        row.splice(0, row.length, ...keyed.map((each) => each[1]));
        number();
      }
    }
    return [found, at];
  };
  const svg = (tag, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    return made;
  };
  const draw = (at, title) => {
    const graph = graphOf(at), chosen = around(graph, state.node, Number(byId("steps").value));
    const figure = make("figure");
    figure.append(make("figcaption", chosen.size ? title : `${title}: it is not there`));
    if (!chosen.size) return figure;
    const [rows, place_of] = layers(graph, chosen);
    const wide = 150, high = 34, across = wide + 16, down = 62;
    const widest = Math.max(...rows.map((row) => row.length));
    const size = [widest * across + 16, rows.length * down + 8];
    const picture = svg("svg", { viewBox: `0 0 ${size[0]} ${size[1]}`, width: size[0], height: size[1], role: "group", "aria-label": title });
    const corner = new Map();
    rows.forEach((row, k) => row.forEach((name) => corner.set(name, [size[0] / 2 + place_of.get(name) * across - wide / 2, 8 + k * down])));
    for (const name of chosen) for (const source of graph.get(name).inputs) if (chosen.has(source)) {
      const [x, y] = corner.get(source), [u, v] = corner.get(name);
      const [a, b, c, d] = [x + wide / 2, y + high, u + wide / 2, v];
      picture.append(svg("path", { d: `M${a} ${b}C${a} ${b + 18} ${c} ${d - 18} ${c} ${d}`, class: "edge" }));
    }
    const short = (text) => (text.length > 21 ? `…${text.slice(-20)}` : text);
    for (const [name, [x, y]] of corner) {
      const each = graph.get(name), link = svg("a", { href: link_to(state.pass, name), class: name === state.node ? "box chosen" : "box" });
      link.append(svg("title", {}, lines[each.line].trim()), svg("rect", { x, y, width: wide, height: high, rx: 5 }),
        svg("text", { x: x + wide / 2, y: y + 14, "text-anchor": "middle" }, short(name)),
        svg("text", { x: x + wide / 2, y: y + 28, "text-anchor": "middle", class: "kind" }, short(each.operator || "weight")));
      picture.append(link);
    }
    const scroll = make("div", "", { class: "scroll" });
    scroll.append(picture);
    figure.append(scroll);
    return figure;
  };
  const showGraphs = () => {
    const at = state.pass, key = passes[at].key;
    byId("graphs").replaceChildren(...(at ? [draw(at - 1, `Before ${key}`)] : []), draw(at, at ? `After ${key}` : "As captured"));
  };
  byId("steps").addEventListener("change", showGraphs);

  // How many values lie where, before (outlined) and after (filled), on a logarithmic axis.
  const spreadOf = ([what, [low, high, before, after]]) => {
    const wide = 320, tall = 96, floor = tall - 20, each = wide / before.length, title = `${what} of ${state.node}`;
    const most = Math.log1p(Math.max(1, ...before, ...after));
    const picture = svg("svg", { viewBox: `0 0 ${wide} ${tall}`, width: wide, height: tall, role: "img", "aria-label": title });
    for (const [counts, part, kind] of [[after, 0.5, "mark"], [before, 1, "outline"]]) counts.forEach((count, k) => {
      const height = (Math.log1p(count) / most) * floor;
      if (count > 0) picture.append(svg("rect", { x: each * (k + (1 - part) / 2), y: floor - height, width: each * part, height, class: kind }));
    });
    picture.append(svg("text", { x: 0, y: tall - 4 }, low.toPrecision(3)), svg("text", { x: wide, y: tall - 4, "text-anchor": "end" }, high.toPrecision(3)));
    const figure = make("figure");
    figure.append(make("figcaption", `${what}, before (outlined) and after (filled)`), picture);
    return figure;
  };

  // Links ----------------------------------------------------------------------------------------------------------

  function link_to(at, node) {
    return `#pass=${encodeURIComponent(passes[at].key)}${node ? `&node=${encodeURIComponent(node)}` : ""}`;
  }
  const go = (at, node) => {
    const hash = link_to(at, node);
    if (location.hash !== hash) history.pushState(null, "", hash);
    show();
  };
  const show = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    const at = passes.findIndex((pass) => pass.key === asked.get("pass"));
    const first = passes.findIndex((pass, k) => k && pass.changed);
    state.pass = at >= 0 ? at : Math.max(first, 0);
    state.node = asked.get("node") || "";
    [state.rows, state.open] = [ROWS, new Set()];
    showPasses();
    showDiff();
    showPlace();
  };
  byId("more").addEventListener("click", () => { state.rows += ROWS; showDiff(); });
  byId("unchanged").addEventListener("change", showPasses);
  // On paper nothing can be opened.
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
  window.addEventListener("hashchange", show);
  window.addEventListener("popstate", show);
  byId("explorer").hidden = false;
  show();
  if (location.hash) byId("explorer").scrollIntoView();
})();
