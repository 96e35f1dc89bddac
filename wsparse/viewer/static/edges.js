// Choosing edges: the one nearest to the pointer, and by keys those of a node one after the other.

// Pixels around the pointer in which a line can be chosen, by what points.
const REACH = { mouse: 7, pen: 12, touch: 18 };

// A line is a cubic whose handles are half way across: at `t` it has come `1.5 t (1 - t) + t^3` across, and
// `3 t^2 - 2 t^3` down.
const STEPS = 512;
const EASE = (() => {
  const down = new Float64Array(STEPS + 1);
  let t = 0;
  for (let i = 0; i <= STEPS; i += 1) {
    while (t < 1 && 1.5 * t * (1 - t) + t ** 3 < i / STEPS) t += 1 / (8 * STEPS);
    down[i] = 3 * t * t - 2 * t ** 3;
  }
  return down;
})();

/** How far down a line has come, from 0 to 1, where it has come a share of its way across. */
const ease = (share) => EASE[Math.round(STEPS * share)];

/** About how far a point is from a line; infinite beside its ends. */
function distance([x0, y0, x1, y1], x, y) {
  const share = (x - x0) / (x1 - x0);
  if (!(share >= 0 && share <= 1)) return Infinity;
  const [before, after] = [Math.max(0, share - 1 / STEPS), Math.min(1, share + 1 / STEPS)];
  const slope = (y1 - y0) * (ease(after) - ease(before)) / ((x1 - x0) * (after - before));
  return Math.abs(y0 + (y1 - y0) * ease(share) - y) / Math.hypot(1, slope);
}

/** The visible edge nearest to the pointer, or else the nearest stretch of residual stream; null where none is near. */
function lineNear({ target, clientX, clientY, pointerType }) {
  if (target.matches('.edge, .stream')) return target;
  const root = byId('graph');
  const box = root.getBoundingClientRect();
  const transform = d3.zoomTransform(root);
  const [x, y] = transform.invert([clientX - box.left, clientY - box.top]);
  const reach = (REACH[pointerType] ?? REACH.mouse) / transform.k;
  const near = (streams) => {
    let [found, least] = [null, reach];
    for (const { line, span, stream } of graph.lines) {
      if (stream !== streams) continue;
      const off = distance(span, x, y);
      if (off <= least && isSeen(line)) [found, least] = [line, off];
    }
    return found;
  };
  return near(false) ?? near(true);
}

const isSeen = ({ classList }) => !classList.contains('gone') && !classList.contains('inside') && (!classList.contains('bundled') || classList.contains('lit'));

/** Makes an edge stand out as the "near" one, which a click would choose, or as the "chosen" one; null for none. */
function standOut(kind, line) {
  const before = graph[kind];
  if (before === line) return;
  before?.classList.remove(kind);
  line?.classList.add(kind);
  graph[kind] = line;
  for (const each of [before, line].filter(Boolean)) {
    const wide = each.classList.contains('near') || each.classList.contains('chosen');
    each.style.strokeWidth = wide ? `${+each.getAttribute('stroke-width') + 2}px` : '';
  }
}

/** The edge of a node, or of the box that it is in, that comes after the chosen one, from the largest to the smallest and round again. */
function nextEdge(node, chosen, step) {
  const own = boxedWith(node);
  const drawn = graph.lines.filter(({ stream, source, target, line: { classList } }) => (
    !stream && (own.includes(source) || own.includes(target)) && !classList.contains('gone') && !classList.contains('inside')));
  const names = drawn.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).map(({ line }) => line.dataset.edge);
  const at = names.indexOf(chosen);
  if (!names.length) return null;
  if (at < 0) return names.at(step > 0 ? 0 : -1);
  return names[(at + step + names.length) % names.length];
}

/** The node at the other end of the chosen edge. */
function otherEnd(node, chosen) {
  const ends = (chosen ?? '').split('>').map((name) => graph.circuit.byName.get(name));
  const own = boxedWith(node);
  return ends.some((end) => own.includes(end)) ? ends.find((end) => !own.includes(end)) ?? null : null;
}
