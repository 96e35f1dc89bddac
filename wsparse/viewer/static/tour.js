// A tour: captions, each with what is shown with it.

/** The state of the view at a step. */
function stepState(circuit, at) {
  const { tour, measured } = notesOf(circuit.task);
  const { node, edge, pair, token, edits } = tour[at];
  const running = edits.length > 0 && canRun(circuit);
  const shownPair = pair ?? state.pair;
  const needed = 1 + (d3.max([node, ...(edge ?? '').split('>')], (name) => circuit.byName.get(name)?.rank) ?? -1);
  return {
    ...NOTHING, tour: at, node, edge, pair: shownPair, token, second: 0, notes: false, only: false,
    keep: needed > keptAtFirst(circuit) ? needed : null,
    edits: running ? writeEdits(edits) : '', try: running, ...(running ? { prompt: null } : {}),
    // What is made from the evidence tells values in the circuit.
    ...(measured ? { side: 'circuit' } : {}),
  };
}

/** Goes to a step, where there is one. */
function goTo(circuit, at) {
  const { tour } = notesOf(circuit.task);
  if (at < 0 || at >= tour.length) return;
  const before = state.edits;
  change(stepState(circuit, at), true);
  if (state.try) remember(before);
}

function toggleTour(circuit) {
  if (state.tour === null) goTo(circuit, 0);
  else leaveTour(circuit);
}

/** Ends the tour; what its step has edited is taken back. */
function leaveTour(circuit) {
  const { edits } = notesOf(circuit.task).tour[state.tour];
  const own = edits.length && state.edits === writeEdits(edits);
  change({ tour: null, token: null, ...(own ? { edits: '', try: false } : {}) }, true);
  byId('tour-open').focus();
}

function listenToTour() {
  const circuit = () => circuitOf(state.task);
  byId('tour-open').addEventListener('click', () => toggleTour(circuit()));
  byId('tour-close').addEventListener('click', () => leaveTour(circuit()));
  byId('tour-previous').addEventListener('click', () => goTo(circuit(), state.tour - 1));
  byId('tour-next').addEventListener('click', () => goTo(circuit(), state.tour + 1));
}

/** Shows the step; returns whether the graph has another height now. */
function drawTour(circuit) {
  const { tour } = notesOf(circuit.task);
  const box = byId('tour');
  const before = box.offsetHeight;
  const open = state.tour !== null;
  byId('tour-open').hidden = !tour.length;
  byId('tour-open').setAttribute('aria-pressed', String(open));
  box.hidden = !open;
  if (open) {
    const { caption, edits } = tour[state.tour];
    const held = edits.length && !canRun(circuit) ? ' (This page does not run the model: what is held is not shown.)' : '';
    // Only what is new is read out.
    if (byId('tour-caption').textContent !== caption + held) byId('tour-caption').textContent = caption + held;
    byId('tour-at').textContent = `${state.tour + 1} of ${tour.length}`;
    byId('tour-previous').disabled = state.tour === 0;
    byId('tour-next').disabled = state.tour === tour.length - 1;
  }
  return box.offsetHeight !== before;
}
