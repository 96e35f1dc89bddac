// The selected node or edge on the typed prompt: its values, its attention, and the controls that edit it.

/** The controls of a node or an edge: as the model computes it, or held; brought up to date by the function returned. */
function editor(circuit, name, words, range) {
  const inputs = { range: el('input', { type: 'range', ...range, 'aria-label': `Value of ${name}` }),
    digits: el('input', { type: 'number', step: 'any', 'aria-label': `Value of ${name}, exact` }) };
  const put = (edit, remember = true) => {
    const { state, change } = trying.context;
    if (remember) live.past.push(state.edits);
    change({ edits: withEdit(circuit, state, name, edit) });
  };
  // While a slider is dragged there is one step to undo.
  let dragging = false;
  const slide = (event) => {
    if (event.target.value === '' || !Number.isFinite(+event.target.value)) return;
    put({ mode: 'set', value: +event.target.value }, !dragging);
    dragging = true;
  };
  for (const input of Object.values(inputs)) {
    input.addEventListener('input', slide);
    input.addEventListener('change', () => { dragging = false; });
  }
  // The slider ends where larger numbers can be typed.
  const shownValue = () => +(inputs.digits.value || inputs.range.value);
  const buttons = words.map(([mode, text]) => el('button', {
    type: 'button', click: () => put(mode === 'free' ? null : { mode, value: mode === 'set' ? shownValue() : null }),
  }, text));
  const root = el('div', { class: 'editor' },
    el('span', { class: 'choice', role: 'group', 'aria-label': `Edit ${name}` }, ...buttons),
    el('span', { class: 'slide' }, inputs.range, inputs.digits));
  const sync = (edit, value) => {
    const mode = edit?.mode ?? 'free';
    buttons.forEach((button, i) => button.setAttribute('aria-pressed', String(words[i][0] === mode)));
    for (const input of Object.values(inputs)) {
      // What is being typed stays: "1." is a number that is not finished.
      const typed = document.activeElement === input && (input.value === '' || Math.abs(input.value - value) <= 1e-8 * Math.abs(value));
      if (!typed) input.value = +value.toPrecision(9);
    }
  };
  return { root, sync };
}

/** Shows what is selected; its controls stay while it is. */
function updateSelected(circuit, state) {
  const { parts } = trying;
  const node = circuit.byName.get(state.node);
  const edge = node ? null : edgeOf(circuit, state.edge);
  const name = node?.name ?? (edge ? state.edge : null);
  if (trying.editor?.name !== name) {
    trying.editor = name ? { name, body: el('div', {}), ...(node ? nodeEditor(circuit, node) : edgeEditor(circuit, edge, name)) } : null;
    parts.selected.replaceChildren(...(name ? [section(name.replace('>', ' → '),
      el('p', { class: 'quiet' }, node ? describe(node) : `From ${describe(edge.source)} to ${describe(edge.target)}`),
      trying.editor.root, trying.editor.body)] : []));
  }
  if (!name) return;
  const edit = readEdits(circuit, state.edits).find((each) => each.name === name);
  const given = node ? node.mean : edge.weight;
  trying.editor.sync(edit, { mean: node ? given : 0, zero: 0, set: edit?.value }[edit?.mode] ?? given);
  const ready = live.task === circuit.task && live.answer?.tokens.length && live.answer.now.model.values[node?.name];
  trying.editor.body.replaceChildren(...(node && ready ? nodeValues(node, state) : []));
  for (const tokens of trying.editor.body.querySelectorAll('.tokens')) scrollToToken(tokens, chosenToken());
}

function nodeEditor(circuit, node) {
  const { low, high, largest } = node.about;
  const reach = Math.max(Math.abs(low), Math.abs(high), largest, Math.abs(node.mean)) || 1;
  return editor(circuit, node.name, [['free', 'as computed'], ['mean', 'mean'], ['zero', 'zero'], ['set', 'set']],
    { min: -1.5 * reach, max: 1.5 * reach, step: reach / 200 });
}

function edgeEditor(circuit, edge, name) {
  const reach = 2 * circuit.largestWeight;
  return editor(circuit, name, [['free', 'as it is'], ['mean', 'source’s mean'], ['zero', 'zero'], ['set', 'set']],
    { min: -reach, max: reach, step: reach / 400 });
}

/** A node's values at every token of the prompt, in the model and in the circuit; attention, where it has some. */
function nodeValues(node, state) {
  const { tokens, now } = live.answer;
  const values = SIDES.map(([side]) => now[side].values[node.name]);
  const largest = d3.max(values.flatMap((each) => [...each]), Math.abs);
  return [
    ...SIDES.map(([, title], i) => el('div', { class: 'prompt' },
      el('p', { class: 'quiet' }, `In the ${title}: `, el('span', { class: 'number' }, number(values[i][chosenToken()])), ' at the chosen token'),
      drawTokens(tokens, values[i], largest, { focus: chosenToken(), label: `In the ${title}` }))),
    node.inHead ? livePattern(node, state) : null,
  ].filter(Boolean);
}

function livePattern(node, state) {
  const { tokens, now } = live.answer;
  const name = `${node.layer}.${node.head}`;
  const pattern = now[state.side].patterns[name];
  if (!pattern) return null;
  const size = tokens.length;
  return el('div', {}, el('h4', {}, `Attention of head ${node.head}, in the ${SIDES.find(([side]) => side === state.side)[1]}`),
    drawSquare(tokens, (t, s) => pattern[t * size + s], {
      title: 'From each token (rows) to those before; the color is the square root', scale: 1, diverging: false, shade: Math.sqrt,
    }));
}

/** Colors the nodes of the graph by their values at the chosen token, and marks what is edited. */
function paintLive(circuit, state) {
  // Large circuits are slow enough; what was never colored needs no color taken away.
  if (!state.try && !trying.painted) return;
  trying.painted = state.try;
  const edited = new Set(state.try ? readEdits(circuit, state.edits).map(({ name }) => name) : []);
  const on = state.try && live.task === circuit.task && live.answer?.tokens.length;
  const at = on ? chosenToken() : null;
  for (const [name, item] of graph.items) {
    const value = on ? live.answer.now[state.side].values[name]?.[at] ?? 0 : 0;
    const { largest } = circuit.byName.get(name).about;
    const share = largest ? Math.min(1, Math.abs(value) / largest) : 0;
    item.classList.toggle('live', Boolean(on));
    item.style.setProperty('--value', (0.1 + 0.9 * Math.sqrt(share)).toFixed(2));
    item.style.setProperty('--hue', !value ? 'var(--card)' : value < 0 ? 'var(--negative)' : 'var(--positive)');
    item.classList.toggle('edited', edited.has(name));
  }
  for (const { line } of graph.lines) line.classList.toggle('edited', edited.has(line.dataset.edge));
}
