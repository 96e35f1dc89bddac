// The state of the view, which is the fragment of the address, and what is drawn for it.

const START = {
  task: data.opens, node: null, edge: null, keep: null, pair: 0, second: 0, side: 'model', residual: true, view: null,
  try: false, prompt: null, edits: '', token: null, group: null, notes: false, only: false, tour: null, end: null, open: '',
  sort: 'edges', order: 'up', theme: 'auto', with: null, overlap: 'nodes', location: null, all: false,
};
const THEMES = ['auto', 'light', 'dark'];
const DARK = window.matchMedia('(prefers-color-scheme: dark)');
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
    const other = given.get('with');
    if (data.overlap?.names.includes(other) && other !== task) found.with = other;
    // Before what names a group or a step of them.
    if (given.has('n') && !addressed.has(given.get('n'))) adopt(circuit, given.get('n'));
    const notes = notesOf(found.task);
    if (notes.groups.some(({ name }) => name === given.get('group'))) found.group = given.get('group');
    else if ([task, found.with].some((name) => name && circuitOf(name).byName.has(given.get('node')))) found.node = given.get('node');
    else if (edgeOf(circuit, given.get('edge'))) found.edge = given.get('edge');
    else if (ENDS.includes(given.get('end'))) found.end = given.get('end');
    found.open = given.get('open') ?? '';
    found.keep = within('keep', 1, circuit.nodes.length);
    found.pair = within('pair', 0, circuit.rows.length / 2 - 1);
    found.second = within('second', 0, 1);
    found.try = given.get('try') === 'true' && canRun(circuit);
    found.notes = given.get('notes') === 'true' && !found.try;
    found.only = given.get('only') === 'true' && notes.pins.length > 0;
    found.token = within('token', 0, 1e6);
    found.tour = within('tour', 0, notes.tour.length - 1);
    if (given.has('prompt')) found.prompt = given.get('prompt').slice(0, MAX_PROMPT);
    found.edits = writeEdits(readEdits(circuit, given.get('edits')));
    const view = (given.get('view') ?? '').split(',').map(Number);
    if (view.length === 3 && view.every(Number.isFinite) && view[0] > 0) found.view = view;
  }
  if (given.get('side') === 'circuit') found.side = 'circuit';
  found.residual = given.get('residual') !== 'false';
  if (TABLE.some(([key]) => key === given.get('sort'))) found.sort = given.get('sort');
  if (given.get('order') === 'down') found.order = 'down';
  if (given.get('overlap') === 'edges') found.overlap = 'edges';
  if (Object.hasOwn(data.locations, given.get('location'))) found.location = given.get('location');
  found.all = given.get('all') === 'true';
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
  const written = values.task ? shared(values.task) : '';
  if (written) {
    addressed.add(written);
    parts.set('n', written);
  }
  return `#${parts}`;
}

// What may be selected, one at a time.
const SELECTED = ['node', 'edge', 'group', 'end'];
const NOTHING = Object.fromEntries(SELECTED.map((name) => [name, null]));

// What belongs to one circuit alone.
const OF_CIRCUIT = Object.fromEntries(
  ['node', 'edge', 'keep', 'view', 'pair', 'second', 'try', 'prompt', 'edits', 'token', 'group', 'notes', 'only', 'tour', 'end', 'open', 'with']
    .map((name) => [name, START[name]]),
);
const hrefOf = (task) => fragment({ ...state, ...OF_CIRCUIT, task });

// Milliseconds without a change after which the address is written: browsers refuse to write it at every frame.
const PAUSE = 150;
// The state that the address is still to say.
const unwritten = { state: null, timer: null };

/** Puts the state into the address: as a `step` of the history at once, or else when changes pause. */
function address(step = false) {
  if (step) {
    writeAddress();
    putAddress('pushState', state);
    return;
  }
  clearTimeout(unwritten.timer);
  unwritten.state = { ...state };
  unwritten.timer = setTimeout(writeAddress, PAUSE);
}

function writeAddress() {
  if (unwritten.state) putAddress('replaceState', unwritten.state);
  forgetUnwritten();
}

function forgetUnwritten() {
  clearTimeout(unwritten.timer);
  unwritten.state = null;
}

function putAddress(way, values) {
  try {
    history[way](null, '', fragment(values));
  } catch {
    // A page in the `srcdoc` of a frame has no address of its own.
  }
}

/** Changes the state, the address and the page; `step` makes the back button return to what was before. */
function change(changes, step = false) {
  const task = changes.task ?? state.task;
  if (changes.task && task !== state.task) Object.assign(state, OF_CIRCUIT);
  // One thing is selected, and the panel shows one thing.
  const kind = SELECTED.find((name) => changes[name]);
  if (kind) for (const other of SELECTED) if (other !== kind) state[other] = null;
  if (kind || changes.try) state.notes = false;
  if (changes.notes) state.try = false;
  if ('pair' in changes) state.token = null;
  Object.assign(state, changes);
  if (state.only && !notesOf(state.task).pins.length) state.only = false;
  address(step);
  draw(changes);
}

function draw(changes = state) {
  document.documentElement.dataset.theme = state.theme === 'auto' ? DARK.matches ? 'dark' : 'light' : state.theme;
  byId('theme').textContent = { auto: '◐ auto', light: '☀ light', dark: '☾ dark' }[state.theme];
  byId('theme').setAttribute('aria-label', `Colors: ${state.theme}`);
  byId('task').value = state.task ?? '';
  byId('overview').hidden = Boolean(state.task);
  byId('circuit').hidden = !state.task || Boolean(state.with);
  byId('pair').hidden = !state.with;
  paintBeside();
  hideTip();
  if (!state.task || state.with) {
    // The graph is drawn anew afterwards: both views place the same nodes.
    drawn = null;
    if (state.with) {
      document.title = `${state.task} and ${state.with}: circuits`;
      byId('facts').textContent = aboutRuns([state.task, state.with].map((task) => circuitOf(task).run));
      drawPair(circuitOf(state.task), circuitOf(state.with), state, change);
      return;
    }
    pair.drawn = null;
    document.title = `${nameOfPage}: circuits`;
    byId('facts').textContent = aboutRuns(RUNS.keys());
    keepFocus(byId('overview'), () => drawOverview(state, change, hrefOf));
    return;
  }
  pair.drawn = null;
  const circuit = circuitOf(state.task);
  enter(circuit.run);
  byId('facts').textContent = aboutRun(RUNS[circuit.run]);
  document.title = `${state.task} in ${data.run.name}${state.node ? `: ${state.node}` : ''}`;
  const keep = state.keep ?? keptAtFirst(circuit);
  const { groups, pins, remarks } = notesOf(state.task);
  const only = state.only && pins.length > 0;
  const closed = groups.filter(({ open }) => !open);
  const wanted = JSON.stringify([state.task, circuit.large && !only ? keep : 'all', only ? pins : null, closed, remarks]);
  const opened = drawn !== wanted;
  if (opened) {
    drawn = wanted;
    openCircuit(circuit, keep, only);
  }
  byId('keep').value = keep;
  byId('kept').textContent = `${keep} of ${circuit.total_nodes}`;
  byId('keep').disabled = only;
  // It speaks of as many nodes as the slider says.
  byId('prefix').hidden = only;
  byId('residual').checked = state.residual;
  paintGraph({ ...state, keep: only ? Infinity : keep });
  drawPrefix(byId('prefix'), circuit, keep);
  byId('try').hidden = !canRun(circuit);
  byId('try').setAttribute('aria-pressed', String(state.try));
  byId('circuit').classList.toggle('trying', state.try);
  const moved = drawTour(circuit);
  // After all that takes room from the graph.
  if (opened || (moved && !state.view) || ('view' in changes && !same(state.view, settled))) show(state.view);
  drawPanel(circuit, state, change);
  byId('notes-open').setAttribute('aria-pressed', String(state.notes));
  paintLive(circuit, state);
  paintNotes(graph.circuit, state);
  if (SELECTED.some((name) => name in changes)) {
    if (!state.try) showPanel(changes !== state);
    const node = circuit.byName.get(state.node);
    const edge = edgeOf(circuit, state.edge);
    const line = edge && `${edge.source.name} to ${edge.target.name}, weight ${number(edge.weight)}`;
    byId('said').textContent = node ? `${node.name}, ${describe(node)}` : line ?? state.end ?? state.group ?? `${circuit.task}, nothing selected`;
    if (graph.items.has(state.node)) showInView(node);
    const [source, target] = (state.edge ?? '').split('>');
    if (graph.items.has(source) && graph.items.has(target)) [target, source].forEach((name) => showInView(circuit.byName.get(name)));
  }
}

// The part of a phone's window above which the panel begins once something is selected.
const HIGHEST = 0.6;

/** Shows the beginning of the panel, which on a phone scrolls with the page; `chosen` is whether it is of a choice just made. */
function showPanel(chosen) {
  const panel = byId('panel');
  panel.scrollTop = 0;
  if (!chosen || !SELECTED.some((name) => state[name])) return;
  const { top } = panel.getBoundingClientRect();
  window.scrollBy(0, Math.min(0, top) + Math.max(0, top - HIGHEST * window.innerHeight));
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
let settled;

function show(view) {
  settled = view;
  setView(view);
}

function openCircuit(circuit, keep, only) {
  byId('circuit-title').textContent = circuit.task;
  byId('keep').max = circuit.nodes.length;
  const shown = only ? pinnedPart(circuit) : circuit.large ? part(circuit, keep) : circuit;
  const lines = drawGraph(shown, {
    select: (chosen) => {
      const selected = Object.fromEntries(SELECTED.map((name) => [name, (chosen[name] ?? null) === state[name] ? null : chosen[name] ?? null]));
      // A click beside everything is no step where nothing was selected.
      if (SELECTED.some((name) => selected[name] !== state[name])) change(selected, true);
    },
    selectGroup: (group) => change({ ...NOTHING, group: group === state.group ? null : group }, true),
    pin: (names) => {
      togglePins(circuit, names, !names.every((name) => isPinned(circuit, name)));
      change({});
    },
    toggle: (name) => change({ open: toggledBundle(state.open, name) }, true),
    moved: () => {
      settled = getView();
      state.view = settled;
      address();
    },
  });
  const notes = [...circuit.notes, ...notesOf(circuit.task).remarks];
  if (only) notes.push(`Only the ${plural(shown.nodes.length, 'pinned node')} of ${circuit.nodes.length.toLocaleString('en')} are drawn.`);
  else if (keep < circuit.nodes.length && circuit.large) {
    notes.push(`The ${plural(keep, 'most important node')} of ${circuit.nodes.length.toLocaleString('en')} are drawn: the slider changes how many.`);
  }
  if (lines < shown.edges.length) {
    notes.push(`The ${plural(lines, 'largest edge')} of ${shown.edges.length.toLocaleString('en')} between them are drawn; the lists of a node hold all.`);
  }
  byId('notes').replaceChildren(...notes.map((note) => el('p', { class: 'note' }, note)));
}

function start() {
  byId('home').textContent = nameOfPage;
  byId('task').append(el('option', { value: '' }, 'all tasks'),
    ...Object.keys(data.circuits).map((task) => el('option', { value: task }, task)));
  byId('task').addEventListener('change', (event) => chooseTask(event.target.value || null));
  byId('with').addEventListener('change', (event) => change({ with: event.target.value || null, ...inBoth(event.target.value) }, true));
  byId('home').addEventListener('click', () => change({ ...OF_CIRCUIT, task: null }, true));
  byId('theme').addEventListener('click', () => change({ theme: THEMES[(THEMES.indexOf(state.theme) + 1) % 3] }));
  byId('help-open').addEventListener('click', () => byId('help').showModal());
  const slide = (event) => {
    const [keep, circuit] = [+event.target.value, circuitOf(state.task)];
    // Drawing a large circuit anew waits until the slider is let go.
    if (circuit.large && event.type === 'input') {
      byId('kept').textContent = `${keep} of ${circuit.total_nodes}`;
      drawPrefix(byId('prefix'), circuit, keep);
    } else change({ keep: keep === keptAtFirst(circuit) ? null : keep, ...(circuit.large ? { view: null } : {}) });
  };
  byId('keep').addEventListener('input', slide);
  byId('keep').addEventListener('change', slide);
  listenToGraph();
  listenToJumps();
  listenToSaving();
  watchTables();
  byId('try').addEventListener('click', toggleTry);
  byId('notes-open').addEventListener('click', toggleNotes);
  listenToTour();
  byId('residual').addEventListener('change', (event) => change({ residual: event.target.checked }));
  byId('zoom-in').addEventListener('click', () => zoomBy(1.4));
  byId('zoom-out').addEventListener('click', () => zoomBy(1 / 1.4));
  byId('zoom-fit').addEventListener('click', () => change({ view: everything() }));
  document.addEventListener('keydown', key);
  // In the `srcdoc` of a frame a link to a fragment would lead to the page around it.
  document.addEventListener('click', (event) => {
    const anchor = event.target.closest('a[href^="#"]');
    if (!anchor || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    Object.assign(state, read(anchor.getAttribute('href')));
    address(true);
    draw();
  });
  const follow = (kept = {}) => {
    Object.assign(state, read(location.hash), kept);
    draw();
  };
  const followBack = () => {
    // It was of the place in the history that has been left.
    forgetUnwritten();
    follow({ theme: state.theme });
    // Going back takes neither notes nor colors back: the address says those that are shown.
    address();
  };
  // A link that is pasted into the tab fires it too.
  window.addEventListener('popstate', followBack);
  window.addEventListener('pagehide', writeAddress);
  document.addEventListener('visibilitychange', writeAddress);
  window.addEventListener('beforeunload', (event) => {
    writeAddress();
    if (!wouldBeLost()) return;
    event.preventDefault();
    // What browsers of before 2024 look at.
    event.returnValue = true;
  });
  DARK.addEventListener('change', () => draw({}));
  let wait;
  window.addEventListener('resize', () => {
    clearTimeout(wait);
    wait = setTimeout(() => {
      if (state.task && !state.with) show(state.view);
      if (state.with) fitHalves(pair.halves);
      // A keyboard that opens on a phone takes room, and must not take away what is typed into.
      if (document.activeElement?.matches('#panel input[type="text"], #panel textarea')) return;
      draw({});
    }, 100);
  });
  follow();
}

function toggleTry() {
  change({ try: !state.try }, true);
  if (state.try) byId('panel').focus();
}

function toggleNotes() {
  change({ notes: !state.notes }, true);
  if (state.notes) byId('panel').focus();
}

/** Shows another pair, where its prompts are seen; Try it takes the first of them. */
function toPair(pair) {
  if (pair < 0 || pair >= circuitOf(state.task).rows.length / 2) return;
  if (state.try) change({ pair, prompt: null });
  else if (state.node) change({ pair });
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId('help').open) return;
  if (['INPUT', 'SELECT', 'TEXTAREA'].includes(event.target.tagName) && event.key !== 'Escape') return;
  const inGraph = event.target.closest('.graph');
  const alone = state.task && !state.with ? circuitOf(state.task) : null;
  if (event.key === '?') byId('help').showModal();
  else if (event.key === 'Escape' && SELECTED.some((name) => state[name])) {
    const item = graph.boxes.get(state.group)?.box ?? graph.items.get(state.node) ?? (state.edge && inGraph ? event.target.closest('.node') : null);
    change(NOTHING, true);
    item?.focus({ preventScroll: true });
  } else if (!alone) {
    // All other keys are of the graph of one circuit.
  } else if (event.key === 't' && canRun(alone)) toggleTry();
  else if (event.key === 'n') toggleNotes();
  else if (event.key === 'p' && state.node) graph.pin([state.node]);
  else if (event.key === '.') goTo(alone, state.tour === null ? 0 : state.tour + 1);
  else if (event.key === ',' && state.tour !== null) goTo(alone, state.tour - 1);
  else if (event.key === '[') toPair(state.pair - 1);
  else if (event.key === ']') toPair(state.pair + 1);
  else if (inGraph && (event.key === '+' || event.key === '=')) zoomBy(1.4);
  else if (inGraph && event.key === '-') zoomBy(1 / 1.4);
  else if (inGraph && event.key === '0') change({ view: everything() });
}

start();
