// Two circuits drawn side by side: where both are of one model, a node is at the same place in either.

/** The nodes, edges and streams of two circuits of one model as one circuit, for a layout that both follow. */
function union(first, second) {
  const nodes = new Map();
  for (const node of [...first.nodes, ...second.nodes]) {
    const known = nodes.get(node.name);
    if (known) known.alone &&= node.alone;
    else nodes.set(node.name, { ...node, in: [], out: [] });
  }
  const own = (node) => node && nodes.get(node.name);
  const merged = (kind) => {
    const lines = [...first[kind], ...second[kind]].map((line) => ({ ...line, source: own(line.source), target: own(line.target) }));
    return [...new Map(lines.map((line) => [lineName(line), line])).values()];
  };
  const edges = merged('edges');
  for (const edge of edges) {
    edge.source.out.push(edge);
    edge.target.in.push(edge);
  }
  return {
    nodes: [...nodes.values()], edges, streams: merged('streams'),
    largestWeight: Math.max(first.largestWeight, second.largestWeight),
  };
}

const lineName = ({ source, target }) => `${source?.name ?? ''}>${target?.name ?? ''}`;

/** Places for both circuits: one layout of their union, or, for different models, one of each. */
function placesOf(first, second, together) {
  const placed = (circuit) => {
    const place = arrange(circuit);
    const at = new Map(circuit.nodes.map(({ name, x, y }) => [name, { x, y }]));
    return { place: { ...place, low: d3.max(circuit.nodes, (node) => node.y) + NODE.height }, at, largestWeight: circuit.largestWeight };
  };
  if (!together) return [placed(first), placed(second)];
  const both = placed(union(first, second));
  return [both, both];
}

/** Draws a circuit into an element; returns the elements of its nodes by name, its zoom, and what to look at first. */
function drawHalf(root, circuit, { place, at, largestWeight }, shared, { pick, zoomed }) {
  const world = svg('g');
  const center = (node, side = 0) => [at.get(node.name).x + side * NODE.width / 2, at.get(node.name).y];
  const path = ({ source, target }) => curve(
    ...(source ? center(source, 1) : [place.ends[0] + 7, center(target)[1]]),
    ...(target ? center(target, -1) : [place.ends[1] - 7, center(source)[1]]));
  const streams = circuit.streams.map((stream) => svg('path', { class: 'stream', d: path(stream) }));
  const lines = [...circuit.edges.slice(0, MAX_EDGES)].reverse().map((edge) => {
    const line = svg('path', {
      class: `edge ${edge.weight < 0 ? 'negative' : 'positive'} ${shared?.edges.has(lineName(edge)) ? 'shared' : 'own'}`, d: path(edge),
      'stroke-width': widthOf(edge, largestWeight), 'data-edge': lineName(edge),
    });
    hover(line, () => [`${edge.source.name} → ${edge.target.name}`, `weight ${exact(edge.weight)}`]);
    return line;
  });
  const items = new Map(circuit.nodes.map((node) => [node.name, halfNode(node, at.get(node.name), shared, pick)]));
  const inside = (head) => circuit.nodes.map((node) => at.get(node.name)).some(({ x, y }) => (
    x >= head.left && x <= head.right && y >= head.top && y <= head.bottom));
  world.append(...place.blocks.flatMap((each) => block(each, place.top, place.low)), ...place.heads.filter(inside).flatMap(headBox),
    ...ENDS.map((title, i) => svg('g', { class: 'side' }, ...endShapes(title, place.ends[i], place))),
    svg('g', {}, ...streams), svg('g', {}, ...lines), svg('g', {}, ...items.values()));
  root.replaceChildren(world);
  const zoom = d3.zoom().scaleExtent([0.02, 8]).on('zoom', ({ transform, sourceEvent }) => {
    world.setAttribute('transform', transform);
    hideTip();
    if (sourceEvent) zoomed(transform);
  });
  d3.select(root).call(zoom).on('dblclick.zoom', null);
  const first = circuit.nodes.find((node) => shared?.nodes.has(node.name)) ?? circuit.nodes[0];
  return { root, items, zoom, place, first: at.get(first.name) };
}

function halfNode(node, { x, y }, shared, pick) {
  const both = shared?.nodes.has(node.name);
  const item = svg('g', {
    class: both ? 'node shared' : 'node own', role: 'button', tabindex: 0, 'aria-pressed': 'false', 'data-name': node.name,
    'aria-label': `${describe(node)}${shared ? both ? ', in both circuits' : ', in this circuit alone' : ''}`,
    transform: `translate(${x} ${y})`,
    click: () => pick(node.name),
    keydown: (event) => {
      if (event.key !== 'Enter' && event.key !== ' ') return;
      event.preventDefault();
      pick(node.name);
    },
  },
  ...nodeShapes(node));
  hover(item, () => [
    node.name, describe(node), `loss without it: ${signed(node.importance)} in the circuit`,
    `${plural(node.in.length, 'edge')} in, ${node.out.length} out`, ...(shared ? [both ? 'in both circuits' : 'in this circuit alone'] : []),
  ]);
  return item;
}

/** Shows all of both halves, which are as high as it takes, or, where that is too small to read, what is around a node. */
function fitHalves(halves) {
  const tall = d3.max(halves, ({ root, place: { left, right, top, low } }) => (
    (low - top + 110) * Math.max(leastScale(root), Math.min(1.4, root.clientWidth / (right - left)))));
  for (const { root } of halves) root.style.setProperty('--tall', `${tall.toFixed(0)}px`);
  halves.forEach(fitHalf);
}

/** Below this scale labels on a phone could not be read. */
const leastScale = (root) => (root.clientWidth < 600 ? 0.8 : 0);

function fitHalf({ root, zoom, place, first }, _, [half]) {
  const { left, right, top, low } = place;
  const { clientWidth: width, clientHeight: height } = root;
  const scale = Math.max(leastScale(root), Math.min(1.4, width / (right - left), height / (low - top + 76)));
  // Both halves begin at the same place.
  const x = width < scale * (right - left) - 1
    ? Math.max(left + width / scale / 2, Math.min(right - width / scale / 2, (half.place === place ? half.first : first).x)) : (left + right) / 2;
  d3.select(root).call(zoom.transform, d3.zoomIdentity.translate(width / 2, height / 2).scale(scale).translate(-x, -(top + low) / 2 + 20));
}
