// Places for the nodes: columns in the model's order, few crossings and straight lines within them.

const GAP_X = 96;
const GAP_Y = 27;
const HEAD_GAP = 12;
const NODE = { width: 46, height: 20 };

/** Sets x and y of the nodes; returns the columns, the blocks around them, the ends and the extent. */
function arrange(circuit) {
  const byColumn = d3.group(circuit.nodes, (node) => node.layer * 6 + node.column);
  const keys = [...byColumn.keys()].sort(d3.ascending);
  const columns = keys.map((key, i) => ({
    key, x: (i + 1) * GAP_X, nodes: byColumn.get(key), title: COLUMNS[key % 6],
  }));
  const neighbours = new Map(circuit.nodes.map((node) => [node, []]));
  for (const edge of circuit.edges) {
    neighbours.get(edge.source).push([edge.target, Math.abs(edge.weight)]);
    neighbours.get(edge.target).push([edge.source, Math.abs(edge.weight)]);
  }
  for (const { source, target } of circuit.streams) {
    if (!source || !target) continue;
    neighbours.get(source).push([target, circuit.largestWeight]);
    neighbours.get(target).push([source, circuit.largestWeight]);
  }

  for (const column of columns) {
    column.nodes.sort((a, b) => d3.ascending(a.head, b.head) || d3.ascending(a.location, b.location)
      || d3.ascending(a.channel, b.channel));
    spread(column, column.nodes.map(() => 0));
    for (const node of column.nodes) node.x = column.x;
  }
  const aim = (node) => {
    const around = neighbours.get(node);
    const total = d3.sum(around, ([, weight]) => weight);
    return total ? d3.sum(around, ([other, weight]) => other.y * weight) / total : node.y;
  };
  for (let sweep = 0; sweep < 12; sweep += 1) {
    const order = sweep % 2 ? [...columns].reverse() : columns;
    for (const column of order) {
      const aims = new Map(column.nodes.map((node) => [node, aim(node)]));
      if (sweep < 8) reorder(column, aims);
      spread(column, column.nodes.map((node) => aims.get(node)));
    }
  }

  const top = d3.min(circuit.nodes, (node) => node.y) - NODE.height;
  const bottom = d3.max(circuit.nodes, (node) => node.y) + NODE.height;
  const blocks = d3.groups(columns, (column) => Math.floor(column.key / 3)).map(([key, inside]) => ({
    title: `Layer ${Math.floor(key / 2)} ${key % 2 ? 'MLP' : 'attention'}`,
    left: inside[0].x - GAP_X / 2 + 5,
    right: inside.at(-1).x + GAP_X / 2 - 5,
  }));
  const end = (columns.length + 1) * GAP_X;
  return {
    columns, blocks, top, bottom, ends: [GAP_X * 0.2, end - GAP_X * 0.2],
    heads: headBoxes(columns), left: -GAP_X * 0.15, right: end + GAP_X * 0.15,
  };
}

/** By where the neighbours are; heads stay together, and within a head queries, keys and values. */
function reorder(column, aims) {
  const height = d3.rollup(column.nodes, (nodes) => d3.mean(nodes, (node) => aims.get(node)),
    (node) => node.head);
  column.nodes.sort((a, b) => d3.ascending(height.get(a.head), height.get(b.head))
    || d3.ascending(a.head, b.head)
    || (a.inHead ? d3.ascending(a.location, b.location) : 0)
    || d3.ascending(aims.get(a), aims.get(b)) || d3.ascending(a.channel, b.channel));
}

/** Nearest places to the aims, in order and apart: isotonic regression by pooling neighbours. */
function spread(column, aims) {
  let offset = 0;
  const pools = [];
  column.nodes.forEach((node, i) => {
    if (i) offset += GAP_Y + (node.head === column.nodes[i - 1].head ? 0 : HEAD_GAP);
    node.offset = offset;
    let pool = { sum: aims[i] - offset, count: 1 };
    while (pools.length && pools.at(-1).sum / pools.at(-1).count > pool.sum / pool.count) {
      const before = pools.pop();
      pool = { sum: before.sum + pool.sum, count: before.count + pool.count };
    }
    pools.push(pool);
  });
  let i = 0;
  for (const pool of pools) {
    for (let n = 0; n < pool.count; n += 1, i += 1) {
      column.nodes[i].y = pool.sum / pool.count + column.nodes[i].offset;
    }
  }
}

function headBoxes(columns) {
  return columns.filter((column) => column.nodes[0].inHead).flatMap((column) => (
    d3.groups(column.nodes, (node) => node.head).map(([head, nodes]) => ({
      head, x: column.x, top: nodes[0].y, bottom: nodes.at(-1).y,
    }))));
}
