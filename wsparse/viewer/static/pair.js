// Two circuits side by side: tasks, seeds or runs. Only those of one model have nodes in common.

const HALVES = ['left', 'right'];
const SHARED_SHOWN = 100;
// What is drawn: the names of both circuits, and their halves.
const pair = { drawn: null, halves: [] };

/** What two circuits of one model have in common; null for those of different models. */
function inCommon(first, second) {
  const { names, models } = data.overlap;
  const [i, j] = [first, second].map(({ task }) => names.indexOf(task));
  if (models[i] !== models[j]) return null;
  const edges = new Set(second.edges.map(lineName));
  return {
    i, j, nodes: new Set(first.nodes.map((node) => node.name).filter((name) => second.byName.has(name))),
    edges: new Set(first.edges.map(lineName).filter((name) => edges.has(name))),
  };
}

function drawPair(first, second, state, change) {
  const both = [first, second];
  const shared = inCommon(first, second);
  const key = JSON.stringify(both.map(({ task }) => task));
  if (pair.drawn !== key) {
    pair.drawn = key;
    openPair(both, shared, change);
  }
  for (const { items } of pair.halves) {
    for (const [name, item] of items) {
      item.classList.toggle('selected', name === state.node);
      item.setAttribute('aria-pressed', String(name === state.node));
    }
  }
  byId('pair-node').replaceChildren(...selectedNode(both, shared, state));
}

/** The list of circuits that can stand beside the one that is shown. */
function paintBeside() {
  const others = Object.keys(data.circuits).filter((task) => task !== state.task);
  byId('beside').hidden = !state.task || !data.overlap;
  byId('with').replaceChildren(el('option', { value: '' }, 'nothing'),
    ...others.map((task) => el('option', { value: task, selected: task === state.with }, task)));
}

/** Shows another circuit; one that stood on the right changes places with that on the left. */
function chooseTask(task) {
  const beside = task && state.with === task ? state.task : state.with;
  change({ task, ...(task ? { with: beside } : OF_CIRCUIT) }, true);
}

/** The selection that stays when another circuit is put beside the one that is shown. */
function inBoth(other) {
  const stays = [state.task, other].some((task) => task && circuitOf(task).byName.has(state.node));
  return { ...NOTHING, node: stays ? state.node : null };
}

function openPair(both, shared, change) {
  const shown = both.map((circuit) => (circuit.large ? part(circuit, LARGE) : circuit));
  byId('pair-note').replaceChildren(...pairNotes(both, shared, shown).map((text) => el('p', { class: 'note' }, text)));
  byId('pair-legend').hidden = !shared;
  const places = placesOf(...shown, Boolean(shared));
  pair.halves = HALVES.map((half, k) => {
    byId(`${half}-title`).replaceChildren(el('a', { href: pairHref(both[k].task, null), title: 'Open this circuit alone' }, both[k].task));
    byId(half).setAttribute('aria-label', `Circuit of ${both[k].task}`);
    return drawHalf(byId(half), shown[k], places[k], shared, {
      pick: (node) => change({ node: node === state.node ? null : node }, true),
      // Places that agree are looked at together.
      zoomed: (transform) => {
        const other = pair.halves[1 - k];
        if (shared) d3.select(other.root).call(other.zoom.transform, transform);
      },
    });
  });
  fitHalves(pair.halves);
  byId('pair-sizes').replaceChildren(...sizesTable(both, shared));
  byId('pair-nodes').replaceChildren(...(shared ? nodeTables(both, shared) : [locationTable(both)]));
}

function pairNotes(both, shared, shown) {
  const notes = [];
  if (!shared) notes.push('These circuits are of different models. A name such as 0.attn.v.21 means another node in each, so no node is shown as shared.');
  for (const circuit of both) {
    if (circuit.large) notes.push(`Of ${circuit.task} the ${LARGE} most important nodes are drawn, of ${circuit.nodes.length.toLocaleString('en')}.`);
    for (const note of circuit.notes) notes.push(`${circuit.task}: ${note}`);
  }
  for (const { task, edges } of shown) {
    if (edges.length > MAX_EDGES) notes.push(`Of the edges of ${task} the ${MAX_EDGES.toLocaleString('en')} largest are drawn, of ${edges.length.toLocaleString('en')}.`);
  }
  return notes;
}

function sizesTable(both, shared) {
  // What a row shows, and what of it a file has.
  const rows = [
    ['status', ({ status }) => status], ['loss alone', (each) => `${loss(each.loss)} (target ${number(each.target)})`, (each) => each.loss],
    ...['nodes', 'edges'].map((part) => [part, ({ counts }) => counts[part].toLocaleString('en'), ({ counts }) => counts[part]]),
  ];
  if (RUNS.length > 1) rows.unshift(['run', ({ run }) => RUNS[run].run.name]);
  return [
    el('thead', {}, el('tr', {}, el('td', {}), ...both.map(({ task }) => el('th', { scope: 'col' }, task)))),
    el('tbody', {}, ...rows.map(([title, shown, value = shown]) => el('tr', {}, el('th', { scope: 'row' }, title),
      ...both.map((each) => el('td', { 'data-value': value(each) }, shown(each))))),
      ...(shared ? PARTS.map(([part]) => el('tr', {}, el('th', { scope: 'row' }, `shared ${part}`),
        el('td', { colspan: 2 }, sharedText(shared.i, shared.j, part)))) : [])),
  ];
}

/** What is selected, in both circuits or in the one that has it. */
function selectedNode(both, shared, state) {
  const having = both.filter((circuit) => circuit.byName.has(state.node));
  if (!having.length) return [el('p', { class: 'quiet' }, 'Click a node for what it is in either circuit.')];
  return having.map((circuit, k) => {
    const node = circuit.byName.get(state.node);
    const where = shared && having.length > 1 ? k ? null : el('p', {}, el('code', {}, node.name), ` ${describe(node)}, in both circuits`)
      : el('p', {}, el('code', {}, node.name), ` ${describe(node)}${shared ? ', in this circuit alone' : ''}`);
    return el('div', {}, where, el('p', {}, el('a', { href: pairHref(circuit.task, null, node.name) }, `open it in ${circuit.task}`),
      el('span', { class: 'quiet' }, ` loss without it ${signed(node.importance)}, ${plural(node.in.length, 'edge')} in, ${node.out.length} out`)));
  });
}

function nodeTables([first, second], shared) {
  const rank = (name) => -Math.max(first.byName.get(name).importance, second.byName.get(name).importance);
  const names = [...shared.nodes].sort((a, b) => d3.ascending(rank(a), rank(b)));
  const only = (circuit, other) => {
    const own = circuit.nodes.filter((node) => !other.byName.has(node.name));
    return el('div', {}, el('h3', {}, `Only in ${circuit.task}: ${plural(own.length, 'node')}${cutAt(own, SHARED_SHOWN)}`),
      el('ol', { class: 'uses names' }, ...own.slice(0, SHARED_SHOWN).map((node) => el('li', {},
        el('a', { href: pairHref(first.task, second.task, node.name), title: describe(node) }, node.name),
        el('span', { class: 'number' }, ` ${signed(node.importance, 2)}`)))));
  };
  const table = names.length ? el('table', { class: 'plain' },
    el('thead', {}, el('tr', {}, ...['node', 'what', first.task, second.task].map((title) => el('th', { scope: 'col' }, title)))),
    el('tbody', {}, ...names.slice(0, SHARED_SHOWN).map((name) => el('tr', {},
      el('th', { scope: 'row' }, el('a', { href: pairHref(first.task, second.task, name) }, name)),
      el('td', { class: 'quiet' }, describe(first.byName.get(name))),
      ...[first, second].map((circuit) => el('td', { class: 'number' }, signed(circuit.byName.get(name).importance))))))) : null;
  if (table) {
    table.csv = () => [['node', 'what', first.task, second.task],
      ...names.map((name) => [name, describe(first.byName.get(name)), ...[first, second].map((circuit) => circuit.byName.get(name).importance)])];
  }
  return [
    el('div', {}, el('h3', {}, `In both circuits: ${plural(names.length, 'node')}${cutAt(names, SHARED_SHOWN)}`),
      el('p', { class: 'quiet' }, 'How much the loss grows when the node alone is removed from the circuit.'), table),
    only(first, second), only(second, first),
  ];
}

/** How many nodes either has at each location: what can be compared between different models. */
function locationTable(both) {
  const counts = both.map((circuit) => d3.rollup(circuit.nodes, (nodes) => nodes.length, (node) => node.location));
  const title = both.some((circuit) => circuit.notes.length) ? 'Nodes by location, of those shown' : 'Nodes by location';
  return el('div', {}, el('h3', {}, title), el('table', { class: 'plain' },
    el('thead', {}, el('tr', {}, ...['location', 'what', ...both.map(({ task }) => task)].map((text) => el('th', { scope: 'col' }, text)))),
    el('tbody', {}, ...Object.entries(data.locations).map(([location, { meaning }]) => el('tr', {},
      el('th', { scope: 'row' }, location), el('td', { class: 'quiet' }, meaning),
      ...counts.map((of) => el('td', { class: 'number' }, String(of.get(location) ?? 0))))))));
}
