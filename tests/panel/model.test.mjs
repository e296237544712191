import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'

import { Gap, Model, expand, runs } from '../../static/model.js'

const here = dirname(fileURLToPath(import.meta.url))
const root = join(here, '..', '..')
const ownPython = join(root, '.venv', 'bin', 'python')
const python = process.env.PYTHON ?? (existsSync(ownPython) ? ownPython : 'python3')

/** Logs of the real block pool, with Python's own snapshot after every event: see record.py. */
const logs = JSON.parse(
  execFileSync(python, [join(here, 'record.py')], { cwd: root, env: { ...process.env, PYTHONPATH: root }, maxBuffer: 1 << 28, encoding: 'utf8' }),
)

function without({ time, ...rest }) {
  return rest
}

function loaded(snapshot) {
  const model = new Model()
  model.load(snapshot)
  return model
}

for (const { name, snapshots, events } of logs) {
  test(`replay equals Python, from every snapshot: ${name}`, () => {
    for (const start of snapshots) {
      const model = loaded(start)
      assert.deepEqual(model.toJSON(), without(start))
      const later = events.filter((event) => event.seq > start.seq)
      for (const event of later) {
        model.apply(event)
        const there = snapshots.find((snapshot) => snapshot.seq === event.seq)
        if (there) assert.deepEqual(model.toJSON(), without(there), `after event ${event.seq}`)
      }
      assert.deepEqual(model.toJSON(), without(snapshots.at(-1)))
    }
  })

  test(`roles and counts agree after every event: ${name}`, () => {
    const model = loaded(snapshots[0])
    for (const event of events) {
      model.apply(event)
      const roles = model.roles(), counts = model.counts()
      assert.equal(roles.free, counts.free)
      assert.equal(roles.idle, counts.idle)
      assert.equal(roles.private + roles.system + roles.shared, counts.used)
      assert.equal(counts.free + counts.idle + counts.used, model.numBlocks)
    }
  })

  test(`redrawing only dirty cells misses none: ${name}`, () => {
    const model = loaded(snapshots[0])
    const looks = (block) => `${model.role(block)} ${model.ref[block]} ${model.fill[block]}`
    const drawn = Array.from({ length: model.numBlocks + 1 }, (_, block) => looks(block))
    for (const event of events) {
      model.apply(event)
      for (const block of model.takeDirty()) drawn[block] = looks(block)
      for (let block = 1; block <= model.numBlocks; block++) assert.equal(drawn[block], looks(block), `event ${event.seq}`)
    }
  })
}

const [{ snapshots, events }] = logs
const empty = snapshots[0]

test('a log says all kinds at least once', () => {
  const kinds = new Set(logs.flatMap((log) => log.events.map((event) => event.kind)))
  const all = 'allocate share copy write publish unpublish release pin evict fork truncate preempt state end'.split(' ')
  assert.deepEqual(all.filter((kind) => !kinds.has(kind)), [])
})

test('an event that is not the next one is a gap, and changes nothing', () => {
  const model = loaded(empty)
  assert.throws(() => model.apply(events[1]), Gap)
  assert.deepEqual(model.toJSON(), without(empty))
})

test('a delta is taken once, and never after a hole', () => {
  const model = loaded(empty)
  const delta = (from, to) => ({ seq: [events[from].seq, events[to - 1].seq], events: events.slice(from, to) })
  model.applyDelta(delta(0, 5))
  const after = JSON.stringify(model)
  model.applyDelta(delta(0, 5))
  assert.equal(JSON.stringify(model), after)
  assert.throws(() => model.applyDelta(delta(6, 8)), Gap)
  model.applyDelta(delta(5, 8))
  assert.equal(model.seq, events[7].seq)
})

test('a delta that leaves an event out is a gap', () => {
  const delta = (...which) => ({ seq: [events[0].seq, events[3].seq], events: which.map((i) => events[i]) })
  assert.throws(() => loaded(empty).applyDelta(delta(0, 1, 2)), Gap)
  assert.throws(() => loaded(empty).applyDelta(delta(0, 2, 3)), Gap)
})

test('a delta that begins before what is known adds only the rest', () => {
  const model = loaded(empty)
  for (const event of events.slice(0, 3)) model.apply(event)
  model.applyDelta({ seq: [events[1].seq, events[5].seq], events: events.slice(1, 6) })
  assert.equal(model.seq, events[5].seq)
})

test('an event that names what is not there is a gap', () => {
  const base = { seq: empty.seq + 1, reason: 'test' }
  for (const event of [
    { kind: 'write', sequence: 99, block: 1, logical: 0, fill: 1, at: 1 },
    { kind: 'fork', sequence: 99, session: 98, parent: 97, at: 0 },
    { kind: 'preempt', sequence: 99, session: 98 },
    { kind: 'no such kind' },
  ]) {
    assert.throws(() => loaded(empty).apply({ ...base, ...event }), Gap)
  }
})

test('a new snapshot replaces everything', () => {
  const model = loaded(snapshots.at(-1))
  model.load({ ...empty, epoch: 'another' })
  assert.deepEqual(model.toJSON(), { ...without(empty), epoch: 'another' })
})

test('runs and expand are inverse', () => {
  for (const table of [[], [7], [3, 4, 5, 9], [9, 8, 7], [1, 2, 4, 5, 6]]) assert.deepEqual(expand(runs(table)), table)
  assert.deepEqual(runs([3, 4, 5, 9]), [[3, 3], 9])
})

// -- derived numbers, on a state small enough to count by hand -----------------------------------------------------

/** Block size 4. System prompt of 6 tokens in blocks 1 and 2 (a tail of 2); sessions 1 and 2 read it, each copied 2. */
function worked() {
  const model = loaded({ ...empty, block_size: 4, max_model_len: 64, bytes_per_block: 1000 })
  let seq = model.seq
  const events = [
    ['pin', { block: 1, logical: 0, ref: 0, at: 6, name: 'default' }],
    ['pin', { block: 2, logical: 1, ref: 0, at: 6, name: 'default' }],
  ]
  for (const [session, copy, tail] of [[1, 3, 4], [2, 5, 6]]) {
    events.push(
      ['state', { session, sequence: session, state: 'prefill' }],
      ['share', { sequence: session, logical: 0, block: 1, ref: session, at: 4, reason: 'prefix hit' }],
      ['share', { sequence: session, logical: 1, block: 2, ref: 1, at: 6, reason: 'prefix hit' }],
      ['allocate', { sequence: session, logical: 1, block: copy, ref: 1 }],
      ['copy', { sequence: session, logical: 1, block: copy, source: 2, fill: 2 }],
      ['release', { sequence: session, logical: 1, block: 2, ref: 0, becomes: 'used' }],
      ['allocate', { sequence: session, logical: 2, block: tail, ref: 1 }],
      ['write', { sequence: session, logical: 1, block: copy, fill: 4, at: 8 }],
      ['write', { sequence: session, logical: 2, block: tail, fill: 3, at: 11 }],
    )
  }
  for (const [kind, fields] of events) model.apply({ seq: ++seq, kind, reason: 'test', ...fields })
  for (const block of [1, 2]) model.fill[block] = block === 1 ? 4 : 2 // written before they were pinned
  return model
}

test('the trunk: who reads the system prompt, and where each table leaves it', () => {
  const model = worked()
  const [system] = model.system.values()
  assert.equal(model.sharers(system), 2)
  assert.deepEqual(model.trunkOf([1, 3, 4]), { system, blocks: 1 })
  assert.equal(model.trunkOf([3]), null)
  assert.deepEqual(model.holders(1).map((h) => h.session), [1, 2])
  assert.equal(model.role(1), 'system')
  assert.equal(model.role(3), 'private')
  assert.equal(model.counters.hit_tokens, 12)
})

test('the ledger counts exactly', () => {
  assert.deepEqual(worked().ledger(), {
    sequences: 2,
    tokens: 22, // 11 each, the system prompt counted for both
    reserved: 128, // 2 sequences × 64
    blocks: 6, // 1 and 2, and two own ones each
    slots: 24,
    empty: 4, // 2 in block 2, 1 in each last block
    saved: 1, // block 1 has two references
  })
})

test('the own session', () => {
  const model = worked()
  assert.equal(model.ownSession(), null)
  assert.equal(model.ownBlocks().size, 0)
  model.own = 2
  assert.deepEqual([...model.ownBlocks()], [1, 5, 6])
})
