"""The script of the timeline page: a constant, into which nothing of a timeline is ever put.

It reads one JSON block, draws on canvases (only those in view, only spans in view, spans narrower than a pixel merged),
and writes names as text, never as markup.
"""

from __future__ import annotations

SCRIPT = r"""
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const dark = matchMedia('(prefers-color-scheme: dark)');
const make = (tag, parent, text) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
};
const ROW = 20, MEMORY = 34;
const full = Math.max(1, ...data.timelines.map(t => t.length));
const view = {from: 0, to: full};
let hot = null, theme = {};

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ['page', 'ink', 'soft', 'line', 'row']) theme[name] = style.getPropertyValue('--' + name).trim();
  theme.fill = data.ops.map(op => op.colour[dark.matches ? 1 : 0]);
  theme.text = data.ops.map(op => op.ink[dark.matches ? 1 : 0]);
  document.querySelectorAll('#legend i').forEach((dot, k) => { dot.style.background = theme.fill[k]; });
}

const three = x => Math.abs(x) < 9.995 ? x.toFixed(2) : Math.abs(x) < 99.95 ? x.toFixed(1) : x.toFixed(0);
function time(ns) {
  for (const [scale, unit] of [[1e9, 's'], [1e6, 'ms'], [1e3, 'µs']]) {
    if (Math.abs(ns) >= scale * 0.9995) return three(ns / scale) + ' ' + unit;
  }
  return ns + ' ns';
}
function bytes(n) {
  for (const [power, unit] of [[40, 'TiB'], [30, 'GiB'], [20, 'MiB'], [10, 'KiB']]) {
    if (n >= 2 ** power * 0.9995) return three(n / 2 ** power) + ' ' + unit;
  }
  return n + ' B';
}

const blocks = [];
class Block {
  constructor(timeline, rank, parent) {
    this.timeline = timeline;
    this.rank = rank;
    this.visible = false;
    this.height = rank.rows.length * ROW + (rank.memory.length ? MEMORY + 4 : 0);
    this.box = make('div', parent);
    this.box.className = 'rank';
    const head = make('p', this.box);
    make('b', head, 'rank ' + rank.rank);
    head.append(' · ' + timeline.kind + ' · ' + rank.note);
    this.canvas = make('canvas', this.box);
    this.canvas.style.height = this.height + 'px';
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute('role', 'img');
    this.canvas.setAttribute('aria-label', timeline.kind + ' rank ' + rank.rank + ': ' + rank.note);
    this.canvas.block = this;
    // The longest span so far bounds how far left of the view one that is still in view can start.
    for (const row of rank.rows) row.widest = row.length.reduce((a, b) => Math.max(a, b), 0);
  }
  draw() {
    if (!this.visible) return;
    const [pen, width] = prepare(this.canvas, this.height);
    const left = gutter(width), scale = (width - left) / (view.to - view.from);
    const place = t => left + (t - view.from) * scale;
    pen.font = '11px system-ui, sans-serif';
    pen.textBaseline = 'middle';
    this.rank.rows.forEach((row, k) => {
      const y = k * ROW;
      pen.fillStyle = theme.row;
      pen.fillRect(left, y, width - left, ROW - 2);
      pen.fillStyle = theme.soft;
      pen.textAlign = 'left';
      pen.fillText(fit(pen, row.lane, left - 8), 0, y + ROW / 2 - 1);
    });
    pen.save();
    pen.beginPath();
    pen.rect(left, 0, width - left, this.height);
    pen.clip();
    pen.textAlign = 'center';
    this.rank.rows.forEach((row, k) => this.drawRow(pen, row, k * ROW, place, scale, width, left));
    pen.restore();
    this.drawMemory(pen, place, width, left);
  }
  drawRow(pen, row, y, place, scale, width, left) {
    let edge = -Infinity;
    for (let i = after(row.start, view.from - row.widest); i < row.start.length && row.start[i] <= view.to; i++) {
      const x = place(row.start[i]), wide = row.length[i] * scale, end = x + Math.max(wide, 1);
      if (end < left || end <= edge + 0.25) continue;
      edge = end;
      pen.globalAlpha = critical.checked && !row.critical[i] ? 0.18 : 1;
      pen.fillStyle = theme.fill[row.op[i]];
      const solid = Math.min(row.wait[i] * scale, wide);
      if (solid > 0) {  // waiting for the last to arrive is drawn pale
        const strength = pen.globalAlpha;
        pen.globalAlpha = strength * 0.3;
        pen.fillRect(x, y, solid, ROW - 2);
        pen.globalAlpha = strength;
      }
      pen.fillRect(x + solid, y, Math.max(wide - solid - (wide - solid > 3 ? 1 : 0), 1), ROW - 2);
      const shownFrom = Math.max(x + solid, left), shown = Math.min(end, width) - shownFrom;
      if (shown > 14) {
        const label = row.label[i];
        if (pen.measureText(label).width + 4 <= shown) {
          pen.fillStyle = theme.text[row.op[i]];
          pen.fillText(label, shownFrom + shown / 2, y + ROW / 2 - 1);
        }
      }
      if (hot && hot.rank === this.rank.rank && hot.position === row.position[i]) {
        pen.globalAlpha = 1;
        pen.strokeStyle = theme.ink;
        pen.lineWidth = 2;
        pen.strokeRect(x + 1, y + 1, Math.max(wide - 3, 1), ROW - 4);
      }
    }
    pen.globalAlpha = 1;
  }
  drawMemory(pen, place, width, left) {
    if (!this.rank.memory.length) return;
    const top = this.rank.rows.length * ROW + 2, floor = top + MEMORY;
    const most = Math.max(1, ...data.timelines.map(t => t.peak));
    pen.fillStyle = theme.row;
    pen.fillRect(left, top, width - left, MEMORY);
    pen.save();
    pen.beginPath();
    pen.rect(left, top - 1, width - left, MEMORY + 2);
    pen.clip();
    this.rank.memory.forEach((tier, k) => {
      pen.beginPath();
      const level = b => floor - (MEMORY - 3) * b / most;
      const first = Math.max(0, after(tier.time, view.from) - 1);
      pen.moveTo(place(tier.time[first]), first ? level(tier.bytes[first - 1]) : floor);
      for (let i = first; i < tier.time.length; i++) {
        const x = place(tier.time[i]);
        if (x > width) break;
        pen.lineTo(x, level(tier.bytes[i]));
        const next = i + 1 < tier.time.length ? tier.time[i + 1] : this.timeline.length;
        pen.lineTo(place(next), level(tier.bytes[i]));
      }
      pen.strokeStyle = k ? theme.soft : theme.ink;
      pen.setLineDash(k ? [4, 3] : []);
      pen.lineWidth = 1.25;
      pen.stroke();
      if (k === 0) {
        pen.lineTo(place(this.timeline.length), floor);
        pen.lineTo(place(tier.time[first]), floor);
        pen.globalAlpha = 0.12;
        pen.fillStyle = theme.ink;
        pen.fill();
        pen.globalAlpha = 1;
      }
    });
    pen.restore();
    pen.fillStyle = theme.soft;
    pen.textAlign = 'left';
    const roomy = left > 90;
    pen.fillText(roomy ? 'memory' : 'mem', 0, top + 9);
    pen.fillText(fit(pen, this.rank.peak, left - 8), 0, top + 24);
  }
  at(x, y) {
    const width = this.canvas.clientWidth, left = gutter(width);
    if (x < left) return null;
    const t = view.from + (x - left) / (width - left) * (view.to - view.from);
    const row = this.rank.rows[Math.floor(y / ROW)];
    if (!row) return {t, row: null};
    const reach = 3 * (view.to - view.from) / (width - left);
    let best = -1, closest = Infinity;
    for (let i = after(row.start, t - row.widest - reach); i < row.start.length && row.start[i] <= t + reach; i++) {
      const away = Math.max(row.start[i] - t, t - row.start[i] - row.length[i], 0);
      if (away <= reach && away <= closest) { best = i; closest = away; }
    }
    return {t, row: best < 0 ? null : row, index: best, lane: row.lane};
  }
}

const gutter = width => width < 600 ? 70 : 120;
function after(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low;
}
function fit(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  let keep = text.length;  // what tells lanes apart is often at the end, so the middle goes
  const cut = n => text.slice(0, Math.ceil(n * 0.4)) + '…' + text.slice(text.length - Math.floor(n * 0.6));
  while (keep > 2 && pen.measureText(cut(keep)).width > width) keep--;
  return cut(keep);
}
function prepare(canvas, height) {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext('2d');
  pen.scale(ratio, ratio);
  pen.clearRect(0, 0, width, height);
  return [pen, width];
}
function drawAxis() {
  const canvas = document.getElementById('axis');
  const [pen, width] = prepare(canvas, 22);
  const left = gutter(width), span = view.to - view.from;
  const rough = span / Math.max(2, (width - left) / 90);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(k => k * power).find(s => s >= rough);
  pen.font = '11px system-ui, sans-serif';
  pen.fillStyle = theme.soft;
  pen.strokeStyle = theme.line;
  for (let t = Math.ceil(view.from / step) * step; t <= view.to; t += step) {
    const x = left + (t - view.from) / span * (width - left);
    const unit = step >= 1e9 ? [1e9, 's'] : step >= 1e6 ? [1e6, 'ms'] : step >= 1e3 ? [1e3, 'µs'] : [1, 'ns'];
    const digits = Math.max(0, -Math.floor(Math.log10(step / unit[0]) + 1e-9));
    const label = (t / unit[0]).toFixed(digits) + ' ' + unit[1];
    const half = pen.measureText(label).width / 2;
    pen.fillText(label, Math.min(Math.max(x - half, left - 4), width - 2 * half), 12);
    pen.beginPath();
    pen.moveTo(x, 16);
    pen.lineTo(x, 22);
    pen.stroke();
  }
}
let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawAxis();
    blocks.forEach(block => block.draw());
  });
}
function show(from, to) {
  const span = Math.min(full, Math.max(to - from, Math.min(full, 20)));
  view.from = Math.min(Math.max(0, from), full - span);
  view.to = view.from + span;
  redraw();
}
function zoom(factor, centre) {
  const middle = centre === undefined ? (view.from + view.to) / 2 : centre;
  show(middle - (middle - view.from) * factor, middle + (view.to - middle) * factor);
}
const pan = share => show(view.from + share * (view.to - view.from), view.to + share * (view.to - view.from));

const tip = document.getElementById('tip');
function point(event, block) {
  const box = block.canvas.getBoundingClientRect();
  const found = block.at(event.clientX - box.left, event.clientY - box.top);
  const before = hot;
  hot = null;
  let text = '';
  if (found && found.row) {
    const row = found.row, i = found.index, position = row.position[i];
    hot = {rank: block.rank.rank, position};
    const others = [];
    for (const other of blocks) {
      if (other === block || other.rank.rank !== block.rank.rank) continue;
      for (const r of other.rank.rows) {
        const at = r.position.indexOf(position);
        if (at >= 0) others.push(other.timeline.kind + ': ' + time(r.length[at]));
      }
    }
    text = [row.label[i] + ' · rank ' + block.rank.rank + ' · ' + row.lane,
      'start ' + (row.start[i] / 1e6).toFixed(3) + ' ms',
      block.timeline.kind + ': ' + time(row.length[i]) + (row.wait[i] > 0 ? ', ' + time(row.wait[i]) + ' waiting' : ''),
      ...others,
      'writes ' + bytes(row.written[i]), 'memory then ' + memoryAt(block, row.start[i]),
      ...(row.critical[i] ? ['on the critical path'] : [])].join('\n');
  } else if (found) {
    text = 'rank ' + block.rank.rank + ' · ' + time(Math.round(found.t)) + '\nmemory then ' + memoryAt(block, found.t);
  }
  tip.textContent = text;
  tip.style.visibility = text ? 'visible' : 'hidden';
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18;
  tip.style.transform = 'translate(' + Math.max(8, x) + 'px,' +
    (below + tip.offsetHeight < innerHeight ? below : Math.max(4, event.clientY - tip.offsetHeight - 14)) + 'px)';
  if ((before && before.position) !== (hot && hot.position) || (before && before.rank) !== (hot && hot.rank)) redraw();
}
function memoryAt(block, t) {
  return block.rank.memory.map(tier => {
    const k = after(tier.time, t + 1) - 1;
    return bytes(k < 0 ? 0 : tier.bytes[k]) + (tier.tier === 'device' ? '' : ' ' + tier.tier);
  }).join(', ') || 'none';
}
function hide() { tip.style.visibility = 'hidden'; if (hot) { hot = null; redraw(); } }

const charts = document.getElementById('charts'), critical = document.getElementById('critical');
const pair = document.getElementById('pair');
data.timelines.forEach(timeline => timeline.ranks.forEach(rank => blocks.push(new Block(timeline, rank, null))));
const watch = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const block = entry.target.block;
    block.visible = entry.isIntersecting;
    if (block.visible) block.draw(); else block.canvas.width = block.canvas.height = 0;
  }
}, {rootMargin: '300px'});
function arrange() {
  watch.disconnect();
  charts.replaceChildren();
  if (pair.checked) {
    const ranks = [...new Set(blocks.map(block => block.rank.rank))].sort((a, b) => a - b);
    for (const rank of ranks) {
      const section = make('section', charts);
      make('h2', section, 'rank ' + rank);
      section.append(...blocks.filter(block => block.rank.rank === rank).map(block => block.box));
    }
  } else {
    for (const timeline of data.timelines) {
      const section = make('section', charts);
      make('h2', section, timeline.kind);
      section.append(...blocks.filter(block => block.timeline === timeline).map(block => block.box));
    }
  }
  blocks.forEach(block => watch.observe(block.canvas));  // tells at once who is in view where it now stands
  redraw();
}

const fingers = new Map();
let moved = 0;
charts.addEventListener('pointerdown', event => {
  if (!event.target.block) return hide();
  fingers.set(event.pointerId, event);
  moved = 0;
  if (event.pointerType === 'mouse') event.target.setPointerCapture(event.pointerId);
});
charts.addEventListener('pointermove', event => {
  const block = event.target.block, last = fingers.get(event.pointerId);
  if (!block) return hide();
  const width = block.canvas.clientWidth, left = gutter(width), span = view.to - view.from;
  if (!last) { if (event.pointerType === 'mouse') point(event, block); return; }
  if (fingers.size === 2) {
    const [other] = [...fingers.values()].filter(f => f.pointerId !== event.pointerId);
    const was = Math.max(20, Math.abs(last.clientX - other.clientX));
    const is = Math.max(20, Math.abs(event.clientX - other.clientX));
    const middle = (event.clientX + other.clientX) / 2 - block.canvas.getBoundingClientRect().left;
    zoom(was / is, view.from + (middle - left) / (width - left) * span);
  } else {
    const step = event.clientX - last.clientX;
    moved += Math.abs(step);
    show(view.from - step / (width - left) * span, view.to - step / (width - left) * span);
  }
  fingers.set(event.pointerId, event);
  tip.style.visibility = 'hidden';
});
for (const name of ['pointerup', 'pointercancel']) {
  addEventListener(name, event => {
    const tapped = fingers.delete(event.pointerId) && moved < 6 && name === 'pointerup';
    if (tapped && event.target.block) point(event, event.target.block);
  });
}
charts.addEventListener('pointerleave', event => { if (event.pointerType === 'mouse') hide(); });
charts.addEventListener('dblclick', event => {
  if (!event.target.block) return;
  const box = event.target.getBoundingClientRect(), found = event.target.block.at(event.clientX - box.left, 0);
  if (found) zoom(0.4, found.t);
});
charts.addEventListener('wheel', event => {
  const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
  if (!event.target.block || !(event.ctrlKey || sideways)) return;  // a plain wheel scrolls the page
  event.preventDefault();
  if (event.ctrlKey) {
    const box = event.target.getBoundingClientRect(), found = event.target.block.at(event.clientX - box.left, 0);
    zoom(Math.exp(event.deltaY * 0.004), found ? found.t : undefined);
  } else pan((event.deltaX || event.deltaY) / 900);
}, {passive: false});
const keys = {'+': () => zoom(0.6), '=': () => zoom(0.6), '-': () => zoom(1 / 0.6), '0': () => show(0, full),
  ArrowLeft: () => pan(-0.2), ArrowRight: () => pan(0.2)};
addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === 'INPUT') return;
  if (keys[event.key]) { keys[event.key](); event.preventDefault(); } else if (event.key === 'Escape') hide();
});
for (const [id, act] of Object.entries({in: keys['+'], out: keys['-'], fit: keys['0'], left: keys.ArrowLeft,
  right: keys.ArrowRight})) document.getElementById(id).addEventListener('click', act);
critical.addEventListener('change', redraw);
pair.addEventListener('change', arrange);
if (data.timelines.length < 2) pair.parentElement.hidden = true;
addEventListener('scroll', () => { tip.style.visibility = 'hidden'; }, {passive: true});

dark.addEventListener('change', () => { readTheme(); redraw(); });
readTheme();
arrange();
new ResizeObserver(redraw).observe(charts);
"""
