// A whole run: how far its circuits share nodes and edges, and which circuits use a node.

const PARTS = [['nodes', 'nodes'], ['edges', 'edges']];
// Rows of the table of nodes before the others are asked for.
const USES_SHOWN = 60;
// Circuits from which on the matrix is set closer.
const MANY = 24;

/** Everything below the table of tasks. */
function drawWhole(state, change) {
  const counts = d3.rollups(data.tasks, (rows) => rows.length, (row) => row.status).sort((a, b) => d3.descending(a[1], b[1]));
  byId('statuses').replaceChildren(...counts.map(([status, count]) => el('li', {}, el('b', {}, String(count)), ` ${status}`)));
  byId('runs').hidden = RUNS.length < 2;
  if (RUNS.length > 1) byId('runs').replaceChildren(...RUNS.flatMap((each) => [el('dt', {}, each.run.name), el('dd', {}, aboutRun(each))]));
  byId('comparison').textContent = data.comparison ? comparisonText(data.comparison) : '';
  for (const id of ['overlap', 'uses', 'jumps']) byId(id).hidden = !data.overlap;
  if (!data.overlap) return;
  drawMatrix(state, change);
  drawUses(state, change);
}

function comparisonText({ tasks, target, edges, ratio }) {
  return `Over the ${plural(tasks, 'task')} with a circuit at ${target} in both runs, the geometric mean of edges is `
    + `${number(edges[0])} in ${RUNS[0].run.name} and ${number(edges[1])} in ${RUNS[1].run.name}, a ratio of ${number(ratio)}.`;
}

function listenToJumps() {
  for (const button of byId('jumps').children) {
    button.addEventListener('click', () => byId(button.dataset.to).scrollIntoView({ block: 'start' }));
  }
}

/** The address of two circuits side by side, or of one. */
const pairHref = (task, other, node = null) => fragment({ ...state, ...OF_CIRCUIT, task, with: task === other ? null : other, node });

/** What two circuits share, in a line. */
function sharedText(i, j, part) {
  const { names, expected } = data.overlap;
  const { shared, sizes, jaccard } = data.overlap[part];
  if (i === j) return `${names[i]}: ${plural(sizes[i], part.slice(0, -1))}`;
  if (shared[i][j] === null) return `${names[i]} and ${names[j]} are of different models`;
  const union = sizes[i] + sizes[j] - shared[i][j];
  const chance = part === 'nodes' ? `; were they drawn at random from the same locations, ${number(expected[i][j], 2)} would be` : '';
  return `${shared[i][j]} of ${plural(union, part.slice(0, -1))} are shared, a Jaccard index of ${jaccardText(jaccard[i][j])}${chance}`;
}

const jaccardText = (value) => (value === null ? '–' : value.toFixed(2));

function drawMatrix(state, change) {
  const { names } = data.overlap;
  const { jaccard, shared, sizes } = data.overlap[state.overlap];
  byId('overlap-part').replaceChildren(choice('Overlap of', PARTS, state.overlap, (overlap) => change({ overlap })));
  const name = (task) => el('a', { href: pairHref(task, task) }, task);
  const cell = (i, j) => {
    const value = jaccard[i][j];
    const isOwn = i === j;
    const anchor = el('a', { href: pairHref(names[i], names[j]), 'aria-label': `${names[i]} and ${names[j]}: ${sharedText(i, j, state.overlap)}` },
      isOwn ? String(sizes[i]) : shared[i][j] === null ? '·' : jaccardText(value));
    const item = el('td', { class: isOwn ? 'own' : value === null ? 'apart' : null, 'data-value': isOwn ? sizes[i] : value ?? '' }, anchor);
    if (!isOwn && value) item.style.setProperty('--depth', Math.sqrt(value).toFixed(3));
    hover(item, () => (isOwn ? [names[i]] : [`${names[i]} and ${names[j]}`]).concat(sharedText(i, j, state.overlap)));
    return item;
  };
  byId('matrix').classList.toggle('many', names.length > MANY);
  byId('matrix').replaceChildren(
    el('thead', {}, el('tr', {}, el('td', {}), ...names.map((task) => el('th', { scope: 'col' }, el('span', {}, name(task)))))),
    el('tbody', {}, ...names.map((task, i) => el('tr', {}, el('th', { scope: 'row' }, name(task)), ...names.map((_, j) => cell(i, j))))));
}

function drawUses(state, change) {
  const { names, models, uses } = data.overlap;
  const parsed = uses.map(([node, model, used]) => ({ ...parse(node, modelOf(names[used[0][0]])), group: model, used }));
  const locations = Object.keys(data.locations).filter((location) => parsed.some((node) => node.location === location));
  byId('location').replaceChildren(el('option', { value: '' }, 'all locations'), ...locations.map((location) => (
    el('option', { value: location, selected: location === state.location }, `${location}: ${data.locations[location].meaning}`))));
  byId('location').onchange = (event) => change({ location: event.target.value || null, all: false });
  const chosen = parsed.filter((node) => !state.location || node.location === state.location);
  const several = chosen.filter((node) => node.used.length > 1).length;
  byId('uses-text').textContent = `${plural(chosen.length, 'node')}, ${several} of them in more than one circuit. Beside a circuit: how much its loss grows without the node.`;
  const shown = state.all ? chosen : chosen.slice(0, USES_SHOWN);
  const isSeveral = new Set(models).size > 1;
  byId('uses-table').replaceChildren(
    el('thead', {}, el('tr', {}, ...['node', 'what', 'circuits', 'in'].map((title) => el('th', { scope: 'col' }, title)))),
    el('tbody', {}, ...shown.map((node) => el('tr', {},
      el('th', { scope: 'row' }, nodeLink(node, names[(node.used.find(([i]) => isOnPage(names[i], node.name)) ?? node.used[0])[0]], node.name)),
      el('td', { class: 'quiet' }, describe(node), isSeveral ? el('div', {}, `model of ${runOf(names[node.used[0][0]])}`) : null),
      el('td', { class: 'number' }, `${node.used.length} of ${models.filter((model) => model === node.group).length}`),
      el('td', {}, el('ul', { class: 'uses' }, ...node.used.map(([i, importance]) => el('li', {},
        nodeLink(node, names[i], names[i]), el('span', { class: 'number' }, ` ${signed(importance, 2)}`)))))))));
  byId('uses-table').csv = () => [
    ['node', 'circuit', 'loss without it in the circuit'],
    ...chosen.flatMap((node) => node.used.map(([i, importance]) => [node.name, names[i], importance])),
  ];
  byId('uses-more').hidden = shown.length === chosen.length;
  byId('uses-more').textContent = `Show all ${plural(chosen.length, 'node')}`;
  byId('uses-more').onclick = () => change({ all: true });
}

/** Whether the page has a node of a circuit, which `--max_nodes` may have cut off. */
const isOnPage = (task, node) => {
  const { nodes, total_nodes: total } = data.circuits[task];
  return nodes.length === total || circuitOf(task).byName.has(node);
};

const nodeLink = (node, task, text) => (isOnPage(task, node.name)
  ? el('a', { href: pairHref(task, null, node.name), title: describe(node) }, text)
  : el('span', { title: 'Not among the most important nodes, which alone are on this page' }, text));

const runOf = (task) => RUNS[data.circuits[task].run].run.name;
const modelOf = (task) => RUNS[data.circuits[task].run].run.model;
