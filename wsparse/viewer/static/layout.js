// Places for the nodes: columns in the model's order, few crossings and straight lines within them.

// Between columns: few of them are set wider apart.
const GAP_X = [84, 150];
const WIDTH = 900;
const GAP_Y = 34;
const HEAD_GAP = 12;
const TALLEST_TRAY = 6;
const NODE = { width: 46, height: 20 };
// Nodes side by side in a column that would be too tall.
const BESIDE = NODE.width + 8;

/** Sets x and y of the nodes; returns the columns, the blocks around them, the tray of constants, the ends and the extent. */
function arrange(circuit) {
  // Of a part of a circuit all nodes may be without lines: there is nothing to put them below.
  const inTray = circuit.nodes.every((node) => node.alone) ? () => false : (node) => node.alone;
  const inColumns = circuit.nodes.filter((node) => !inTray(node));
  const byColumn = d3.group(circuit.nodes, (node) => node.layer * 6 + node.column);
  const tallest = Math.max(20, 1.2 * Math.sqrt(circuit.nodes.length));
  const gap = Math.max(GAP_X[0], Math.min(GAP_X[1], WIDTH / (byColumn.size + 1)));
  let right = gap / 2;
  const columns = [...byColumn.keys()].sort(d3.ascending).map((key) => {
    const [nodes, tray] = [byColumn.get(key).filter((node) => !inTray(node)), byColumn.get(key).filter(inTray)];
    const across = Math.max(1, Math.ceil(nodes.length / tallest), Math.ceil(tray.length / TALLEST_TRAY));
    const beside = BESIDE + (circuit.wide && byColumn.get(key).some((node) => circuit.wide.has(node)) ? BOX.width - NODE.width : 0);
    const width = gap + (across - 1) * beside;
    right += width;
    return { key, nodes, tray, across, beside, left: right - width, right, x: right - width / 2, title: COLUMNS[key % 6] };
  });
  const neighbors = new Map(circuit.nodes.map((node) => [node, []]));
  const near = (source, target, weight) => {
    neighbors.get(source).push([target, weight]);
    neighbors.get(target).push([source, weight]);
  };
  for (const edge of circuit.edges) near(edge.source, edge.target, Math.abs(edge.weight));
  for (const { source, target } of circuit.streams) {
    if (source && target) near(source, target, circuit.largestWeight);
  }

  for (const column of columns) reorder(column, () => 0);
  const aim = (node) => {
    const around = neighbors.get(node);
    const total = d3.sum(around, ([, weight]) => weight);
    return total ? d3.sum(around, ([other, weight]) => other.y * weight) / total : node.y;
  };
  for (let sweep = 0; sweep < 12; sweep += 1) {
    for (const column of sweep % 2 ? [...columns].reverse() : columns) {
      const aims = new Map(column.nodes.map((node) => [node, aim(node)]));
      // The last sweeps straighten lines in the order that the first ones found.
      if (sweep < 8) reorder(column, (node) => aims.get(node));
      else spread(column, (node) => aims.get(node));
    }
  }

  const top = d3.min(inColumns, (node) => node.y) - NODE.height;
  const bottom = d3.max(inColumns, (node) => node.y) + NODE.height;
  const blocks = d3.groups(columns, (column) => Math.floor(column.key / 3)).map(([key, inside]) => ({
    // A single narrow column has no room for the words.
    title: inside.length > 1 || gap > 130
      ? `Layer ${Math.floor(key / 2)} ${key % 2 ? 'MLP' : 'attention'}` : `L${Math.floor(key / 2)} ${key % 2 ? 'MLP' : 'attn'}`,
    left: inside[0].left + 5,
    right: inside.at(-1).right - 5,
  }));
  const heads = columns.filter((column) => column.nodes[0]?.inHead).flatMap((column) => (
    d3.groups(column.nodes, (node) => node.head).map(([head, nodes]) => ({
      head,
      left: d3.min(nodes, (node) => node.x), right: d3.max(nodes, (node) => node.x),
      top: d3.min(nodes, (node) => node.y), bottom: d3.max(nodes, (node) => node.y),
    }))));
  const tray = arrangeTray(columns, bottom);
  for (const column of columns) column.nodes.push(...column.tray);
  return {
    columns, blocks, heads, top, bottom, tray, low: tray?.bottom ?? bottom,
    ends: [gap * 0.25, right + gap * 0.25], left: 0, right: right + gap / 2,
  };
}

/** By where the neighbors are; heads stay together, and within a head queries, keys and values. */
function reorder(column, aim) {
  const height = d3.rollup(column.nodes, (nodes) => d3.mean(nodes, aim), (node) => node.head);
  column.nodes.sort((a, b) => d3.ascending(height.get(a.head), height.get(b.head))
    || d3.ascending(a.head, b.head)
    || (a.inHead ? d3.ascending(a.location, b.location) : 0)
    || d3.ascending(aim(a), aim(b)) || d3.ascending(a.channel, b.channel));
  column.rows = d3.groups(column.nodes, (node) => node.head).flatMap(([, nodes]) => (
    d3.range(0, nodes.length, column.across).map((start) => nodes.slice(start, start + column.across))));
  for (const row of column.rows) {
    row.forEach((node, i) => { node.x = column.x + (i - (row.length - 1) / 2) * column.beside; });
  }
  spread(column, aim);
}

/** Nearest heights to the aims, in order and apart: isotonic regression by pooling neighbors. */
function spread({ rows }, aim) {
  let offset = 0;
  const offsets = [];
  const pools = [];
  rows.forEach((row, i) => {
    if (i) offset += GAP_Y + (row[0].head === rows[i - 1][0].head ? 0 : HEAD_GAP);
    offsets.push(offset);
    let pool = { sum: d3.mean(row, aim) - offset, count: 1 };
    while (pools.length && pools.at(-1).sum / pools.at(-1).count > pool.sum / pool.count) {
      const before = pools.pop();
      pool = { sum: before.sum + pool.sum, count: before.count + pool.count };
    }
    pools.push(pool);
  });
  const base = pools.flatMap(({ sum, count }) => d3.range(count).map(() => sum / count));
  rows.forEach((row, i) => row.forEach((node) => { node.y = base[i] + offsets[i]; }));
}
