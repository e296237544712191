// The fork tree of one session: what its sequences share is the trunk, and each branch leaves it where its table differs.

import { Chips } from './chips.js'
import { el, reconcile, setData, setText, term } from './dom.js'
import { count, ids, plural } from './format.js'
import { forkTree, leftFrom, parting } from './tree.js'

const TRUNK_CHIPS = 18, BRANCH_CHIPS = 8 // the first one and the last ones; a gap stands for those between
const ROW = 30 // px, about: a tree that loses a branch does not pull up what is below it

export class Branches {
  constructor(model, select) {
    this.model = model
    this.select = select
    this.chosen = null // a sequence that the viewer clicked on
    this.name = el('span', { class: 'kv-you' })
    this.state = el('span', { class: 'kv-state' })
    this.size = el('span', { class: 'kv-quiet' })
    this.dropped = el('span', { class: 'kv-quiet kv-dropped-count', dataset: { testid: 'kv-dropped' } })
    this.about = el('p', { class: 'kv-leaves' })
    this.times = el('b')
    this.trunkSize = el('span', { class: 'kv-quiet' })
    this.chips = new Chips(model, TRUNK_CHIPS)
    this.list = el('ul', { class: 'kv-branches', role: 'group' })
    this.trunk = newItem('kv-fork-trunk', [
      el('div', { class: 'kv-row-head' }, [
        term('Trunk', 'fork trunk'),
        this.trunkSize,
        el('span', { class: 'kv-times' }, [this.times, el('span', { class: 'kv-wide', text: ' sequences' })]),
      ]),
      this.chips.root,
    ])
    this.trunk.append(this.list)
    this.tree = el('div', { class: 'kv-fork-tree', role: 'tree', tabIndex: 0 }, [this.trunk])
    this.root = el('div', { class: 'kv-own kv-forked', dataset: { testid: 'kv-fork-tree' } }, [
      el('div', { class: 'kv-row-head' }, [this.name, this.state, this.size, this.dropped]),
      this.about,
      this.tree,
    ])
    this.root.view = this
    this._spare = [] // rows whose branch is gone, for branches to come
    this._rows = 0
    this._listen()
  }

  /** `about` says something of the trunk. */
  update(session, about, dropped) {
    this.session = session
    const all = [...session.sequences.values()]
    const sequences = all.filter(({ table }) => table.length)
    const tree = sequences.length ? forkTree(sequences) : { from: 0, blocks: [], sequences: [], ends: [], children: [] }
    this._head(session, all, sequences, dropped.count(session.id))
    setText(this.about, about(tree.blocks))
    this.about.hidden = !this.about.textContent
    this._trunk(tree)
    this._fading = new Map()
    for (const gone of dropped.fading(session.id)) {
      const run = leftFrom(tree, gone.shared)
      this._fading.set(run, [...(this._fading.get(run) ?? []), gone])
    }
    this._drawn = 0
    this._branches(this.list, tree)
    this._keepHeight(session)
  }

  _head({ id, state }, all, sequences, counts) {
    const each = sequences.reduce((sum, { table }) => sum + table.length, 0)
    const once = new Set(sequences.flatMap(({ table }) => table)).size
    const waiting = all.length - sequences.length
    setData(this.root, { session: id, state, sequences: all.length })
    setText(this.name, id === this.model.own ? 'You' : `Session ${id}`)
    setText(this.state, state)
    setText(this.size, `${plural(sequences.length, 'sequence')}${waiting ? ` and ${count(waiting)} without blocks` : ''} in ${plural(once, 'block')}; ${count(each)} without sharing`)
    const gone = inAll(counts)
    setText(this.dropped, gone && `${gone} dropped so far`)
    setData(this.dropped, { count: counts.beam + counts.reply })
    setAttribute(this.tree, 'aria-label', id === this.model.own ? 'Your fork tree' : `Fork tree of session ${id}`)
  }

  _trunk({ blocks, sequences, ends }) {
    const all = sequences.length
    const tokens = Math.max(0, ...sequences.map((sequence) => sequence.tokens))
    this.chips.update(blocks, tokens)
    setText(this.trunkSize, blocks.length ? plural(blocks.length, 'block') : 'nothing in common')
    setText(this.times, `×${all}`)
    setData(this.trunk, { run: blocks.join(','), sequences: all, ends: ends.map(({ id }) => id).join(',') })
    describeItem(this.trunk, blocks, blocks.length ? `Trunk: ${named(blocks)}, in the tables of all ${plural(all, 'sequence')}.` : 'These sequences share no block.')
  }

  /** What leaves a run: branches, sequences that end with it while others go on, and what was just dropped. */
  _branches(list, tree) {
    const items = tree.children.map((branch) => ({ key: `b${branch.blocks[0]}`, tree, branch }))
    if (tree.ends.length && tree.sequences.length > 1) items.push({ key: 'ends', tree, ends: tree.ends })
    for (const gone of this._fading.get(tree) ?? []) items.push({ key: `d${gone.id}`, gone })
    this._drawn += items.length
    const create = () => this._spare.pop() ?? this._newRow()
    this._spare.push(...reconcile(list, items, (item) => item.key, create, (node, item) => this._row(node, item)))
  }

  _newRow() {
    const chips = new Chips(this.model, BRANCH_CHIPS)
    const parted = el('span', { class: 'kv-parted' }), label = el('span', { class: 'kv-branch-label' })
    const list = el('ul', { class: 'kv-branches', role: 'group' })
    const row = newItem('kv-branch', [el('div', { class: 'kv-run' }, [chips.root, label, parted])], 'li')
    row.append(list)
    row.parts = { chips, parted, label, list }
    return row
  }

  _row(row, { tree, branch, ends, gone }) {
    row.classList.toggle('kv-dropped', Boolean(gone))
    if (branch) this._branch(row, tree, branch)
    else if (ends) this._ends(row, ends)
    else this._gone(row, gone)
  }

  _branch(row, tree, branch) {
    const { parts } = row
    const { blocks, sequences, ends } = branch
    const parted = parting(tree, branch, this.model)
    const leaf = sequences.length === 1 ? sequences[0] : null
    parts.chips.update(blocks, Math.max(...sequences.map(({ tokens }) => tokens)), branch.from)
    setText(parts.parted, parted ? inShort(parted, blocks[0]) : '')
    setText(parts.label, leaf ? this._leaf(leaf) : '')
    setData(row, { run: blocks.join(','), sequences: sequences.length, ends: ends.map(({ id }) => id).join(',') })
    row.sequence = leaf?.id ?? null
    const whose = leaf ? `${leaf.state === 'resting' ? 'rests' : leaf.state}, sequence ${leaf.id}` : `in the tables of ${sequences.length} sequences`
    describeItem(row, blocks, `Branch: ${named(blocks)}, ${whose}.${parted ? ` ${inWords(parted, blocks[0])}` : ''}`)
    this._branches(parts.list, branch)
  }

  /** Sequences that have all blocks of the run above and none of their own. */
  _ends(row, ends) {
    const { parts } = row
    const those = ends.length === 1 ? this._leaf(ends[0]) : `sequences ${ids(ends.map(({ id }) => id))}`
    parts.chips.update([], 0)
    setText(parts.parted, '')
    setText(parts.label, `${those}: no block of ${ends.length === 1 ? 'its' : 'their'} own`)
    setData(row, { run: '', sequences: ends.length, ends: ends.map(({ id }) => id).join(',') })
    row.sequence = ends[0].id
    describeItem(row, ends[0].table, `${ends.length === 1 ? `Sequence ${ends[0].id} has` : `Sequences ${ids(ends.map(({ id }) => id))} have`} no block of ${ends.length === 1 ? 'its' : 'their'} own.`)
    this._clear(parts.list)
  }

  _leaf({ id, state }) {
    return `sequence ${id}${state === this.session.state ? '' : ` · ${state}`}`
  }

  _gone(row, { id, blocks }) {
    const { parts } = row
    parts.chips.update([], 0)
    setText(parts.label, ids(blocks))
    setText(parts.parted, `sequence ${id}, dropped`)
    setData(row, { run: '', sequences: 0, ends: '' })
    row.sequence = null
    describeItem(row, [], `Sequence ${id} was dropped; ${named(blocks)} ${blocks.length === 1 ? 'was' : 'were'} its own.`)
    this._clear(parts.list)
  }

  _clear(list) {
    this._spare.push(...reconcile(list, [], null, null, null))
  }

  /** While the turn goes on, the tree only gets higher. */
  _keepHeight({ state }) {
    this._rows = state === 'resting' ? 0 : Math.max(this._rows, this._drawn)
    const height = `${this._rows * ROW}px`
    if (this.list.style.minHeight !== height) this.list.style.minHeight = height
  }

  // -- keys: the tree has one tab stop, the arrows move in it -----------------------------------------------------

  _listen() {
    this.tree.addEventListener('keydown', (event) => this._key(event))
    this.tree.addEventListener('blur', () => this._move(null))
    this.tree.addEventListener('click', (event) => this._choose(event.target.closest('[role=treeitem]')))
  }

  _key(event) {
    if (event.target !== this.tree) return
    const items = [this.trunk, ...this.trunk.querySelectorAll('[role=treeitem]')]
    const at = items.indexOf(this._cursor)
    const next = { ArrowDown: Math.min(at + 1, items.length - 1), ArrowUp: Math.max(at - 1, 0), Home: 0, End: items.length - 1 }
    if (event.key in next) this._move(items[next[event.key]])
    else if ((event.key === 'Enter' || event.key === ' ') && at >= 0) this._pin(items[at])
    else return
    event.preventDefault()
  }

  _move(item) {
    this._cursor?.classList.remove('kv-cursor')
    this._cursor = item
    item?.classList.add('kv-cursor')
    if (item) this.tree.setAttribute('aria-activedescendant', item.id)
    else this.tree.removeAttribute('aria-activedescendant')
    this.select.hover(item?.kvBlocks ?? null, item?.kvNote)
    item?.scrollIntoView({ block: 'nearest' })
  }

  _pin(item) {
    this.select.pin(item.kvBlocks, item.kvNote)
    this._choose(item)
  }

  _choose(item) {
    if (item?.sequence != null) this.chosen = item.sequence
  }
}

let items = 0

function newItem(name, children, tag = 'div') {
  return el(tag, { class: name, role: 'treeitem', id: `kv-branch-${++items}` }, children)
}

/** What a pointer, a key and a screen reader find in a row. */
function describeItem(node, blocks, text) {
  node.kvBlocks = blocks
  node.kvNote = text
  setAttribute(node, 'aria-label', text)
}

/** How many were dropped, in words; empty if none. */
export function inAll({ beam, reply }) {
  const parts = [beam && plural(beam, 'beam'), reply && (reply === 1 ? '1 reply' : `${count(reply)} replies`)]
  return parts.filter(Boolean).join(' and ')
}

function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value)
}

function named(blocks) {
  return `${blocks.length === 1 ? 'block' : 'blocks'} ${ids(blocks)}`
}

function inShort({ source, slots }, block) {
  const after = slots === null ? '' : ` after ${plural(slots, 'slot')}`
  return source === null ? `parted${after || ' inside a block'}` : `copied ${source} → ${block}${after}`
}

function inWords({ source, slots }, block) {
  const where = slots === null ? '' : ` after ${plural(slots, 'slot')}`
  return source === null
    ? `It parted from the others inside a block${where}.`
    : `Block ${block} was copied on write from block ${source}${where}.`
}
