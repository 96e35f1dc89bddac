// Dense blocks: where a column and a head have very many edges, one band stands for them until it is opened.

// More edges than this between a column and one head cannot be told apart.
const DENSE = 60;

const columnName = (node) => (node.inHead ? `${node.layer}.head.${node.head}` : `${node.layer}.${node.location}`);
const columnWords = (node) => (node.inHead ? `layer ${node.layer}, head ${node.head}` : `layer ${node.layer}, ${node.what}`);

/** The blocks of edges between a column and one head that are dense: name -> the lines that draw them. */
function denseBlocks(lines) {
  // The box of a group stands elsewhere than the columns of its nodes.
  const inBox = new Set([...graph.boxes.values()].flatMap(({ nodes }) => nodes));
  const ofHeads = lines.filter(({ stream, source, target }) => (
    !stream && (source.inHead || target.inHead) && !inBox.has(source) && !inBox.has(target)));
  const blocks = d3.group(ofHeads, ({ source, target }) => `${columnName(source)}>${columnName(target)}`);
  return new Map([...blocks].filter(([, each]) => each.length > DENSE));
}

/**
 * Draws dense blocks, `graph.bundles`: bands, which lie below edges, and buttons with how many edges a block has,
 * which lie above them.
 */
function drawBundles() {
  graph.bundles = [...denseBlocks(graph.lines)].map(([name, lines]) => {
    const [sources, targets] = [lines.map(({ source }) => source), lines.map(({ target }) => target)];
    const half = [NODE.width / 2, NODE.height / 2];
    const [left, right] = [d3.max(sources, (node) => node.x) + half[0], d3.min(targets, (node) => node.x) - half[0]];
    const [from, to] = [sources, targets].map((nodes) => d3.extent(nodes, (node) => node.y));
    const words = `${columnWords(sources[0])} → ${columnWords(targets[0])}`;
    const bundle = { name, lines, words, band: drawBand(name, left, right, from, to, half[1]), count: lines.length };
    // Beside the head, where the bands of one column have come apart.
    const across = targets[0].inHead ? right - 26 : left + 26;
    const share = ease(Math.max(0, Math.min(1, (across - left) / (right - left))));
    const down = (1 - share) * d3.mean(from) + share * d3.mean(to);
    bundle.label = svg('text', { 'text-anchor': 'middle', dy: '0.35em' });
    bundle.handle = svg('g', {
      class: 'handle', role: 'button', tabindex: 0, 'data-bundle': name, transform: `translate(${across.toFixed(1)} ${down.toFixed(1)})`,
    }, svg('rect', { x: -20, y: -9, width: 40, height: 18, rx: 9 }), bundle.label);
    const text = () => [plural(bundle.count, 'edge'), words, bundle.opened ? 'click to bundle them' : 'click to see each'];
    for (const item of [bundle.band, bundle.handle]) graph.texts.set(item, text);
    return bundle;
  });
  return ['band', 'handle'].map((part) => svg('g', {}, ...graph.bundles.map((bundle) => bundle[part])));
}

function drawBand(name, left, right, [top, bottom], [toTop, toBottom], half) {
  const middle = (left + right) / 2;
  const [y0, y1, y2, y3] = [top - half, toTop - half, toBottom + half, bottom + half];
  return svg('path', {
    class: 'band', 'data-bundle': name,
    d: `M${left},${y0}C${middle},${y0} ${middle},${y1} ${right},${y1}V${y2}C${middle},${y2} ${middle},${y3} ${left},${y3}Z`,
  });
}

const readOpen = (text) => new Set((text ?? '').split(';').filter(Boolean));

/** What becomes of the text of open blocks when one is opened or closed. */
function toggledBundle(text, name) {
  const open = readOpen(text);
  if (!open.delete(name)) open.add(name);
  return [...open].join(';');
}

/** Hides the edges of dense blocks that are not open; what is selected is seen in any case. */
function paintBundles(open) {
  const opened = readOpen(open);
  for (const bundle of graph.bundles) {
    bundle.count = d3.sum(bundle.lines, ({ line }) => !line.classList.contains('gone'));
    const dense = bundle.count > DENSE;
    bundle.opened = opened.has(bundle.name);
    for (const { line } of bundle.lines) line.classList.toggle('bundled', dense && !bundle.opened);
    bundle.band.classList.toggle('gone', !dense || bundle.opened);
    bundle.handle.classList.toggle('gone', !dense);
    bundle.handle.setAttribute('aria-expanded', String(bundle.opened));
    bundle.handle.setAttribute('aria-label', `${plural(bundle.count, 'edge')}, ${bundle.words}`);
    bundle.label.textContent = `${bundle.count}${bundle.opened ? ' ×' : ''}`;
  }
}
