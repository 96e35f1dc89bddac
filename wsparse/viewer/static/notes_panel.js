// The panel of notes, and what the panels of nodes and groups have of them.

/** After something has been typed: what is being typed in stays as it is. */
function typed(circuit) {
  address();
  paintNotes(circuit, state);
  for (const each of byId('panel').querySelectorAll('.saved')) each.textContent = savedText(circuit);
  for (const each of byId('panel').querySelectorAll('.revert')) each.disabled = !isEdited(circuit.task);
}

const button = (text, click, attributes = {}) => el('button', { type: 'button', click, ...attributes }, text);

/** A line of text that is kept as it is typed. */
const textInput = (label, value, keep, attributes = {}) => el('input', {
  type: 'text', value, maxlength: LONGEST_NAME, 'aria-label': label, autocomplete: 'off', input: (event) => keep(event.target.value), ...attributes,
});

const textArea = (label, value, keep) => {
  const area = el('textarea', { rows: Math.max(2, Math.min(7, Math.ceil(value.length / 58))), maxlength: LONGEST_TEXT, 'aria-label': label, input: (event) => keep(event.target.value) });
  area.value = value;
  return area;
};

/** The name and the pin of a node, for its own panel. */
function nodeNotes(circuit, node, change) {
  const group = groupOf(circuit, node.name);
  const pinned = isPinned(circuit, node.name);
  return el('div', { class: 'naming' },
    textInput(`Name of ${node.name}`, nameOf(node), (label) => {
      setName(circuit, node.name, label);
      typed(circuit);
    }, { placeholder: 'a name of your own' }),
    button('Pin', () => {
      togglePins(circuit, [node.name], !pinned);
      change({});
    }, { 'aria-pressed': String(pinned) }),
    group ? el('span', {}, 'in the group ', button(group.name, () => change({ group: group.name }, true), { class: 'link' })) : null);
}

/** Says where the graph hides what is selected, and offers to show it. */
function hiddenNote(circuit, nodes, change) {
  const { pins } = notesOf(circuit.task);
  if (state.only && pins.length) {
    if (nodes.every(({ name }) => pins.includes(name))) return null;
    return el('p', { class: 'note' }, 'Not among the pinned nodes, which alone are drawn. ', button('Show all', () => change({ only: false }), { class: 'link' }));
  }
  const needed = d3.max(nodes, ({ rank }) => rank) + 1;
  if (needed <= (state.keep ?? keptAtFirst(circuit))) return null;
  return el('p', { class: 'note' }, 'The slider hides it in the graph. ',
    button('Show it', () => change({ keep: needed === keptAtFirst(circuit) ? null : needed }), { class: 'link' }));
}

function groupPanel(circuit, group, change) {
  const nodes = group.nodes.map((name) => circuit.byName.get(name)).sort((a, b) => a.rank - b.rank);
  const inside = new Set(nodes);
  const ends = ({ source, target }) => [link(source, change), ' → ', link(target, change)];
  const table = (title, way) => edgeTable(circuit, title, crossing(nodes, inside, way), ends, change);
  const outside = [table('In', 'in'), table('Out', 'out')].filter(Boolean);
  const pinned = group.nodes.every((name) => isPinned(circuit, name));
  return [
    titleBar(group.name, () => change({ group: null }, true), 'words'),
    el('p', {}, `A group of ${plural(nodes.length, 'node')}`),
    el('div', { class: 'controls' },
      button('Draw as one box', () => {
        group.open = !group.open;
        change({});
      }, { 'aria-pressed': String(!group.open) }),
      button('Pin its nodes', () => {
        togglePins(circuit, group.nodes, !pinned);
        change({});
      }, { 'aria-pressed': String(pinned) }),
      button('Ungroup', () => {
        removeFromGroups(circuit, group.nodes);
        change({ group: null });
      })),
    section('Nodes', el('ul', { class: 'rows' }, ...nodes.map((node) => el('li', {}, link(node, change),
      el('span', { class: 'quiet' }, ` ${signed(node.importance)} `),
      button('take out', () => {
        removeFromGroups(circuit, [node.name]);
        change(groupOf(circuit, group.nodes.find((name) => name !== node.name)) ? {} : { group: null });
      }, { class: 'link', 'aria-label': `Take ${node.name} out` })))),
    el('p', { class: 'quiet' }, 'Growth of the task loss when that node alone is removed; these do not add up.')),
    section('Edges to what is outside', ...(outside.length ? outside : [el('p', { class: 'quiet' }, 'None.')])),
  ];
}

function savedText(circuit) {
  if (!isEdited(circuit.task)) return 'These are the notes of this page.';
  return shared(circuit.task)
    ? 'Changed: the address holds the notes on this circuit, the page itself does not yet.'
    : 'Changed, and too long for the address: keep them in a file.';
}

function notesPanel(circuit, state, change) {
  const notes = notesOf(circuit.task);
  return [
    titleBar('Notes', () => change({ notes: false }, true), 'words'),
    section('Caption', textArea('Caption of the circuit', notes.caption, (text) => {
      notes.caption = text;
      typed(circuit);
    })),
    namesSection(circuit, notes, change),
    pinsSection(circuit, notes, change),
    groupsSection(circuit, notes, change),
    tourSection(circuit, notes, change),
    section('Keep', el('p', { class: 'quiet saved', role: 'status' }, savedText(circuit)), el('div', { class: 'controls' },
      button('Download the page with the notes', () => {
        save(`${nameOfPage}-notes.html`, new Blob([pageWithNotes()], { type: 'text/html' }));
        for (const task of notebook.keys()) markFiled(task);
      }),
      button('Download notes.json', () => {
        save('notes.json', new Blob([notesFile(circuit)], { type: 'application/json' }));
        markFiled(circuit.task);
      }),
      button('Back to the page’s notes', () => {
        // The step that is left keeps the notes.
        writeAddress();
        if (!mayReplace(circuit.task, isAddressed(circuit.task))) return;
        notebook.delete(circuit.task);
        change({ group: null, tour: null, only: false }, true);
      }, { class: 'revert', disabled: !isEdited(circuit.task) })),
    el('p', { class: 'quiet' }, 'view reads the file again as ', el('code', {}, `circuits/${data.circuits[circuit.task].written.task}/notes.json`), ', or with ', el('code', {}, '--notes=FILE'), '.')),
  ];
}

function namesSection(circuit, notes, change) {
  const names = Object.keys(notes.labels);
  return section('Names', names.length ? el('ul', { class: 'rows' }, ...names.map((name) => el('li', {},
    button(name, () => change({ node: name }, true), { class: 'link' }),
    textInput(`Name of ${name}`, notes.labels[name], (label) => {
      setName(circuit, name, label);
      typed(circuit);
    })))) : el('p', { class: 'quiet' }, 'None. Select a node in the graph to name it.'));
}

function pinsSection(circuit, notes, change) {
  const free = notes.pins.filter((name) => !groupOf(circuit, name));
  let wanted = '';
  return section('Pinned nodes', ...(notes.pins.length ? [
    el('ul', { class: 'rows' }, ...notes.pins.map((name) => el('li', {}, link(circuit.byName.get(name), change), ' ',
      button('unpin', () => {
        togglePins(circuit, [name], false);
        change({});
      }, { class: 'link', 'aria-label': `Unpin ${name}` })))),
    el('div', { class: 'controls' },
      button('Show only these', () => change({ only: !state.only, view: null }, true), { 'aria-pressed': String(state.only) }),
      button('Unpin all', () => {
        notes.pins = [];
        change({});
      }),
      // What the page has not cannot be held.
      canRun(circuit) && circuit.nodes.length === circuit.total_nodes ? button('Hold the rest at its mean', () => {
        const before = state.edits;
        const rest = circuit.nodes.filter(({ name }) => !notes.pins.includes(name));
        change({ try: true, edits: writeEdits(rest.map(({ name }) => ({ name, mode: 'mean' }))) }, true);
        remember(before);
      }, { title: 'Runs the model with every other node of the circuit at its mean: Try it then shows the loss' }) : null),
    free.length ? el('div', { class: 'controls' },
      textInput('Name of the group', '', (text) => { wanted = text; }, { placeholder: 'name of the group' }),
      button(`Group ${free.length === notes.pins.length ? 'them' : `the ${free.length} without a group`}`, () => {
        addGroup(circuit, free, wanted);
        change({});
      })) : null,
  ].filter(Boolean) : [el('p', { class: 'quiet' }, 'None. Shift and click nodes in the graph, press p, or use Pin beside a node’s name.')]));
}

function groupsSection(circuit, notes, change) {
  return section('Groups', notes.groups.length ? el('ul', { class: 'rows' }, ...notes.groups.map((group) => el('li', {},
    textInput(`Name of the group ${group.name}`, group.name, (text) => {
      const name = text.trim();
      // A name that is empty or another group's is not taken.
      if (!name || notes.groups.some((each) => each.name === name)) return;
      if (state.group === group.name) state.group = name;
      renameGroup(group, name);
      typed(circuit);
    }),
    button(plural(group.nodes.length, 'node'), () => change({ group: group.name }, true), { class: 'link' }))))
    : el('p', { class: 'quiet' }, 'None. Pin nodes, and group them.'));
}

function tourSection(circuit, notes, change) {
  const changed = () => {
    notes.measured = false;
    change({ tour: state.tour === null || !notes.tour.length ? null : Math.min(state.tour, notes.tour.length - 1) });
  };
  const move = (from, to) => {
    notes.tour.splice(to, 0, ...notes.tour.splice(from, 1));
    changed();
  };
  const now = [state.node ?? state.edge?.replace('>', ' → ') ?? 'nothing selected', `pair ${state.pair + 1}`,
    state.token === null ? null : `token ${state.token + 1}`, state.edits ? plural(readEdits(circuit, state.edits).length, 'edit') : null];
  return section('Tour',
    notes.measured ? el('p', { class: 'quiet' }, 'Made from the evidence. It can be changed.') : null,
    el('ol', { class: 'steps' }, ...notes.tour.map((step, i) => el('li', {},
      textArea(`Caption of step ${i + 1}`, step.caption, (text) => {
        if (!text.trim()) return;
        Object.assign(step, { caption: text });
        notes.measured = false;
        drawTour(circuit);
        typed(circuit);
      }),
      el('div', { class: 'controls' },
        button('show', () => goTo(circuit, i), { class: 'link', 'aria-label': `Show step ${i + 1}` }),
        button('up', () => move(i, i - 1), { class: 'link', disabled: i === 0, 'aria-label': `Move step ${i + 1} up` }),
        button('down', () => move(i, i + 1), { class: 'link', disabled: i === notes.tour.length - 1, 'aria-label': `Move step ${i + 1} down` }),
        button('remove', () => {
          notes.tour.splice(i, 1);
          changed();
        }, { class: 'link', 'aria-label': `Remove step ${i + 1}` }),
        el('span', { class: 'quiet' }, step.node ?? step.edge?.replace('>', ' → ') ?? 'nothing selected'))))),
    button('Add what is shown as a step', () => {
      notes.tour.push(tidyStep(circuit, { ...state, caption: 'What is to be seen here' }));
      changed();
    }),
    el('p', { class: 'quiet' }, `Shown: ${now.filter(Boolean).join(', ')}.`));
}
