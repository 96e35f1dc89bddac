// The state of the view, which is the fragment of the address, and what is drawn for it.

const START = {
  task: data.opens, node: null, edge: null, keep: null, pair: 0, second: 0, side: 'model', residual: true, view: null,
  try: false, prompt: null, edits: '', end: null, open: '',
  sort: 'edges', order: 'up', theme: 'auto',
};
const THEMES = ['auto', 'light', 'dark'];
const state = { ...START };
let drawn = null;

/** What a fragment says, with what is not possible replaced by the start. */
function read(fragment) {
  const given = new URLSearchParams(fragment.replace(/^#/, ''));
  const found = { ...START };
  const task = given.get('task');
  if (given.has('task')) found.task = Object.hasOwn(data.circuits, task) ? task : null;
  const circuit = found.task && circuitOf(found.task);
  const within = (name, from, to) => {
    const value = Number(given.get(name));
    return given.has(name) && Number.isInteger(value) && value >= from && value <= to ? value : START[name];
  };
  if (circuit) {
    if (circuit.byName.has(given.get('node'))) found.node = given.get('node');
    else if (edgeOf(circuit, given.get('edge'))) found.edge = given.get('edge');
    else if (ENDS.includes(given.get('end'))) found.end = given.get('end');
    found.open = given.get('open') ?? '';
    found.keep = within('keep', 1, circuit.nodes.length);
    found.pair = within('pair', 0, circuit.rows.length / 2 - 1);
    found.second = within('second', 0, 1);
    found.try = given.get('try') === 'true' && canRun(circuit);
    if (given.has('prompt')) found.prompt = given.get('prompt').slice(0, MAX_PROMPT);
    found.edits = writeEdits(readEdits(circuit, given.get('edits')));
    const view = (given.get('view') ?? '').split(',').map(Number);
    if (view.length === 3 && view.every(Number.isFinite) && view[0] > 0) found.view = view;
  }
  if (given.get('side') === 'circuit') found.side = 'circuit';
  found.residual = given.get('residual') !== 'false';
  if (TABLE.some(([key]) => key === given.get('sort'))) found.sort = given.get('sort');
  if (given.get('order') === 'down') found.order = 'down';
  if (THEMES.includes(given.get('theme'))) found.theme = given.get('theme');
  return found;
}

function fragment(values) {
  const parts = new URLSearchParams();
  for (const [name, start] of Object.entries(START)) {
    const value = name === 'view' && values.view
      ? `${values.view[0].toPrecision(4)},${values.view[1].toFixed(0)},${values.view[2].toFixed(0)}` : values[name];
    if (value !== start) parts.set(name, value);
  }
  return `#${parts}`;
}

// What belongs to one circuit alone.
const OF_CIRCUIT = Object.fromEntries(
  ['node', 'edge', 'keep', 'view', 'pair', 'second', 'try', 'prompt', 'edits', 'end', 'open'].map((name) => [name, START[name]]),
);
const hrefOf = (task) => fragment({ ...state, ...OF_CIRCUIT, task });

/** Writes the state to the address. */
function address(step = false) {
  try {
    history[step ? 'pushState' : 'replaceState'](null, '', fragment(state));
  } catch {
    // A page in the `srcdoc` of a frame has no address of its own.
  }
}

/** Changes the state, the address and the page; `step` makes the back button return to what was before. */
function change(changes, step = false) {
  const task = changes.task ?? state.task;
  if (changes.task && task !== state.task) Object.assign(state, OF_CIRCUIT);
  if (changes.node) Object.assign(state, { edge: null, end: null });
  if (changes.edge) Object.assign(state, { node: null, end: null });
  if (changes.end) Object.assign(state, { node: null, edge: null });
  Object.assign(state, changes);
  address(step);
  draw(changes);
}

function draw(changes = state) {
  if (state.theme === 'auto') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = state.theme;
  byId('theme').textContent = { auto: '◐ auto', light: '☀ light', dark: '☾ dark' }[state.theme];
  byId('task').value = state.task ?? '';
  byId('overview').hidden = Boolean(state.task);
  byId('circuit').hidden = !state.task;
  hideTip();
  if (!state.task) {
    document.title = `${data.run.name}: circuits`;
    drawn = null;
    drawOverview(state, change, hrefOf);
    return;
  }
  const circuit = circuitOf(state.task);
  document.title = `${state.task} in ${data.run.name}${state.node ? `: ${state.node}` : ''}`;
  const keep = state.keep ?? keptAtFirst(circuit);
  const wanted = `${state.task} ${circuit.large ? keep : 'all'}`;
  const opened = drawn !== wanted;
  if (opened) {
    drawn = wanted;
    openCircuit(circuit, keep);
  }
  byId('keep').value = keep;
  byId('kept').textContent = `${keep} of ${circuit.total_nodes}`;
  byId('residual').checked = state.residual;
  paintGraph({ ...state, keep });
  drawPrefix(byId('prefix'), circuit, keep);
  // After all that takes room from the graph.
  if (opened || ('view' in changes && !same(state.view, settled))) show(state.view);
  byId('try').hidden = !canRun(circuit);
  byId('try').setAttribute('aria-pressed', String(state.try));
  byId('circuit').classList.toggle('trying', state.try);
  drawPanel(circuit, state, change);
  paintLive(circuit, state);
  if ('node' in changes || 'edge' in changes || 'end' in changes) {
    if (!state.try) byId('panel').scrollTop = 0;
    const node = circuit.byName.get(state.node);
    const edge = edgeOf(circuit, state.edge);
    const line = edge && `${edge.source.name} to ${edge.target.name}, weight ${number(edge.weight)}`;
    byId('said').textContent = node ? `${node.name}, ${describe(node)}` : line ?? state.end ?? `${circuit.task}, nothing selected`;
    if (graph.items.has(state.node)) showInView(node);
  }
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
let settled;

function show(view) {
  settled = view;
  setView(view);
}

function openCircuit(circuit, keep) {
  byId('circuit-title').textContent = circuit.task;
  byId('keep').max = circuit.nodes.length;
  const shown = circuit.large ? part(circuit, keep) : circuit;
  const lines = drawGraph(shown, {
    select: ({ node = null, edge = null, end = null }) => change({
      node: node === state.node ? null : node, edge: edge === state.edge ? null : edge, end: end === state.end ? null : end,
    }, true),
    toggle: (name) => change({ open: toggledBundle(state.open, name) }, true),
    moved: () => {
      settled = getView();
      state.view = settled;
      address();
    },
  });
  const notes = [...circuit.notes];
  if (keep < circuit.nodes.length && circuit.large) {
    notes.push(`The ${plural(keep, 'most important node')} of ${circuit.nodes.length.toLocaleString('en')} are drawn: the slider changes how many.`);
  }
  if (lines < shown.edges.length) {
    notes.push(`The ${plural(lines, 'largest edge')} of ${shown.edges.length.toLocaleString('en')} between them are drawn; the lists of a node hold all.`);
  }
  byId('notes').replaceChildren(...notes.map((note) => el('p', { class: 'note' }, note)));
}

function start() {
  const { run } = data;
  const size = `${plural(run.model.n_layer, 'layer')} of width ${run.model.d_model}, ${plural(run.model.n_head, 'head')} of ${run.model.d_head}`;
  const summary = [
    size, run.summary.nonzeros ? `${run.summary.nonzeros.toLocaleString('en')} nonzero weights` : null,
    run.summary.val_loss ? `held-out loss ${run.summary.val_loss.toFixed(3)}` : null, `step ${run.step}`,
  ];
  byId('home').textContent = run.name;
  byId('facts').textContent = summary.filter(Boolean).join(' · ');
  byId('task').append(el('option', { value: '' }, 'all tasks'),
    ...Object.keys(data.circuits).map((task) => el('option', { value: task }, task)));
  byId('task').addEventListener('change', (event) => change({ task: event.target.value || null }, true));
  byId('home').addEventListener('click', () => change({ task: null, node: null, edge: null }, true));
  byId('theme').addEventListener('click', () => change({ theme: THEMES[(THEMES.indexOf(state.theme) + 1) % 3] }));
  byId('help-open').addEventListener('click', () => byId('help').showModal());
  const slide = (event) => {
    const [keep, circuit] = [+event.target.value, circuitOf(state.task)];
    // Drawing a large circuit anew waits until the slider is let go.
    if (circuit.large && event.type === 'input') byId('kept').textContent = `${keep} of ${circuit.total_nodes}`;
    else change({ keep: keep === keptAtFirst(circuit) ? null : keep, ...(circuit.large ? { view: null } : {}) });
  };
  byId('keep').addEventListener('input', slide);
  byId('keep').addEventListener('change', slide);
  listenToGraph();
  listenToSaving();
  watchTables();
  byId('try').addEventListener('click', toggleTry);
  byId('residual').addEventListener('change', (event) => change({ residual: event.target.checked }));
  byId('zoom-in').addEventListener('click', () => zoomBy(1.4));
  byId('zoom-out').addEventListener('click', () => zoomBy(1 / 1.4));
  byId('zoom-fit').addEventListener('click', () => change({ view: everything() }));
  document.addEventListener('keydown', key);
  // In the `srcdoc` of a frame a link to a fragment would lead to the page around it.
  document.addEventListener('click', (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    Object.assign(state, read(link.getAttribute('href')));
    address(true);
    draw();
  });
  const follow = () => {
    Object.assign(state, read(location.hash));
    draw();
  };
  window.addEventListener('popstate', follow);
  window.addEventListener('hashchange', follow);
  let wait;
  window.addEventListener('resize', () => {
    clearTimeout(wait);
    wait = setTimeout(() => {
      if (state.task) show(state.view);
      draw({});
    }, 100);
  });
  follow();
}

function toggleTry() {
  change({ try: !state.try }, true);
  if (state.try) byId('panel').focus();
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId('help').open) return;
  if (['INPUT', 'SELECT', 'TEXTAREA'].includes(event.target.tagName) && event.key !== 'Escape') return;
  const inGraph = event.target.closest('.graph');
  const pairs = state.task ? circuitOf(state.task).rows.length / 2 : 0;
  if (event.key === '?') byId('help').showModal();
  else if (event.key === 'Escape' && (state.node || state.edge || state.end)) {
    const item = graph.items.get(state.node) ?? (state.edge && inGraph ? event.target.closest('.node') : null);
    change({ node: null, edge: null, end: null }, true);
    item?.focus({ preventScroll: true });
  } else if (event.key === 't' && state.task && canRun(circuitOf(state.task))) toggleTry();
  else if (event.key === '[' && state.node && state.pair > 0) change({ pair: state.pair - 1 });
  else if (event.key === ']' && state.node && state.pair < pairs - 1) change({ pair: state.pair + 1 });
  else if (inGraph && (event.key === '+' || event.key === '=')) zoomBy(1.4);
  else if (inGraph && event.key === '-') zoomBy(1 / 1.4);
  else if (inGraph && event.key === '0') change({ view: everything() });
}

start();
