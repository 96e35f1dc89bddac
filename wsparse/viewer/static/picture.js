// The graph as a file. Its shapes are written with the colors that they have on the page, so the file needs
// neither the page nor its style; the same shapes are painted for a PNG, since the policy lets no image load.

const MARGIN = 16;
// Pixels of a side of a PNG that browsers can paint.
const MOST_PIXELS = 8000;

const GEOMETRY = ['x', 'y', 'width', 'height', 'rx', 'd'];

/** What is drawn in the graph and seen, in its own coordinates: rectangles, paths and texts with their colors. */
function shapes() {
  const found = [];
  const walk = (element, matrix, opacity) => {
    const style = getComputedStyle(element);
    if (style.display === 'none') return;
    const own = element.transform.baseVal.consolidate()?.matrix;
    const [here, seen] = [own ? matrix.multiply(own) : matrix, opacity * style.opacity];
    if (element.tagName === 'g') {
      for (const child of element.children) walk(child, here, seen);
      return;
    }
    const shape = { tag: element.tagName, matrix: here, opacity: seen, ...paint(style) };
    for (const name of GEOMETRY) if (element.hasAttribute(name)) shape[name] = element.getAttribute(name);
    if (shape.tag === 'text') Object.assign(shape, words(element, style));
    found.push(shape);
  };
  for (const child of byId('graph').firstChild.children) walk(child, byId('graph').createSVGMatrix(), 1);
  return found;
}

const paint = (style) => ({
  fill: plainColor(style.fill, style.fillOpacity), stroke: plainColor(style.stroke, style.strokeOpacity), strokeWidth: parseFloat(style.strokeWidth),
  dash: style.strokeDasharray === 'none' ? [] : style.strokeDasharray.split(',').map(parseFloat), cap: style.strokeLinecap,
});

function words(element, style) {
  const size = parseFloat(style.fontSize);
  const down = parseFloat(element.getAttribute('dy') ?? 0) * size;
  return {
    x: +(element.getAttribute('x') ?? 0), y: +(element.getAttribute('y') ?? 0) + down, text: element.textContent,
    size, weight: style.fontWeight, family: style.fontFamily.replaceAll('"', "'"), anchor: style.textAnchor,
  };
}

const plainColors = new Map();

/** A color as programs other than browsers read it, with its share of what is behind: null for none. */
function plainColor(color, share = 1) {
  if (color === 'none') return null;
  const key = `${color} ${share}`;
  if (!plainColors.has(key)) {
    const brush = el('canvas', { width: 1, height: 1 }).getContext('2d');
    brush.fillStyle = color;
    brush.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
    plainColors.set(key, { rgb: `rgb(${r},${g},${b})`, alpha: +(share * a / 255).toFixed(3) });
  }
  return plainColors.get(key);
}

/** The words around the graph in a file: what it is of, and what colors mean. */
function captions({ left, right, top, bottom }) {
  const style = getComputedStyle(document.documentElement);
  const body = getComputedStyle(document.body);
  const colorOf = (name) => plainColor(style.getPropertyValue(name).trim());
  const start = { matrix: byId('graph').createSVGMatrix(), opacity: 1, stroke: null, dash: [], cap: 'butt' };
  const text = (x, y, content, name, size, weight = 400) => ({
    ...start, tag: 'text', x, y, text: content, size, weight, fill: colorOf(name), family: body.fontFamily.replaceAll('"', "'"), anchor: 'start',
  });
  const { circuit } = graph;
  const shown = graph.lines.filter(({ stream, line }) => !stream && !line.classList.contains('gone')).length;
  const nodes = circuit.nodes.filter((node) => !graph.items.get(node.name).classList.contains('gone')).length;
  const legend = [['--positive', 'positive weight', []], ['--negative', 'negative weight', []], ['--stream', 'same residual channel', [1.5, 4]]];
  return [
    { ...start, tag: 'rect', x: left, y: top, width: right - left, height: bottom - top, fill: colorOf('--card') },
    text(left + MARGIN, top + 26, circuit.task, '--ink', 17, 600),
    text(left + MARGIN, top + 45, `${data.run.name}: ${plural(nodes, 'node')}, ${plural(shown, 'edge')}`, '--quiet', 12),
    ...legend.flatMap(([name, content, dash], i) => [
      { ...start, dash, tag: 'path', d: `M${left + MARGIN + 150 * i},${bottom - 18}h20`, stroke: colorOf(name), strokeWidth: 3, fill: null },
      text(left + MARGIN + 26 + 150 * i, bottom - 14, content, '--quiet', 12),
    ]),
  ];
}

/** All that a file of the graph shows, and its extent. */
function picture() {
  const { left, right, top, low } = graph.place;
  const frame = { left: left - MARGIN, top: top - 128 };
  // Whole pixels, and room for the legend.
  frame.right = frame.left + Math.ceil(Math.max(right + MARGIN - frame.left, 480));
  frame.bottom = frame.top + Math.ceil(low + 56 - frame.top);
  return { frame, parts: [...captions(frame), ...shapes()] };
}

const transformOf = ({ a, b, c, d, e, f }) => (
  a === 1 && b === 0 && c === 0 && d === 1 ? (e || f ? `translate(${e} ${f})` : null) : `matrix(${[a, b, c, d, e, f].map((each) => +each.toFixed(4)).join(' ')})`);

// Characters that a name may have and XML may not.
const NOT_XML = /[\u0000-\u0008\u000B\u000C\u000E-\u001F\uFFFE\uFFFF]/g;

/** The graph as the text of an SVG file. */
function svgText() {
  const { frame: { left, right, top, bottom }, parts } = picture();
  const root = svg('svg', {
    width: right - left, height: bottom - top, viewBox: `${left} ${top} ${right - left} ${bottom - top}`,
  });
  for (const part of parts) {
    const { tag, fill, stroke } = part;
    const geometry = Object.fromEntries(GEOMETRY.filter((name) => name in part).map((name) => [name, part[name]]));
    root.append(svg(tag, {
      ...geometry, transform: transformOf(part.matrix), opacity: part.opacity < 1 ? part.opacity.toFixed(3) : null,
      fill: fill?.rgb ?? 'none', 'fill-opacity': fill && fill.alpha < 1 ? fill.alpha : null,
      ...(stroke ? {
        stroke: stroke.rgb, 'stroke-opacity': stroke.alpha < 1 ? stroke.alpha : null, 'stroke-width': part.strokeWidth,
        'stroke-dasharray': part.dash.join(' ') || null, 'stroke-linecap': part.cap,
      } : {}),
      ...(tag === 'text' ? { 'font-size': part.size, 'font-weight': part.weight, 'font-family': part.family, 'text-anchor': part.anchor } : {}),
      // The edge of a text lies around its letters, not on them.
      'paint-order': tag === 'text' && stroke ? 'stroke' : null,
    }, ...(tag === 'text' ? [part.text.replace(NOT_XML, '\uFFFD')] : [])));
  }
  return `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(root)}\n`;
}

/** Paints the graph on a canvas. */
function canvasOf() {
  const { frame: { left, right, top, bottom }, parts } = picture();
  const scale = Math.min(2, MOST_PIXELS / (right - left), MOST_PIXELS / (bottom - top));
  const canvas = el('canvas', { width: Math.round(scale * (right - left)), height: Math.round(scale * (bottom - top)) });
  const brush = canvas.getContext('2d');
  for (const part of parts) {
    const { a, b, c, d, e, f } = part.matrix;
    brush.setTransform(scale, 0, 0, scale, -scale * left, -scale * top);
    brush.transform(a, b, c, d, e, f);
    if (part.tag === 'text') paintWords(brush, part);
    else paintShape(brush, part);
  }
  return canvas;
}

const dipToFill = (brush, { fill, opacity }) => Object.assign(brush, { globalAlpha: opacity * fill.alpha, fillStyle: fill.rgb });

function dipToStroke(brush, { stroke, strokeWidth, dash, cap, opacity }) {
  Object.assign(brush, { globalAlpha: opacity * stroke.alpha, strokeStyle: stroke.rgb, lineWidth: strokeWidth, lineCap: cap });
  brush.setLineDash(dash);
}

function paintWords(brush, shape) {
  const { x, y, text, size, weight, family, anchor } = shape;
  brush.font = `${weight} ${size}px ${family}`;
  brush.textAlign = { middle: 'center', end: 'right' }[anchor] ?? 'left';
  if (shape.stroke) {
    dipToStroke(brush, shape);
    brush.strokeText(text, x, y);
  }
  dipToFill(brush, shape);
  brush.fillText(text, x, y);
}

function paintShape(brush, shape) {
  const { tag, x, y, width, height, rx, d } = shape;
  const outline = new Path2D(tag === 'path' ? d : undefined);
  if (tag === 'rect') outline.roundRect(+x, +y, +width, +height, Math.min(rx ?? 0, width / 2, height / 2));
  if (shape.fill) {
    dipToFill(brush, shape);
    brush.fill(outline);
  }
  if (!shape.stroke) return;
  dipToStroke(brush, shape);
  brush.stroke(outline);
}

function listenToSaving() {
  byId('save-svg').addEventListener('click', () => save(`${ownName()}.svg`, new Blob([svgText()], { type: 'image/svg+xml' })));
  byId('save-png').addEventListener('click', () => canvasOf().toBlob((blob) => save(`${ownName()}.png`, blob), 'image/png'));
}
