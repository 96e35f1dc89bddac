// What a person adds to the graph: groups drawn as one box, names of nodes, pins.

const BOX = { width: 86, height: 28 };
// By characters, not by halves of them.
const clipped = (text, length) => ([...text].length > length ? `${[...text].slice(0, length - 1).join('')}…` : text);

/** Groups that are drawn as one box, with those of their nodes that are drawn: those with lines first, by importance. */
function closedGroups(circuit) {
  const drawn = new Set(circuit.nodes);
  return notesOf(circuit.task).groups.filter(({ open }) => !open).map((group) => ({
    group,
    nodes: group.nodes.map((name) => circuit.byName.get(name)).filter((node) => drawn.has(node)).sort((a, b) => Boolean(a.alone) - Boolean(b.alone) || a.rank - b.rank),
  })).filter(({ nodes }) => nodes.length);
}

/** A circuit with one node in the place of each closed group, to be laid out; `wide` are those. */
function folded(circuit) {
  const first = new Map(closedGroups(circuit).flatMap(({ nodes }) => nodes.map((node) => [node, nodes[0]])));
  if (!first.size) return circuit;
  const end = (node) => first.get(node) ?? node;
  const between = (lines) => lines.map((line) => ({ ...line, source: end(line.source), target: end(line.target) }))
    .filter(({ source, target }) => source !== target);
  return {
    ...circuit, nodes: circuit.nodes.filter((node) => end(node) === node),
    edges: between(circuit.edges), streams: between(circuit.streams), wide: new Set(first.values()),
  };
}

/** Gives the nodes of closed groups the place of their box. */
function unfold(circuit) {
  for (const { nodes } of closedGroups(circuit)) {
    for (const node of nodes) Object.assign(node, { x: nodes[0].x, y: nodes[0].y });
  }
}

/** Draws the boxes of closed groups over their nodes, which are hidden, and hides the lines inside. */
function drawBoxes(circuit, layer) {
  const boxOf = new Map();
  graph.boxes = new Map();
  for (const { group, nodes } of closedGroups(circuit)) {
    const box = svg('g', {
      class: 'node group', role: 'button', tabindex: 0, 'data-group': group.name, 'data-name': nodes[0].name,
      'aria-label': `Group ${group.name} of ${plural(nodes.length, 'node')}`, transform: `translate(${nodes[0].x} ${nodes[0].y})`,
    },
    svg('rect', { x: -BOX.width / 2, y: -BOX.height / 2, width: BOX.width, height: BOX.height, rx: 6 }),
    svg('text', { class: 'name', 'text-anchor': 'middle', y: -1 }, clipped(group.name, 12)),
    svg('text', { class: 'size', 'text-anchor': 'middle', y: 10 }, plural(nodes.length, 'node')));
    const inside = new Set(nodes);
    graph.texts.set(box, () => [group.name, `${plural(nodes.length, 'node')}: ${nodes.map(({ name }) => name).join(', ')}`,
      `${crossing(nodes, inside, 'in').length} edges in, ${crossing(nodes, inside, 'out').length} out`]);
    graph.boxes.set(group.name, { box, nodes });
    for (const node of nodes) {
      graph.items.get(node.name).classList.add('inside');
      boxOf.set(node, box);
    }
    layer.append(box);
  }
  for (const { line, source, target } of graph.lines) {
    if (boxOf.size && boxOf.has(source) && boxOf.get(source) === boxOf.get(target)) line.classList.add('inside');
  }
}

/** Edges from, or to, what is outside of a group. */
const crossing = (nodes, inside, way) => nodes.flatMap((node) => node[way])
  .filter((edge) => !inside.has(way === 'in' ? edge.source : edge.target))
  .sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));

/** The element that stands for a node: its own, or the box that it is in. */
function elementOf(node) {
  const item = graph.items.get(node.name);
  if (!item?.classList.contains('inside')) return item;
  return [...graph.boxes.values()].find(({ nodes }) => nodes.includes(node)).box;
}

/** The nodes that the element of a node stands for. */
const boxedWith = (node) => [...graph.boxes.values()].find(({ nodes }) => nodes.includes(node))?.nodes ?? [node];

/** Shows names and pins, and makes boxes look as their nodes would; after `paintGraph`. */
function paintNotes(circuit, { group: chosen }) {
  const { labels, pins, groups } = notesOf(circuit.task);
  for (const each of byId('graph').querySelectorAll('.label, .pin')) each.remove();
  const members = new Set(groups.filter(({ open }) => open).flatMap(({ nodes }) => nodes));
  for (const [name, item] of graph.items) item.classList.toggle('member', members.has(name));
  for (const [name, label] of Object.entries(labels)) {
    graph.items.get(name)?.append(svg('text', { class: 'label', 'text-anchor': 'middle', y: NODE.height / 2 + 11 }, clipped(label, 26)));
  }
  for (const name of pins) {
    graph.items.get(name)?.append(svg('rect', { class: 'pin', x: NODE.width / 2 - 6, y: -NODE.height / 2 - 3, width: 8, height: 8, rx: 4 }));
  }
  // Those that have lost their name too.
  for (const name of new Set([...graph.named, ...Object.keys(labels)])) {
    graph.items.get(name)?.setAttribute('aria-label', spoken(circuit.byName.get(name)));
  }
  graph.named = Object.keys(labels);
  for (const [name, { box, nodes }] of graph.boxes) {
    const items = nodes.map((node) => graph.items.get(node.name));
    for (const mark of ['gone', 'dim']) box.classList.toggle(mark, items.every((item) => item.classList.contains(mark)));
    box.classList.toggle('edited', items.some((item) => item.classList.contains('edited')));
    const selected = name === chosen || items.some((item) => item.classList.contains('selected'));
    box.classList.toggle('selected', selected);
    box.setAttribute('aria-pressed', String(selected));
  }
}

/** Gives a group another name, without drawing the graph anew. */
function renameGroup(group, name) {
  const own = graph.boxes.get(group.name);
  group.name = name;
  if (!own) return;
  graph.boxes = new Map([...graph.boxes].map(([key, each]) => [each === own ? name : key, each]));
  own.box.dataset.group = name;
  own.box.querySelector('.name').textContent = clipped(name, 12);
}

/** The circuit of pinned nodes alone. */
function pinnedPart(circuit) {
  const pinned = new Set(notesOf(circuit.task).pins);
  return restricted(circuit, ({ name }) => pinned.has(name));
}
