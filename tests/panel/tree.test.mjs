import assert from 'node:assert/strict'
import { test } from 'node:test'

import { Model } from '../../static/model.js'
import { Dropped, FADES, forkTree, leftFrom, parting } from '../../static/tree.js'

/** Whole numbers below `n`, random but the same every time. */
function chance(seed) {
  return (n) => {
    seed = (seed * 1103515245 + 12345) % 2 ** 31
    return Math.floor((seed / 2 ** 31) * n)
  }
}

/**
 * Sequences that forked from one another anywhere, went on with blocks of their own, copied their last one, or ended.
 * `text` has a number of its own for every token, so it tells how much two of them really have in common.
 */
function family(below, blockSize) {
  let blocks = 0, tokens = 0
  const grow = (sequence, more) => {
    for (let i = 0; i < more; i++) sequence.text.push(++tokens)
    sequence.tokens = sequence.text.length
    while (sequence.table.length * blockSize < sequence.tokens) sequence.table.push(++blocks)
  }
  const all = [{ id: 1, parent: null, at: null, text: [], table: [] }]
  grow(all[0], 1 + below(60))
  for (let id = 2; id < 3 + below(8); id++) {
    const parent = all[below(all.length)]
    const at = 1 + below(parent.tokens)
    const child = { id, parent: parent.id, at, tokens: at, text: parent.text.slice(0, at), table: parent.table.slice(0, Math.ceil(at / blockSize)) }
    all.push(child)
    if (below(4) === 0) continue // it has not written yet
    if (at % blockSize) child.table[child.table.length - 1] = ++blocks
    grow(child, 1 + below(40))
  }
  return all.filter(() => below(5) > 0)
}

function common(a, b) {
  let n = 0
  while (n < a.length && n < b.length && a[n] === b[n]) n++
  return n
}

function runs(tree) {
  return [tree, ...tree.children.flatMap(runs)]
}

/** The table that the tree says a sequence has, and where it ends. */
function pathOf(tree, id, before = []) {
  const blocks = [...before, ...tree.blocks]
  if (tree.ends.some((end) => end.id === id)) return blocks
  const branch = tree.children.find(({ sequences }) => sequences.some((sequence) => sequence.id === id))
  return pathOf(branch, id, blocks)
}

test('a tree says the tables again, with each common prefix in it once', () => {
  for (let seed = 1; seed <= 400; seed++) {
    const below = chance(seed), sequences = family(below, 1 + below(6))
    if (!sequences.length) continue
    const tree = forkTree(sequences)
    for (const { id, table } of sequences) assert.deepEqual(pathOf(tree, id), table, `seed ${seed}`)
    // Sequences are in a run together exactly as far as their tables agree.
    const together = (a, b) => runs(tree).filter((run) => run.sequences.includes(a) && run.sequences.includes(b)).flatMap(({ blocks }) => blocks).length
    for (const a of sequences) for (const b of sequences) assert.equal(together(a, b), common(a.table, b.table), `seed ${seed}`)
    for (const run of runs(tree)) {
      if (run !== tree) assert.ok(run.blocks.length, 'a branch has a block of its own')
      assert.notEqual(run.children.length + run.ends.length, 0)
      assert.ok(run.children.length !== 1 || run.ends.length, 'a run goes on as far as it can')
    }
  }
})

test('where branches parted is told from forks alone, as after a snapshot, and never wrong', () => {
  const told = { inside: 0, between: 0, unknown: 0 }
  for (let seed = 1; seed <= 400; seed++) {
    const below = chance(seed), blockSize = 2 + below(6), sequences = family(below, blockSize)
    if (!sequences.length) continue
    for (const run of runs(forkTree(sequences))) {
      for (const branch of run.children.slice(1)) {
        const parted = parting(run, branch, { copiedFrom: new Map(), blockSize })
        const others = run.sequences.filter((sequence) => !branch.sequences.includes(sequence))
        const alike = Math.max(...branch.sequences.flatMap((one) => others.map((other) => common(one.text, other.text))))
        const slots = alike - branch.from * blockSize
        if (parted) assert.deepEqual(parted, { source: null, slots }, `seed ${seed}`)
        told[parted ? 'inside' : slots <= 0 ? 'between' : 'unknown']++
      }
    }
  }
  assert.ok(told.inside > 400 && told.between > 100 && told.unknown < 100, JSON.stringify(told))
})

const SIZE = 4

function forked(at, ...tables) {
  return tables.map((table, i) => ({ id: i + 1, parent: i ? 1 : null, at: i ? at : null, tokens: table.length * SIZE, table }))
}

function partings(sequences, copies = []) {
  const tree = forkTree(sequences)
  return tree.children.map((branch) => parting(tree, branch, { copiedFrom: new Map(copies), blockSize: SIZE }))
}

test('a copy that was seen says its source and how much both hold alike', () => {
  assert.deepEqual(partings(forked(6, [1, 2], [1, 3]), [[3, { source: 2, fill: 2 }]]), [null, { source: 2, slots: 2 }])
  assert.deepEqual(partings(forked(6, [1, 3], [1, 2]), [[3, { source: 2, fill: 2 }]]), [{ source: 2, slots: 2 }, null])
})

test('whole blocks hide the slot, not that it was inside a block', () => {
  assert.deepEqual(partings(forked(8, [1, 2], [1, 3])), [null, { source: null, slots: null }])
  assert.deepEqual(partings(forked(8, [1, 2], [1, 3]), [[3, { source: 2, fill: 4 }]]), [null, { source: 2, slots: null }])
})

test('a fork between two blocks copies nothing', () => {
  assert.deepEqual(partings(forked(4, [1, 2], [1, 3])), [null, null])
})

test('children of a sequence that is gone parted where they left it', () => {
  const [, ...children] = forked(6, [], [1, 2], [1, 3])
  assert.deepEqual(partings(children), [null, { source: null, slots: 2 }])
})

test('a line of descent that is broken says nothing', () => {
  const sequences = forked(6, [1, 2], [1, 3])
  sequences[1].parent = 9
  assert.deepEqual(partings(sequences), [null, null])
})

test('tables with nothing in common, and one alone', () => {
  const tree = forkTree(forked(0, [1], [2]))
  assert.deepEqual([tree.blocks, tree.children.length], [[], 2])
  assert.deepEqual(forkTree(forked(0, [1, 2])), { from: 0, blocks: [1, 2], sequences: forked(0, [1, 2]), ends: forked(0, [1, 2]), children: [] })
})

// -- what was dropped ------------------------------------------------------------------------------------------------

function search() {
  const model = new Model()
  model._clear(20)
  Object.assign(model, { seq: 0, blockSize: SIZE, loaded: true })
  let now = 0, seq = 0
  const dropped = new Dropped(model, () => now)
  const say = (kind, fields) => {
    const event = { seq: ++seq, kind, reason: 'test', ...fields }
    const shown = dropped.note(event, event.session ?? model.sessionOf(event.sequence))
    model.apply(event)
    return shown
  }
  const begin = (sequence, blocks, parent) => {
    if (parent) say('fork', { session: 7, sequence, parent, at: 4 })
    else say('state', { session: 7, sequence, state: 'decode' })
    blocks.forEach((block, logical) => say(parent && !logical ? 'share' : 'allocate', { sequence, logical, block, ref: 1, at: 4 }))
  }
  const drop = (sequence, reason) => {
    say('truncate', { sequence, at: 0, reason })
    return say('end', { sequence, reason })
  }
  return { model, dropped, say, begin, drop, pass: (ms) => (now += ms) }
}

test('a dropped beam is shown for a while where it was, and counted', () => {
  const { model, dropped, begin, drop, pass } = search()
  begin(1, [1, 2])
  begin(2, [1, 3], 1)
  begin(3, [1, 4, 5], 1)
  assert.equal(drop(3, 'a likelier beam went on'), true)
  assert.deepEqual(dropped.fading(7).map(({ id, shared, blocks }) => ({ id, shared, blocks })), [{ id: 3, shared: [1], blocks: [4, 5] }])
  assert.deepEqual(dropped.count(7), { beam: 1, reply: 0 })
  const tree = forkTree([...model.sessions.get(7).sequences.values()])
  assert.equal(leftFrom(tree, [1]), tree)
  assert.equal(leftFrom(tree, [1, 3]), tree.children[1])
  pass(FADES)
  assert.deepEqual(dropped.fading(7), [])
  assert.deepEqual(dropped.count(7), { beam: 1, reply: 0 })
})

test('many dropped beams are counted, and only some are drawn', () => {
  const { dropped, begin, drop } = search()
  begin(1, [1])
  for (let id = 2; id < 12; id++) {
    begin(id, [1, id], 1)
    drop(id, 'a likelier beam went on')
  }
  assert.equal(dropped.fading(7).length, 4)
  assert.equal(dropped.count(7).beam, 10)
})

test('replies are counted until the next turn; a reply that just ends is not dropped', () => {
  const { dropped, say, begin, drop } = search()
  begin(1, [1, 2])
  begin(2, [1, 3], 1)
  begin(3, [1, 4], 1)
  assert.equal(drop(3, 'stop'), false)
  drop(2, 'another reply was chosen')
  assert.deepEqual(dropped.count(7), { beam: 0, reply: 1 })
  say('state', { session: 7, sequence: 1, state: 'resting' })
  say('state', { session: 7, sequence: 4, state: 'queued' })
  assert.deepEqual(dropped.count(7), { beam: 0, reply: 0 })
})

test('nothing is kept of a session that has ended', () => {
  const { dropped, begin, drop } = search()
  begin(1, [1, 2])
  begin(2, [1, 3], 1)
  drop(2, 'a likelier beam went on')
  drop(1, 'stop')
  assert.deepEqual([dropped.fading(7), dropped.count(7)], [[], { beam: 0, reply: 0 }])
})
