// Small charts: loss against edges, loss against nodes kept, histograms, colored tokens, attention.

/** Loss against edges, a line for each task; `chosen` stands out, or all do when it is null. */
function drawCurves(holder, tasks, chosen, { height = 330, pick = null } = {}) {
  const width = Math.max(300, holder.clientWidth || 620);
  const margin = { top: 14, right: 18, bottom: 42, left: 50 };
  const points = tasks.flatMap((row) => row.curve);
  const [least, most] = d3.extent(points, (point) => Math.max(1, point.edges));
  const x = d3.scaleLog([Math.max(0.8, least * 0.85), Math.max(most, least + 1) * 1.2], [margin.left, width - margin.right]);
  // A circuit far below its target lies at the bottom.
  const y = d3.scaleLinear([0, d3.max(points, (point) => Math.max(point.loss, point.target))], [height - margin.bottom, margin.top]).nice();
  const chart = svg('svg', {
    class: 'chart', viewBox: `0 0 ${width} ${height}`, role: 'img',
    'aria-label': 'Task loss against edges; the numbers are in the table and in each circuit',
  });
  const across = svg('g', { transform: `translate(0 ${height - margin.bottom})` });
  const up = svg('g', { transform: `translate(${margin.left} 0)` });
  d3.select(across).call(d3.axisBottom(x).ticks(Math.max(2, width / 110), ',d').tickSizeOuter(0));
  d3.select(up).call(d3.axisLeft(y).ticks(6).tickSize(-(width - margin.left - margin.right)));
  chart.append(
    across, up,
    svg('text', { class: 'axis', x: (margin.left + width - margin.right) / 2, y: height - 6, 'text-anchor': 'middle' }, 'edges'),
    svg('text', {
      class: 'axis', 'text-anchor': 'middle', transform: `translate(14 ${(margin.top + height - margin.bottom) / 2}) rotate(-90)`,
    }, 'task loss (nats)'),
  );
  const line = d3.line((p) => x(Math.max(1, p.edges)), (p) => y(p.loss));
  const ordered = [...tasks].sort((a, b) => d3.ascending(a.task === chosen, b.task === chosen));
  for (const row of ordered) {
    const sorted = [...row.curve].sort((a, b) => d3.ascending(a.target, b.target));
    const group = svg('g', {
      class: `curve ${chosen === null ? '' : row.task === chosen ? 'chosen' : 'other'}`, 'data-task': row.task,
    });
    group.append(svg('path', { d: line(sorted) }));
    for (const point of sorted) {
      const dot = svg('circle', {
        cx: x(Math.max(1, point.edges)), cy: y(point.loss), r: point.target === row.target ? 5 : 3,
        class: point.target === row.target ? 'ringed' : '',
      });
      hover(dot, () => [
        row.task, `target ${number(point.target)}: ${plural(point.edges, 'edge')}, ${plural(point.nodes, 'node')}`, `loss ${loss(point.loss)} on the report split`,
      ]);
      if (pick) dot.addEventListener('click', () => pick(row.task));
      group.append(dot);
    }
    chart.append(group);
  }
  holder.replaceChildren(chart);
}

/** The loss of the most important nodes alone, over the slider that chooses them. */
function drawPrefix(holder, circuit, keep) {
  const width = 240;
  const height = 44;
  const x = d3.scaleLinear([1, Math.max(2, circuit.nodes.length)], [4, width - 4]);
  const points = circuit.prefix.filter(([count]) => count <= circuit.nodes.length);
  const y = d3.scaleLinear([0, Math.max(circuit.target, d3.max(points, (p) => p[1]))], [height - 3, 3]);
  // Large circuits are measured at some sizes; between two of them the line says how much it is about.
  const measured = points.some(([count]) => count === keep);
  const after = Math.max(1, d3.bisector((p) => p[0]).left(points, keep));
  const [from, to] = [points[after - 1], points[after] ?? points[after - 1]];
  const share = to[0] === from[0] ? 0 : (keep - from[0]) / (to[0] - from[0]);
  const [count, value] = [keep, from[1] + Math.max(0, Math.min(1, share)) * (to[1] - from[1])];
  const chart = svg('svg', {
    class: 'spark', viewBox: `0 0 ${width} ${height}`, role: 'img',
    'aria-label': 'Task loss of the most important nodes alone, by how many',
  },
  svg('line', { class: 'target', x1: 0, x2: width, y1: y(circuit.target), y2: y(circuit.target) }),
  svg('path', { d: d3.line((p) => x(p[0]), (p) => y(p[1]))(points) }),
  svg('circle', { cx: x(count), cy: y(value), r: 4 }));
  const text = el('span', { class: 'quiet' },
    `${count === circuit.total_nodes ? 'all of them' : `the top ${count}`} alone: loss ${measured ? '' : 'about '}${loss(value)}, target ${number(circuit.target)}`,
    el('br'), `on ${plural(circuit.ablation_pairs, 'pair')} of the report split`);
  holder.replaceChildren(chart, text);
}

/** How often a node takes which value; zeros are told beside it. */
function drawHistogram(node) {
  const width = 460;
  const height = 110;
  const most = d3.max(node.counts) || 1;
  const x = d3.scaleLinear([node.low, node.high], [8, width - 8]);
  const y = d3.scaleSqrt([0, most], [height - 22, 6]);
  const step = (node.high - node.low) / node.counts.length;
  const chart = svg('svg', {
    class: 'chart histogram', viewBox: `0 0 ${width} ${height}`, role: 'img',
    'aria-label': `Histogram of values from ${number(node.low)} to ${number(node.high)}`,
  });
  node.counts.forEach((count, i) => {
    const from = node.low + i * step;
    const bar = svg('rect', {
      class: from + step / 2 < 0 ? 'negative' : 'positive', x: x(from) + 0.5, width: Math.max(1, x(from + step) - x(from) - 1),
      y: y(count), height: height - 22 - y(count),
    });
    hover(bar, () => [`${number(from)} to ${number(from + step)}`, plural(count, 'token')]);
    chart.append(bar);
  });
  const axis = svg('g', { transform: `translate(0 ${height - 22})` });
  d3.select(axis).call(d3.axisBottom(x).ticks(7).tickSizeOuter(0));
  chart.append(axis);
  return chart;
}

/** A background for a value, blue above and orange below zero. */
function color(element, value, largest) {
  const strength = largest ? Math.min(1, Math.abs(value) / largest) : 0;
  if (strength < 0.01) return;
  const hue = value < 0 ? 'var(--negative)' : 'var(--positive)';
  element.style.background = `color-mix(in srgb, ${hue} calc(${(0.1 + 0.9 * strength).toFixed(2)} * var(--deepest)), transparent)`;
}

/** Tokens colored by values, which are known to about `grain`; line ends are shown and kept. */
function drawTokens(ids, values, largest, { grain = 0, focus = -1, texts = null, changed = null, label = '' } = {}) {
  const strongest = d3.maxIndex(values, Math.abs);
  const holder = el('pre', {
    class: 'tokens', role: 'group', tabindex: 0,
    'aria-label': `${label}: largest value ${number(values[strongest], 3, grain)} at ${texts?.[strongest] ?? quoted(ids[strongest])}`,
  });
  ids.forEach((id, i) => {
    const text = texts?.[i] ?? visibleText(id);
    const classes = [i === focus ? 'focus' : '', changed?.[i] ? 'changed' : ''].join(' ').trim();
    const span = el('span', { class: classes || null }, text);
    color(span, values[i], largest);
    hover(span, () => [texts?.[i] ?? quoted(id), number(values[i], 4, grain)]);
    holder.append(span);
  });
  return holder;
}

/**
 * A lower triangle of values, known to about `grain`, as a picture, queries down and keys across; `shade` makes a color
 * of a share.
 */
function drawSquare(ids, at, { title, scale, diverging, grain = 0, shade = (share) => share }) {
  const size = ids.length;
  const margin = 74;
  const room = Math.max(260, Math.min(470, (byId('panel').clientWidth || 500) - margin - 40));
  const cell = Math.max(3, Math.min(18, Math.floor(room / size)));
  const ratio = Math.min(3, window.devicePixelRatio || 1);
  const width = margin + size * cell + 2;
  const height = margin + size * cell + 2;
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue('--quiet');
  const hues = [style.getPropertyValue('--positive'), style.getPropertyValue('--negative')];
  const canvas = el('canvas', { width: width * ratio, height: height * ratio, role: 'img', 'aria-label': title });
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const paint = canvas.getContext('2d');
  paint.scale(ratio, ratio);
  paint.fillStyle = style.getPropertyValue('--sunken');
  paint.beginPath();
  paint.moveTo(margin, margin);
  for (let t = 0; t < size; t += 1) {
    paint.lineTo(margin + t * cell, margin + (t + 1) * cell);
    paint.lineTo(margin + (t + 1) * cell, margin + (t + 1) * cell);
  }
  paint.lineTo(margin, margin + size * cell);
  paint.fill();
  for (let t = 0; t < size; t += 1) {
    for (let s = 0; s <= t; s += 1) {
      const value = at(t, s);
      paint.globalAlpha = scale ? shade(Math.min(1, Math.abs(value) / scale)) : 0;
      paint.fillStyle = hues[diverging && value < 0 ? 1 : 0];
      paint.fillRect(margin + s * cell, margin + t * cell, cell - (cell > 5 ? 1 : 0), cell - (cell > 5 ? 1 : 0));
    }
  }
  paint.globalAlpha = 1;
  if (cell >= 8) {
    paint.fillStyle = ink;
    paint.font = `${Math.min(11, cell)}px ui-monospace, monospace`;
    paint.textBaseline = 'middle';
    ids.forEach((id, i) => {
      const text = quoted(id).slice(1, -1).slice(0, 10);
      paint.textAlign = 'right';
      paint.fillText(text, margin - 4, margin + (i + 0.5) * cell);
      paint.save();
      paint.translate(margin + (i + 0.5) * cell, margin - 4);
      paint.rotate(-Math.PI / 2);
      paint.textAlign = 'left';
      paint.fillText(text, 0, 0);
      paint.restore();
    });
  }
  canvas.addEventListener('pointermove', (event) => {
    const s = Math.floor((event.offsetX - margin) / cell);
    const t = Math.floor((event.offsetY - margin) / cell);
    if (s < 0 || t >= size || s > t) return hideTip();
    return tip([`from ${quoted(ids[t])} (${t}) to ${quoted(ids[s])} (${s})`, number(at(t, s), grain ? 2 : 4, grain)], event);
  });
  canvas.addEventListener('pointerleave', hideTip);
  return el('figure', {}, el('figcaption', {}, title), el('div', { class: 'scroll' }, canvas));
}
