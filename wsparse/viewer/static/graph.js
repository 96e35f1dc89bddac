// The circuit as a graph: drawing, hovering, selecting, zooming, and moving about by keys.

// More edges than this would make the browser slow; the largest are drawn.
const MAX_EDGES = 5000;

// `circuit` is the part that is drawn; `items` are the nodes' elements; `texts` says what an element shows;
// `selection` are the names of the selected node, or of the ends of the selected edge.
const graph = {
  circuit: null, place: null, zoom: null, items: new Map(), boxes: new Map(), named: [], lines: [], bundles: [],
  texts: new WeakMap(), reached: null, near: null, chosen: null, selection: [], edge: null,
};

/** Draws a circuit, or a part of one; returns how many of its edges. */
function drawGraph(circuit, actions) {
  const root = byId('graph');
  root.replaceChildren();
  root.setAttribute('aria-label', `Circuit of ${circuit.task}: arrow keys move among its nodes`);
  const place = arrange(folded(circuit));
  unfold(circuit);
  Object.assign(graph, {
    circuit, place, items: new Map(), lines: [], named: [], reached: null, near: null, chosen: null, ...actions,
  });
  const world = svg('g');
  root.append(world);
  world.append(...place.blocks.flatMap((each) => block(each, place.top, place.bottom)));
  world.append(...place.columns.map((column) => svg('text', {
    class: 'column', x: column.x, y: place.top - 12, 'text-anchor': 'middle',
  }, column.title)));
  world.append(...place.heads.flatMap(headBox), ...drawTray(place), ...ENDS.map(drawEnd));
  const streamLayer = svg('g', { class: 'streams' });
  const edgeLayer = svg('g', { class: 'edges' });
  const nodeLayer = svg('g', { class: 'nodes' });
  for (const stream of circuit.streams) {
    const span = streamSpan(stream);
    const line = svg('path', { d: curve(...span), class: 'stream' });
    graph.texts.set(line, () => streamText(stream));
    graph.lines.push({ ...stream, line, span, stream: true });
    streamLayer.append(line);
  }
  const drawn = circuit.edges.slice(0, MAX_EDGES);
  // The largest weights are drawn last, on top.
  for (const edge of [...drawn].reverse()) {
    const span = [edge.source.x + NODE.width / 2, edge.source.y, edge.target.x - NODE.width / 2, edge.target.y];
    const line = svg('path', {
      d: curve(...span), class: edge.weight < 0 ? 'edge negative' : 'edge positive',
      'stroke-width': widthOf(edge, circuit.largestWeight),
    });
    graph.texts.set(line, () => [`${edge.source.name} → ${edge.target.name}`, `weight ${exact(edge.weight)}`]);
    line.dataset.edge = `${edge.source.name}>${edge.target.name}`;
    graph.lines.push({ ...edge, line, span, stream: false });
    edgeLayer.append(line);
  }
  for (const node of circuit.nodes) nodeLayer.append(drawNode(node));
  drawBoxes(circuit, nodeLayer);
  const [bands, handles] = drawBundles();
  world.append(streamLayer, bands, edgeLayer, handles, nodeLayer);

  graph.zoom = d3.zoom().scaleExtent([0.02, 8]).on('zoom', (event) => {
    world.setAttribute('transform', event.transform);
    hideTip();
    // Only what a person does is written to the address.
    if (event.sourceEvent) graph.moved();
  });
  d3.select(root).call(graph.zoom).on('dblclick.zoom', null);
  reach(circuit.nodes[0]);
  return drawn.length;
}

const widthOf = ({ weight }, largest) => 0.8 + 5.2 * Math.abs(weight) / largest;

const block = ({ title, left, right }, top, bottom) => [
  svg('rect', { class: 'block', x: left, y: top - 48, width: right - left, height: bottom - top + 58, rx: 8 }),
  svg('text', { class: 'block', x: (left + right) / 2, y: top - 32, 'text-anchor': 'middle' }, title),
];

function headBox({ head, left, right, top, bottom }) {
  const half = NODE.width / 2 + 7;
  const up = top - NODE.height / 2 - 5;
  return [
    svg('rect', {
      class: 'head', x: left - half, y: up, width: right - left + 2 * half, height: bottom + NODE.height / 2 + 5 - up, rx: 6,
    }),
    svg('text', { class: 'head', x: right + half - 2, y: up - 2, 'text-anchor': 'end' }, `head ${head}`),
  ];
}

/** The bar of the embedding, or of the unembedding. */
function drawEnd(end, i) {
  const item = svg('g', { class: 'end', role: 'button', tabindex: 0, 'data-end': end, 'aria-pressed': 'false', 'aria-label': end },
    ...endShapes(end, graph.place.ends[i], graph.place));
  graph.texts.set(item, () => [end, 'click for its entries for the tokens of the task']);
  return item;
}

function endShapes(title, x, { top, bottom }) {
  const middle = (top + bottom) / 2;
  return [
    svg('rect', { x: x - 7, y: top, width: 14, height: bottom - top, rx: 4 }),
    svg('text', { x, y: middle, 'text-anchor': 'middle', dy: '0.35em', transform: `rotate(-90 ${x} ${middle})` }, title),
  ];
}

const nodeShapes = (node) => [
  svg('rect', { x: -NODE.width / 2, y: -NODE.height / 2, width: NODE.width, height: NODE.height, rx: node.inHead ? 4 : 10 }),
  svg('text', { 'text-anchor': 'middle', dy: '0.35em' }, node.label),
];

function drawNode(node) {
  const strength = Math.sqrt(Math.max(0, node.importance) / graph.circuit.largestImportance);
  const item = svg('g', {
    class: `node${isConstant(node) ? ' constant' : strength > 0.55 ? ' strong' : ''}`, role: 'button', tabindex: -1, 'aria-pressed': 'false',
    'data-name': node.name,
    'aria-label': spoken(node),
    transform: `translate(${node.x} ${node.y})`,
  },
  ...nodeShapes(node));
  item.style.setProperty('--strength', strength.toFixed(3));
  graph.texts.set(item, () => nodeText(node));
  graph.items.set(node.name, item);
  return item;
}

/** What is said of a node where it cannot be seen. */
function spoken(node) {
  const name = nameOf(node);
  return `${name ? `${name}: ` : ''}${describe(node)}; the loss grows by ${number(node.importance)} without it`;
}

function nodeText(node) {
  return [
    node.name, ...[nameOf(node)].filter(Boolean), describe(node),
    `loss without it: ${signed(node.importance)} in the circuit, ${signed(node.from_model)} in the whole model`,
    `${plural(node.in.length, 'edge')} in, ${node.out.length} out`,
    ...(isConstant(node) ? [node.constant ? 'constant: the same at every token of the prompts' : 'constant: nothing leads to it'] : []),
  ];
}

function streamText({ source, target }) {
  const channel = (source ?? target).channel;
  return [`residual channel ${channel}: ${source?.name ?? 'embedding'} → ${target?.name ?? 'unembedding'}`];
}

function curve(x0, y0, x1, y1) {
  const middle = (x0 + x1) / 2;
  return `M${x0.toFixed(1)},${y0.toFixed(1)}C${middle.toFixed(1)},${y0.toFixed(1)} ${middle.toFixed(1)},${y1.toFixed(1)} ${x1.toFixed(1)},${y1.toFixed(1)}`;
}

/** Where a stretch of residual stream begins and ends. */
function streamSpan({ source, target }) {
  const { ends } = graph.place;
  if (!source) return [ends[0] + 7, target.y, target.x - NODE.width / 2, target.y];
  if (!target) return [source.x + NODE.width / 2, source.y, ends[1] - 7, source.y];
  return [source.x + NODE.width / 2, source.y, target.x - NODE.width / 2, target.y];
}

/** Shows what the state says: which nodes, which is selected, whether the residual stream is drawn. */
function paintGraph({ keep, node, edge, group, residual, end, open }) {
  const { circuit } = graph;
  const shown = (each) => !each || each.rank < keep;
  // What the slider hides does not dim the others.
  const selected = node && shown(circuit.byName.get(node)) && graph.items.has(node) ? node : null;
  const ends = !node && edge ? edge.split('>') : null;
  const members = new Set(graph.boxes.get(group)?.nodes.filter(shown).map(({ name }) => name)
    ?? notesOf(circuit.task).groups.find(({ name }) => name === group)?.nodes.filter((name) => graph.items.has(name)));
  const chosen = Boolean(selected) || members.size > 0 || Boolean(end)
    || Boolean(ends?.every((name) => graph.items.has(name) && shown(circuit.byName.get(name))));
  const near = new Set(selected ? [selected] : members.size ? members : ends ?? []);
  Object.assign(graph, { edge, selection: [...near].filter((name) => graph.items.has(name)) });
  for (const { source, target, line, stream } of graph.lines) {
    const visible = shown(source) && shown(target) && (!stream || residual);
    const touches = selected ? source?.name === selected || target?.name === selected
      : members.size ? members.has(source?.name) || members.has(target?.name)
        : end ? !(end === 'embedding' ? source : target) : chosen && line.dataset.edge === edge;
    line.classList.toggle('gone', !visible);
    line.classList.toggle('dim', chosen && !touches);
    line.classList.toggle('lit', chosen && touches);
    if ((selected || members.size || end) && visible && touches) near.add(source?.name).add(target?.name);
  }
  for (const each of circuit.nodes) {
    const item = graph.items.get(each.name);
    item.classList.toggle('gone', !shown(each));
    item.classList.toggle('dim', chosen && !near.has(each.name));
    item.classList.toggle('selected', each.name === selected);
    item.setAttribute('aria-pressed', String(each.name === selected));
  }
  for (const item of byId('graph').querySelectorAll('.end')) {
    item.classList.toggle('selected', item.dataset.end === end);
    item.setAttribute('aria-pressed', String(item.dataset.end === end));
  }
  standOut('chosen', ends && chosen ? graph.lines.find(({ line }) => line.dataset.edge === edge)?.line ?? null : null);
  paintBundles(open);
  if (selected) reach(circuit.byName.get(selected));
  if (isHidden(graph.reached)) reach(circuit.nodes.find((each) => !isHidden(each)) ?? graph.reached);
}

/** Whether a node's own element is not drawn: the slider hides it, or it is in a box. */
const isHidden = (node) => ['gone', 'inside'].some((mark) => graph.items.get(node.name).classList.contains(mark));

/** One node at a time can be reached by Tab; arrows go on from there. */
function reach(node) {
  graph.items.get(graph.reached?.name)?.setAttribute('tabindex', -1);
  graph.items.get(node.name).setAttribute('tabindex', 0);
  graph.reached = node;
}

/** What happens in the graph, whatever is drawn: one listener for all nodes and lines. */
function listenToGraph() {
  const root = byId('graph');
  const nodeOf = (event) => graph.circuit.byName.get(event.target.closest('.node')?.dataset.name);
  root.addEventListener('click', (event) => {
    const { group, name } = event.target.closest('.node')?.dataset ?? {};
    if (!event.shiftKey) choose(pointedAt(event));
    else if (name) graph.pin(group ? graph.boxes.get(group).nodes.map((node) => node.name) : [name]);
  });
  root.addEventListener('pointermove', (event) => {
    const item = pointedAt(event);
    const text = graph.texts.get(item);
    standOut('near', item?.matches('.edge') ? item : null);
    root.classList.toggle('pointing', Boolean(item && !item.matches('.stream')));
    if (text) tip(text(), event);
    else hideTip();
  });
  root.addEventListener('pointerleave', () => {
    standOut('near', null);
    hideTip();
  });
  root.addEventListener('focusin', (event) => {
    const node = nodeOf(event);
    const item = event.target.closest('.handle, .band, .end');
    if (item?.matches(':focus-visible')) tip(graph.texts.get(item)(), item.getBoundingClientRect());
    if (!node) return;
    reach(node);
    showInView(node);
    if (event.target.matches(':focus-visible')) tip(graph.texts.get(event.target.closest('.node'))(), event.target.getBoundingClientRect());
  });
  root.addEventListener('focusout', hideTip);
  root.addEventListener('keydown', (event) => {
    const node = nodeOf(event);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (node) nodeKey(event, node);
    else if (event.key === 'Enter' || event.key === ' ') {
      event.preventDefault();
      choose(event.target.closest('.handle, .band, .end'));
    }
  });
}

/** What a click would choose: a node, a band's label, an edge close by, a band, an end, a stretch of residual stream. */
function pointedAt(event) {
  const { target } = event;
  const item = target.closest('.node, .handle');
  if (item) return item;
  const line = lineNear(event);
  return line?.matches('.edge') ? line : target.closest('.handle, .band, .end') ?? line;
}

function choose(item) {
  const { name = null, edge = null, end = null, group, bundle } = item?.dataset ?? {};
  if (bundle) graph.toggle(bundle);
  else if (group) graph.selectGroup(group);
  else graph.select({ node: name, edge, end });
}

function nodeKey(event, node) {
  if (event.key === 'Enter' || event.key === ' ') {
    event.preventDefault();
    choose(event.target.closest('.node'));
    byId('panel').focus({ preventScroll: true });
    return;
  }
  if (event.key === 'e' || event.key === 'E') {
    const edge = nextEdge(node, graph.edge, event.key === 'e' ? 1 : -1);
    if (edge && edge !== graph.edge) graph.select({ edge });
    return;
  }
  if (event.key === 'f') {
    const other = otherEnd(node, graph.edge);
    if (other) elementOf(other).focus();
    return;
  }
  const next = neighbor(node, event.key);
  if (next === undefined) return;
  event.preventDefault();
  if (next) elementOf(next).focus();
}

/** The node that an arrow leads to; null where there is none, undefined for other keys. */
function neighbor(node, key) {
  const visible = (each) => !elementOf(each).classList.contains('gone');
  const columns = graph.place.columns.map((column) => column.nodes.filter(visible)).filter((nodes) => nodes.length);
  const at = columns.findIndex((nodes) => nodes.includes(node));
  const nearest = (nodes, cost) => d3.least(nodes ?? [], cost) ?? null;
  const vertical = (sign) => nearest(columns[at].filter((each) => sign * (each.y - node.y) > 1),
    (each) => Math.abs(each.y - node.y) + 2 * Math.abs(each.x - node.x));
  const sideways = (sign) => nearest(
    columns[at].filter((each) => Math.abs(each.y - node.y) < 1 && sign * (each.x - node.x) > 0), (each) => sign * each.x,
  ) ?? nearest(columns[at + sign], (each) => Math.abs(each.y - node.y) + 1e-3 * Math.abs(each.x - node.x));
  switch (key) {
    case 'ArrowUp': return vertical(-1);
    case 'ArrowDown': return vertical(1);
    case 'ArrowLeft': return sideways(-1);
    case 'ArrowRight': return sideways(1);
    case 'Home': return columns[0][0];
    case 'End': return columns.at(-1).at(-1);
    default: return undefined;
  }
}

const graphSize = () => {
  const { clientWidth, clientHeight } = byId('graph');
  return [clientWidth || 800, clientHeight || 500];
};

/** The transform that shows everything. */
function fitting() {
  const [width, height] = graphSize();
  const { left, right, top, low } = graph.place;
  const scale = Math.min(1.6, width / (right - left), height / (low - top + 76));
  return { scale, x: (left + right) / 2, y: (top + low) / 2 - 20 };
}

// Below this scale a label is less than 11 pixels high.
const READABLE = 0.88;
// Room for the nodes themselves and what is written above them, and pixels for the buttons below.
const AROUND = { x: 90, y: 96 };
const BUTTONS = 44;

/** What is selected, or the most important node that has lines, and the nodes around it. */
function neighborhood() {
  const { nodes: [first], nodes: ranked } = graph.circuit;
  const names = new Set(graph.selection.length ? graph.selection : [(ranked.find((node) => !node.alone) ?? first).name]);
  const around = graph.lines.filter(({ source, target, line }) => (
    !line.classList.contains('gone') && (names.has(source?.name) || names.has(target?.name))));
  const nodes = new Set([...names].map((name) => graph.circuit.byName.get(name)));
  const core = [...nodes];
  for (const { source, target } of around) for (const node of [source, target]) if (node) nodes.add(node);
  return { core, nodes: [...nodes] };
}

/** The view that a circuit opens with: everything, or on a phone what is around the selected node, with labels that can be read. */
function opening() {
  const all = fitting();
  const [width, height] = graphSize();
  if (all.scale >= READABLE || width > 600) return all;
  const free = height - BUTTONS;
  const { core, nodes } = neighborhood();
  const extent = (some, axis) => d3.extent(some, (node) => node[axis]);
  const sizes = ['x', 'y'].map((axis) => extent(nodes, axis)[1] - extent(nodes, axis)[0] + AROUND[axis]);
  const scale = Math.max(READABLE, Math.min(1.2, width / sizes[0], free / sizes[1]));
  const middle = (axis, room, size) => {
    const [from, to] = extent(nodes, axis);
    const own = d3.mean(extent(core, axis));
    // What does not fit is cut off far from the node.
    const half = (room / scale - AROUND[axis]) / 2;
    return size * scale <= room ? (from + to) / 2 : Math.max(from + half, Math.min(to - half, own));
  };
  return { scale, x: middle('x', width, sizes[0]), y: middle('y', free, sizes[1]) - 12 + BUTTONS / 2 / scale };
}

/** The view of everything; null where a circuit opens with it. */
function everything() {
  const { scale, x, y } = fitting();
  return opening().scale === scale ? null : [1, x, y];
}

/** Shows a view: scale relative to all of the circuit, and the point in the middle. Null is `opening`. */
function setView(view) {
  const [width, height] = graphSize();
  const [all, start] = [fitting(), opening()];
  const [scale, x, y] = view ? [all.scale * view[0], view[1], view[2]] : [start.scale, start.x, start.y];
  const transform = d3.zoomIdentity.translate(width / 2, height / 2).scale(scale).translate(-x, -y);
  d3.select(byId('graph')).call(graph.zoom.transform, transform);
}

function getView() {
  const [width, height] = graphSize();
  const transform = d3.zoomTransform(byId('graph'));
  const [x, y] = transform.invert([width / 2, height / 2]);
  return [transform.k / fitting().scale, x, y];
}

function zoomBy(factor) {
  d3.select(byId('graph')).call(graph.zoom.scaleBy, factor);
  graph.moved();
}

/** Pans as little as it takes to see a node. */
function showInView(node) {
  const [width, height] = graphSize();
  const transform = d3.zoomTransform(byId('graph'));
  const [x, y] = transform.apply([node.x, node.y]);
  const margin = Math.min(40, width / 4, height / 4);
  const dx = Math.max(0, margin - x) - Math.max(0, x - (width - margin));
  const dy = Math.max(0, margin - y) - Math.max(0, y - (height - margin));
  if (!dx && !dy) return;
  d3.select(byId('graph')).call(graph.zoom.translateBy, dx / transform.k, dy / transform.k);
  graph.moved();
}

/** Lines of text beside the pointer, or beside a rectangle. */
function tip(lines, at) {
  const box = byId('tip');
  box.replaceChildren(...lines.map((line) => el('div', {}, line)));
  box.hidden = false;
  const x = at.right ?? at.clientX;
  const y = at.bottom ?? at.clientY;
  const { offsetWidth, offsetHeight } = box;
  box.style.left = `${Math.max(4, Math.min(x + 12, window.innerWidth - offsetWidth - 8))}px`;
  box.style.top = `${y + 14 + offsetHeight > window.innerHeight ? y - offsetHeight - 10 : y + 14}px`;
}

function hideTip() {
  byId('tip').hidden = true;
}

function hover(element, lines) {
  element.addEventListener('pointermove', (event) => tip(lines(), event));
  element.addEventListener('pointerleave', hideTip);
}
