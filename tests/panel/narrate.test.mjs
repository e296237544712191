import assert from 'node:assert/strict'
import { test } from 'node:test'

import { bytes, ids, percent, times } from '../../static/format.js'
import { Model } from '../../static/model.js'
import { Story, tell } from '../../static/narrate.js'

/** What is told of these events to the one whose session is 1. */
function told(events, prepare = () => {}) {
  const model = new Model()
  model.own = 1
  prepare(model)
  const story = new Story(model)
  for (const { session = 1, ...event } of events) story.add({ reason: 'test', sequence: session, ...event }, session)
  return story.lines('all').map((line) => tell(line, story.isMine(line)))
}

test('copy-on-write says who else reads the block', () => {
  const copy = [{ kind: 'copy', block: 97, source: 12, fill: 9 }]
  const shared = (model) => ((model.ref = { 12: 4 }), (model.pinned = { 12: 0 }))
  assert.deepEqual(told(copy, shared), ['You wrote into a block that 3 others read, so it was copied: 12 → 97.'])
  const alone = (model) => ((model.ref = { 12: 1 }), (model.pinned = { 12: 1 }))
  assert.deepEqual(told(copy, alone), ['You wrote into a block of the pinned system prompt, so it was copied: 12 → 97.'])
  assert.deepEqual(told([{ ...copy[0], session: 5 }], (model) => ((model.ref = { 12: 2 }), (model.pinned = { 12: 0 }))), [
    'Session 5 wrote into a block that 1 other reads, so it was copied: 12 → 97.',
  ])
})

test('what a session does to several blocks is one sentence', () => {
  const share = (block, at) => ({ kind: 'share', block, at, reason: 'prefix hit' })
  assert.deepEqual(told([share(1, 4), share(2, 8), share(3, 10)]), [
    'You now read blocks 1 to 3: 10 tokens found, not computed again.',
  ])
  const release = (block) => ({ kind: 'release', block, ref: 0, becomes: 'free', session: 2 })
  assert.deepEqual(told([release(9), release(4)]), ['Blocks 9 and 4 are free again.'])
})

test('sessions that take turns do not cut each other’s sentences', () => {
  const write = (session, fill) => ({ kind: 'write', block: session, fill, at: fill, session })
  assert.deepEqual(told([write(1, 1), write(2, 5), write(1, 2), write(2, 6)]), [
    'You filled block 1 to 2 of 16 slots.',
    'Session 2 filled block 2 to 6 of 16 slots.',
  ])
})

test('the filters', () => {
  const model = new Model()
  const story = new Story(model)
  const add = (kind, session) => story.add({ kind, reason: 'test', sequence: session, block: 0, source: 0 }, session)
  add('copy', 1)
  add('end', 2)
  assert.deepEqual([story.lines('all').length, story.lines('copies').length, story.lines('mine').length], [2, 1, 0])
  model.own = 2
  story.ownChanged()
  assert.deepEqual(story.lines('mine').map((line) => line.kind), ['end'])
})

test('every kind of event has a sentence', () => {
  const line = { block: 1, blocks: [1], source: 2, sources: [2], sequences: new Set([2]), times: 1, branches: 1, others: 0, at: 3, fill: 1, slots: 4, ref: 0, becomes: 'used', name: 'a', state: 'queued', session: 2 }
  const kinds = 'allocate share copy write publish unpublish release pin evict fork truncate preempt state end'.split(' ')
  const impersonal = ['unpublish', 'pin', 'evict'] // these name no sequence
  for (const kind of kinds) {
    for (const mine of [true, false]) {
      const sentence = tell({ ...line, kind, session: impersonal.includes(kind) ? null : 2 }, mine)
      assert.match(sentence, /^[A-Z].*\.$/, kind)
      assert.doesNotMatch(sentence, /undefined|null|NaN/, kind)
    }
  }
})

/** What is told of a session with these sequences to its own viewer; `at` is the time of each event in ms. */
function toldOfBranches(events, sequences = [1, 2, 3]) {
  const model = new Model()
  model._clear(200)
  model.own = 1
  model.sessions.set(1, { sequences: new Map(sequences.map((id) => [id, {}])) })
  let now = 0
  const story = new Story(model, () => now)
  for (const { time = now, ...event } of events) {
    now = time
    story.add({ reason: 'test', sequence: 1, ...event }, 1)
  }
  return story.lines('all').map((line) => tell(line, true))
}

const fork = (sequence, parent = 1, at = 96) => [
  { kind: 'fork', session: 1, sequence, parent, at },
  { kind: 'share', reason: 'fork', sequence, logical: 0, block: 1, ref: sequence, at: 16 },
]

test('forks are one sentence, and what they share goes without saying', () => {
  assert.deepEqual(toldOfBranches(fork(2), [1]), ['You forked after 96 tokens: both branches read the same blocks so far.'])
  assert.deepEqual(toldOfBranches([2, 3, 4].flatMap((id) => fork(id)), [1]), [
    'You forked into 4 branches after 96 tokens: all read the same blocks so far.',
  ])
  assert.deepEqual(toldOfBranches([...fork(2), ...fork(3, 2, 97)]), ['You forked 2 times, last after 97 tokens: a fork copies nothing.'])
})

test('branches that part in one step are one sentence', () => {
  const copies = [97, 98, 99].map((block, i) => ({ kind: 'copy', sequence: i + 1, block, source: 12, fill: 9 }))
  assert.deepEqual(toldOfBranches(copies), ['Your branches parted inside block 12, so each wrote into a copy: blocks 97 to 99.'])
})

test('dropped beams are counted in one sentence, with what became free', () => {
  const drop = (sequence, block) => [
    { kind: 'truncate', reason: 'a likelier beam went on', sequence, at: 0 },
    { kind: 'release', reason: 'a likelier beam went on', sequence, logical: 1, block, ref: 0, becomes: 'free' },
    { kind: 'release', reason: 'a likelier beam went on', sequence, logical: 0, block: 1, ref: 2, becomes: 'used' },
    { kind: 'end', reason: 'a likelier beam went on', sequence },
  ]
  assert.deepEqual(toldOfBranches([...drop(2, 12), ...drop(3, 15)]), [
    'Blocks 12 and 15 are free again.',
    'You dropped 2 beams: likelier ones went on.',
  ])
})

test('replies that end, rest or are not chosen', () => {
  const rests = { kind: 'state', session: 1, sequence: 2, state: 'resting' }
  assert.deepEqual(toldOfBranches([rests]), ['A branch of yours ended: its table rests and keeps its blocks.'])
  assert.deepEqual(toldOfBranches([{ kind: 'end', reason: 'stop', sequence: 2 }]), ['A branch of yours ended; the rest goes on.'])
  assert.deepEqual(toldOfBranches([{ kind: 'end', reason: 'another reply was chosen', sequence: 2 }]), [
    'You chose a reply: another one gave back what only it held.',
  ])
})

test('a beam search does not flood: a line a kind every two seconds', () => {
  const step = (n) => [
    { time: 33 * n, kind: 'fork', session: 1, sequence: 100 + n, parent: 1, at: 96 + n },
    ...[1, 2, 3].map((sequence) => ({ kind: 'copy', sequence, block: 20 + sequence, source: 12, fill: 9 })),
    ...[1, 2, 3].map((sequence) => ({ kind: 'write', sequence, block: 20 + sequence, fill: 10, at: 97 + n })),
    { kind: 'end', reason: 'a likelier beam went on', sequence: 99 + n },
  ]
  const lines = toldOfBranches(Array.from({ length: 120 }, (_, n) => step(n)).flat()) // four seconds
  assert.ok(lines.length <= 8, lines.join('\n'))
  assert.match(lines[0], /^You forked \d\d times/)
})

test('numbers in words', () => {
  assert.deepEqual([percent(0, 9), percent(1, 1e6), percent(1, 8), percent(999999, 1e6), percent(5, 5), percent(0, 0)], [
    '0 %', '< 0.1 %', '12.5 %', '> 99.9 %', '100 %', '0 %',
  ])
  assert.deepEqual([bytes(0), bytes(1023), bytes(1536), bytes(200 * 1024 ** 2)], ['0 B', '1,023 B', '1.5 KiB', '200 MiB'])
  assert.deepEqual([times(11.64), times(1234.5)], ['11.6×', '1,235×'])
  assert.deepEqual([ids([3]), ids([3, 7]), ids([5, 4, 3]), ids([1, 3, 5, 7, 9, 11, 13])], [
    '3', '3 and 7', '3 to 5', '1, 3, 5, 7 … 13 (7 in all)',
  ])
})
