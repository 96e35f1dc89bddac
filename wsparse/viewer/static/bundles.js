// Dense blocks: where a column and a head have very many edges, one band stands for them until it is opened.

// More edges than this between a column and one head cannot be told apart.
const DENSE = 60;

const columnName = (node) => (node.inHead ? `${node.layer}.head.${node.head}` : `${node.layer}.${node.location}`);
const columnWords = (node) => (node.inHead ? `layer ${node.layer}, head ${node.head}` : `layer ${node.layer}, ${node.what}`);

/** The blocks of edges between a column and one head that are dense: name -> the lines that draw them. */
function denseBlocks(lines) {
  const ofHeads = lines.filter(({ stream, source, target }) => !stream && (source.inHead || target.inHead));
  const blocks = d3.group(ofHeads, ({ source, target }) => `${columnName(source)}>${columnName(target)}`);
  return new Map([...blocks].filter(([, each]) => each.length > DENSE));
}

/** Draws a band for each dense block, with how many edges it has; `graph.bundles` are they. */
function drawBundles() {
  graph.bundles = [...denseBlocks(graph.lines)].map(([name, lines]) => {
    const [sources, targets] = [lines.map(({ source }) => source), lines.map(({ target }) => target)];
    const [x0, x1] = [d3.max(sources, (node) => node.x) + NODE.width / 2, d3.min(targets, (node) => node.x) - NODE.width / 2];
    const edges = [sources, targets].map((nodes) => d3.extent(nodes, (node) => node.y));
    const [[top0, bottom0], [top1, bottom1]] = edges.map(([top, bottom]) => [top - NODE.height / 2, bottom + NODE.height / 2]);
    const middle = (x0 + x1) / 2;
    const band = svg('path', {
      class: 'band',
      d: `M${x0},${top0}C${middle},${top0} ${middle},${top1} ${x1},${top1}V${bottom1}C${middle},${bottom1} ${middle},${bottom0} ${x0},${bottom0}Z`,
    });
    const label = svg('text', { class: 'count', 'text-anchor': 'middle', dy: '0.35em' });
    // Beside the head, where the bands of one column have come apart.
    const at = targets[0].inHead ? [0.75, top1, bottom1, top0, bottom0] : [0.25, top0, bottom0, top1, bottom1];
    const [share, nearTop, nearBottom, farTop, farBottom] = at;
    const weight = ease(0.75);
    const y = weight * (nearTop + nearBottom) / 2 + (1 - weight) * (farTop + farBottom) / 2;
    const item = svg('g', { class: 'bundle', role: 'button', tabindex: 0, 'data-bundle': name },
      band, svg('g', { class: 'handle', transform: `translate(${x0 + share * (x1 - x0)} ${y})` },
        svg('rect', { x: -26, y: -9, width: 52, height: 18, rx: 9 }), label));
    const words = `${columnWords(sources[0])} → ${columnWords(targets[0])}`;
    const bundle = { name, lines, item, label, words, count: lines.length };
    graph.texts.set(item, () => [plural(bundle.count, 'edge'), words, bundle.opened ? 'click to bundle them' : 'click to see each']);
    return bundle;
  });
  return svg('g', { class: 'bundles' }, ...graph.bundles.map(({ item }) => item));
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
    bundle.item.classList.toggle('gone', !dense);
    bundle.item.classList.toggle('opened', bundle.opened);
    bundle.item.setAttribute('aria-expanded', String(bundle.opened));
    bundle.item.setAttribute('aria-label', `${plural(bundle.count, 'edge')}, ${bundle.words}`);
    bundle.label.textContent = `${bundle.count} ${bundle.opened ? '×' : '⋯'}`;
  }
}
