// "Try it": a prompt of one's own, what the model and the circuit make of it, and what changes when nodes are edited.

const NEXT_TOKENS = 10;
const CHANGES_SHOWN = 12;

// The elements that stay while what they show changes, so that typing and dragging go on; of one circuit at a time.
const trying = { circuit: null, root: null, parts: null, context: null, set: null, editor: null, painted: false };

/** Puts the part into the panel, or brings it up to date where it is there. */
function drawTry(panel, circuit, state, change) {
  trying.context = { circuit, state, change };
  if (trying.circuit !== circuit) Object.assign(trying, { circuit, ...buildTry(circuit) });
  if (panel.firstChild !== trying.root) panel.replaceChildren(trying.root);
  const { prompt, example } = trying.parts;
  const text = shownPrompt(circuit, state);
  if (prompt.value !== text) {
    prompt.value = text;
    prompt.scrollTop = prompt.scrollHeight;
  }
  example.value = String(circuit.rows.findIndex((row) => row.text === text));
  live.notify = () => {
    // What is not shown is brought up to date when it is opened again, maybe for another circuit.
    if (!state.try) return;
    keepFocus(panel, updateTry);
    paintLive(trying.context.circuit, trying.context.state);
  };
  ask(circuit, state);
  updateTry();
}

function buildTry(circuit) {
  const { change } = trying.context;
  // The state of when something happens, not of when it was built.
  const now = () => trying.context.state;
  const set = (edits) => {
    live.past.push(now().edits);
    trying.context.change({ edits });
  };
  const parts = {
    prompt: el('textarea', {
      id: 'prompt', rows: 3, maxlength: MAX_PROMPT, spellcheck: 'false', autocomplete: 'off', autocapitalize: 'off',
      input: (event) => trying.context.change({ prompt: event.target.value }),
    }),
    example: el('select', {
      'aria-label': 'Prompt of the task',
      change: (event) => event.target.value >= 0 && trying.context.change({
        prompt: circuit.rows[event.target.value].text, pair: Math.floor(event.target.value / 2),
      }),
    }, el('option', { value: -1 }, 'a prompt of the task…'), ...circuit.rows.map((_, row) => (
      el('option', { value: row }, `pair ${Math.floor(row / 2) + 1}, ${row % 2 ? 'second' : 'first'} prompt`)))),
    status: el('p', { class: 'quiet', role: 'status' }),
    tokens: el('div', { class: 'tokens pick', role: 'slider', tabindex: 0, 'aria-label': 'Token after which the next one is shown', keydown: pickByKey }),
    side: choice('Values in the graph, attention and changes from', SIDES, null, (side) => trying.context.change({ side })),
    answers: el('div', {}), losses: el('div', {}), selected: el('div', {}), edits: el('ul', { class: 'edits' }),
    changes: el('div', {}), next: el('div', { class: 'next' }),
    undo: el('button', {
      type: 'button', click: () => live.past.length && trying.context.change({ edits: live.past.pop() }),
    }, 'Undo'),
    reset: el('button', { type: 'button', click: () => set('') }, 'Reset'),
  };
  const root = el('div', { class: 'try' },
    titleBar('Try it', () => change({ try: false }), 'words'),
    el('div', { class: 'controls' }, el('label', { for: 'prompt' }, 'Prompt'), parts.example),
    parts.prompt, parts.tokens, parts.status,
    el('div', { class: 'controls' }, el('span', { class: 'quiet' }, 'Values in the graph'), parts.side),
    section('Answers', parts.answers),
    section('Loss over the task’s pairs', parts.losses),
    parts.selected,
    section('Edits', el('div', { class: 'controls' }, parts.undo, parts.reset), parts.edits, parts.changes),
    section('Next token', parts.next));
  return { root, parts, set, editor: null };
}

/** Lets Undo return to the edits of before, after others were set from outside of this part. */
function remember(edits) {
  live.past.push(edits);
  live.notify();
}

function pickByKey(event) {
  const last = (live.answer?.tokens.length ?? 0) - 1;
  const to = { ArrowLeft: chosenToken() - 1, ArrowRight: chosenToken() + 1, Home: 0, End: last }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  pickToken(Math.max(0, Math.min(last, to)));
}

function pickToken(at) {
  const { circuit, state, change } = trying.context;
  if (isOfPair(circuit, state)) {
    change({ token: at });
    return;
  }
  live.at = at;
  live.notify();
}

/** Shows what the worker has answered. */
function updateTry() {
  const { parts, context: { circuit, state } } = trying;
  const edits = readEdits(circuit, state.edits);
  parts.undo.disabled = !live.past.length;
  parts.reset.disabled = !edits.length;
  [...parts.side.children].forEach((button, i) => button.setAttribute('aria-pressed', String(SIDES[i][0] === state.side)));
  updateSelected(circuit, state);
  parts.edits.replaceChildren(...edits.map((edit) => el('li', {},
    el('code', {}, edit.name.replace('>', ' → ')), ` ${edit.mode === 'set' ? `set to ${number(edit.value)}` : `at ${edit.edge && edit.mode === 'mean' ? 'its source’s mean' : edit.mode === 'mean' ? 'its mean' : 'zero'}`} `,
    el('button', {
      type: 'button', class: 'link', 'aria-label': `Take back ${edit.name}`, click: () => trying.set(withEdit(circuit, state, edit.name, null)),
    }, 'take back'))));
  const shown = live.task === circuit.task ? live.answer : null;
  const ready = Boolean(shown?.tokens.length);
  parts.status.className = live.problem ? 'wrong' : 'quiet';
  parts.status.textContent = statusText(shown);
  parts.tokens.hidden = !ready;
  if (!ready) {
    for (const name of ['answers', 'losses', 'changes', 'next']) parts[name].replaceChildren();
    return;
  }
  drawPrompt(parts.tokens, shown.tokens);
  parts.answers.replaceChildren(answerBars(circuit, state));
  parts.losses.replaceChildren(lossTable());
  parts.changes.replaceChildren(...whatChanged(circuit, state));
  parts.next.replaceChildren(...SIDES.map(([side, title]) => nextTokens(side, title)));
}

function statusText(shown) {
  if (live.problem) return `The model could not be run: ${live.problem}`;
  if (!shown) return 'Starting the model…';
  if (!shown.tokens.length) return 'Type a prompt.';
  const dropped = shown.dropped ? `; the first ${plural(shown.dropped, 'token')} do not fit into the context` : '';
  return `${plural(shown.tokens.length, 'token')}, ${Math.max(1, Math.round(shown.milliseconds))} ms${dropped}. Click a token to see what comes after it.`;
}

function drawPrompt(holder, tokens) {
  const at = chosenToken();
  holder.replaceChildren(...tokens.map((id, t) => {
    const span = el('span', { class: t === at ? 'focus' : null, click: () => pickToken(t) }, visibleText(id));
    hover(span, () => [quoted(id), `token ${t + 1} of ${tokens.length}`]);
    return span;
  }));
  for (const [name, value] of [['min', 1], ['max', tokens.length], ['now', at + 1], ['text', quoted(tokens[at])]]) {
    holder.setAttribute(`aria-value${name}`, value);
  }
  scrollToToken(holder, at);
}

/** Scrolls tokens as little as it takes to see one of them. */
function scrollToToken(holder, at) {
  const box = holder.getBoundingClientRect();
  const { top, bottom } = holder.children[at].getBoundingClientRect();
  if (top < box.top) holder.scrollTop += top - box.top - 8;
  else if (bottom > box.bottom) holder.scrollTop += bottom - box.bottom + 8;
}

/** A bar of a share, with a mark where it was before the edits. */
function shareBar(share, before, label) {
  const bar = el('span', { class: 'share', role: 'img', 'aria-label': label }, el('i', {}), before === share ? null : el('b', {}));
  bar.firstChild.style.width = `${(100 * share).toFixed(1)}%`;
  if (bar.children[1]) bar.children[1].style.left = `${(100 * before).toFixed(1)}%`;
  return bar;
}

/** Both answers in the model and in the circuit: the share of each between the two. */
function answerBars(circuit, state) {
  const answers = answersOf(circuit, state);
  const shares = Object.fromEntries(SIDES.map(([side]) => [side, ['before', 'now'].map((when) => {
    const logits = logitsOf(when, side);
    const first = 1 / (1 + Math.exp(logits[answers[1]] - logits[answers[0]]));
    return { both: [first, 1 - first], all: softmax(logits) };
  })]));
  const cell = (side, i, answer) => {
    const [before, now] = shares[side];
    return el('td', { title: `${percent(now.all[answer])} of all tokens` },
      shareBar(now.both[i], before.both[i], `${quoted(answer)}: ${percent(now.both[i])}`), el('span', { class: 'number' }, percent(now.both[i])));
  };
  return el('table', { class: 'bars' },
    el('thead', {}, el('tr', {}, el('td', {}), ...SIDES.map(([, title]) => el('th', { scope: 'col' }, title)))),
    el('tbody', {}, ...answers.map((answer, i) => el('tr', {}, el('th', { scope: 'row' }, el('code', {}, quoted(answer))),
      ...SIDES.map(([side]) => cell(side, i, answer))))),
    el('caption', {}, 'The share of each between the two. A mark is where it was before the edits.'));
}

function lossTable() {
  const { losses } = live;
  if (!losses) return el('p', { class: 'quiet' }, 'Measuring…');
  const edited = live.answer.before !== live.answer.now;
  const cell = (each) => el('td', { class: 'number' }, `${loss(each.loss)} (${percent(each.accuracy)} right)`);
  return el('table', { class: losses.id === live.id ? 'losses' : 'losses waiting' },
    el('thead', {}, el('tr', {}, el('td', {}), el('th', { scope: 'col' }, 'as it is'), edited ? el('th', { scope: 'col' }, 'with the edits') : null)),
    el('tbody', {}, ...SIDES.map(([side, title]) => el('tr', {}, el('th', { scope: 'row' }, title),
      cell(losses.before[side]), edited ? cell(losses.now[side]) : null))),
    el('caption', {}, `In nats, on ${plural(losses.pairs, 'pair')} of the report split; chance is 0.693.`));
}

/** The nodes whose values the edits have changed most. */
function whatChanged(circuit, state) {
  if (!readEdits(circuit, state.edits).length) {
    return [el('p', { class: 'quiet' }, 'None. Select a node or an edge in the graph: it can be held at its mean, at zero, or at a value.')];
  }
  const { change } = trying.context;
  const found = changesOfNodes(circuit, state.side);
  return [
    el('h4', {}, `What changed in the ${SIDES.find(([side]) => side === state.side)[1]}: ${plural(found.length, 'node')} of ${circuit.nodes.length.toLocaleString('en')}${cutAt(found, CHANGES_SHOWN)}`),
    found.length ? el('table', { class: 'changes' },
      el('thead', {}, el('tr', {}, ...['node', 'at token', 'was', 'is'].map((title) => el('th', { scope: 'col' }, title)))),
      el('tbody', {}, ...found.slice(0, CHANGES_SHOWN).map(({ node, at, before, now }) => el('tr', {},
        el('td', { 'data-value': node.name }, link(node, change)), el('td', {}, el('code', {}, quoted(live.answer.tokens[at]))),
        el('td', { class: 'number' }, number(before)), el('td', { class: 'number' }, number(now)))))) : null,
  ].filter(Boolean);
}

/** The most probable next tokens of a side. */
function nextTokens(side, title) {
  const [before, now] = ['before', 'now'].map((when) => softmax(logitsOf(when, side)));
  const best = d3.range(now.length).sort((a, b) => now[b] - now[a]).slice(0, NEXT_TOKENS);
  return el('table', { class: 'bars' }, el('caption', {}, title),
    el('tbody', {}, ...best.map((id) => el('tr', {}, el('th', { scope: 'row' }, el('code', {}, quoted(id))),
      el('td', {}, shareBar(now[id], before[id], percent(now[id])), el('span', { class: 'number' }, percent(now[id])))))));
}
