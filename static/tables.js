// Block tables: the system prompt as a trunk, the viewer's own table with its slots and tokens, the others in short.

import { Branches, inAll } from './branches.js'
import { Chips } from './chips.js'
import { el, reconcile, section, setData, setText, term } from './dom.js'
import { count, plural, short } from './format.js'
import { Dropped } from './tree.js'

const OTHERS = 40 // rows; the rest is counted
const TREES = 3 // fork trees of other sessions; the rest is a row each, as any other session
const TOKEN_BLOCKS = 64 // blocks of own text that are shown, the newest
const DRAWN_SLOTS = 64 // a larger block is drawn as a bar

export class Tables {
  constructor(model, select) {
    this.model = model
    this.select = select
    this.dropped = new Dropped(model)
    this.tokens = null // body of /kv/me
    this.trunks = el('div', { class: 'kv-trunks' })
    this.own = el('div', { class: 'kv-owns' })
    this.ownEmpty = el('p', { class: 'kv-teach' })
    this.trees = el('div', { class: 'kv-trees' })
    this.others = new Others(model, select)
    const tree = el('div', { class: 'kv-tree' }, [this.trunks, this.ownEmpty, this.own, this.trees, this.others.root])
    this.root = section('Block tables', 'table', [tree])
    followPointer(this.root, select)
  }

  update() {
    const systems = [...this.model.system.values()]
    reconcile(this.trunks, systems, (s) => s.name, () => new Trunk(this.model).root, (node, s) => node.view.update(s))
    this._updateOwn()
    this._updateTrees()
    this.others.update()
  }

  /** One table of the viewer's, or the tree of several. */
  _updateOwn() {
    const session = this.model.ownSession()
    const held = session && [...session.sequences.values()].find(({ table }) => table.length)
    setText(this.ownEmpty, held ? '' : this._teach(session))
    this.ownEmpty.hidden = Boolean(held)
    const View = held && this._isForked(session) ? OwnBranches : OwnTable
    reconcile(
      this.own,
      held ? [held] : [],
      () => View.name,
      () => new View(this.model, this.select).root,
      (node) => node.view.update(session, held, this.tokens?.session === session.id ? this.tokens : null, this.dropped),
    )
  }

  _updateTrees() {
    const forked = [...this.model.sessions.values()].filter((session) => session.id !== this.model.own && this._isForked(session))
    reconcile(
      this.trees,
      forked.slice(0, TREES),
      (session) => session.id,
      () => new Branches(this.model, this.select).root,
      (node, session) => node.view.update(session, () => also(this.model, session), this.dropped),
    )
  }

  /** Whether there is a tree to show: two tables, or one that was just dropped. */
  _isForked({ id, sequences }) {
    const tables = [...sequences.values()].filter(({ table }) => table.length).length
    return tables > 1 || (tables === 1 && this.dropped.fading(id).length > 0)
  }

  _teach(session) {
    const first = [...this.model.system.values()][0]
    const shared = this.model.sharing === 'off' ? 0 : Math.floor((first?.tokens ?? 0) / this.model.blockSize)
    const ready = shared ? `The first ${plural(shared, 'block')} of your table ${shared === 1 ? 'is' : 'are'} here already: computed once, shared by all.` : ''
    if (session?.state === 'queued') return 'Your message waits for room in the pool.'
    if (this.model.own === null) return `Every table starts with the trunk and goes on with blocks of its own. ${ready && 'New sessions find these blocks here: nobody computes them again.'}`
    return `Say something. ${ready}`
  }
}

/** Highlight the blocks of whatever is pointed at below `root` (`data-block`, or a node's own `kvBlocks`); pin on click. */
function followPointer(root, select) {
  const find = (event) => {
    const node = event.target.closest('[data-block], [data-run], .kv-other[data-session]')
    if (!node || !root.contains(node)) return null
    const blocks = node.kvBlocks ?? [Number(node.dataset.block)]
    return { blocks, note: node.kvNote ?? '' }
  }
  root.addEventListener('pointerover', (event) => {
    const found = find(event)
    select.hover(found?.blocks ?? null, found?.note)
  })
  root.addEventListener('pointerleave', () => select.hover(null))
  root.addEventListener('click', (event) => {
    const found = find(event)
    if (found) select.pin(found.blocks, found.note)
  })
}

/** One system prompt, drawn once, with the number of sessions that read it. */
class Trunk {
  constructor(model) {
    this.model = model
    this.name = el('span', { class: 'kv-name' })
    this.size = el('span', { class: 'kv-quiet' })
    this.times = el('b')
    this.noun = el('span', { class: 'kv-wide' })
    this.chips = new Chips(model)
    const times = el('span', { class: 'kv-times' }, [this.times, this.noun])
    const head = el('div', { class: 'kv-row-head' }, [term('System prompt', 'trunk'), this.name, this.size, times])
    this.root = el('div', { class: 'kv-trunk', dataset: { testid: 'kv-system' } }, [head, this.chips.root])
    this.root.view = this
  }

  update(system) {
    const sharers = this.model.sharers(system)
    setData(this.root, { sharers, name: system.name })
    setText(this.name, this.model.system.size > 1 || system.name !== 'default' ? short(system.name) : '')
    setText(this.size, `${plural(system.tokens, 'token')} in ${plural(system.table.length, 'block')}`)
    setText(this.times, `×${count(sharers)}`)
    setText(this.noun, sharers === 1 ? ' session' : ' sessions')
    this.chips.update(system.table, system.tokens)
  }
}

/** The viewer's own sequence: table, last block slot by slot, and the text that is in it. */
class OwnTable {
  constructor(model, select) {
    this.model = model
    this.state = el('span', { class: 'kv-state' })
    this.size = el('span', { class: 'kv-quiet' })
    this.leaves = el('p', { class: 'kv-leaves' })
    this.chips = new Chips(model)
    this.slots = new Slots()
    this.text = new TokenStrip(model, select)
    const head = el('div', { class: 'kv-row-head' }, [el('span', { class: 'kv-you', text: 'You' }), this.state, this.size])
    this.root = el('div', { class: 'kv-own', dataset: { testid: 'kv-own-table' } }, [
      head,
      this.leaves,
      el('div', { class: 'kv-logical-row' }, [
        el('span', { class: 'kv-axis', 'aria-hidden': 'true' }, [el('span', { text: 'logical' }), el('span', { text: 'block' })]),
        this.chips.root,
      ]),
      this.slots.root,
      this.text.root,
    ])
    this.root.view = this
  }

  update(session, sequence, texts, dropped) {
    const { tokens, table } = sequence
    setData(this.root, { tokens, blocks: table.join(','), state: session.state, sequence: sequence.id })
    setText(this.state, session.state)
    setText(this.size, `${plural(tokens, 'token')} in ${plural(table.length, 'block')}`)
    setText(this.leaves, `${leaving(this.model, table)} ${also(this.model, session)} ${went(sequence, dropped.count(session.id))}`.trim())
    this.chips.update(table, tokens)
    this.slots.update(table, tokens, this.model.blockSize)
    this.text.update(textOf(texts, sequence.id))
  }
}

/** The viewer's own sequences as a tree, and the text of one of them. */
class OwnBranches {
  constructor(model, select) {
    this.model = model
    this.branches = new Branches(model, select)
    this.text = new TokenStrip(model, select)
    this.root = this.branches.root
    this.root.append(this.text.root)
    this.root.view = this
  }

  update(session, first, texts, dropped) {
    this.branches.update(session, (trunk) => `${leaving(this.model, trunk)} ${also(this.model, session)}`.trim(), dropped)
    const shown = session.sequences.has(this.branches.chosen) ? this.branches.chosen : first.id
    this.text.update(textOf(texts, shown), shown)
  }
}

function textOf(texts, sequence) {
  return texts?.sequences.find(({ id }) => id === sequence)?.tokens ?? null
}

/** Where a sequence comes from, and what became of the others, in a sentence or two. */
function went({ parent, at }, counts) {
  const from = parent === null ? '' : `Forked from sequence ${parent} after ${plural(at, 'token')}.`
  const gone = inAll(counts)
  return gone ? `${from} Dropped: ${gone}.` : from
}

/** With whom a session shares blocks beside the system prompt, as a sentence; empty if with nobody. */
function also(model, session) {
  const { blocks, others } = across(model, session)
  if (!blocks) return ''
  const named = others.slice(0, 3).map((id) => (id === model.own ? 'you' : `session ${id}`))
  const left = others.length - named.length
  const whom = left ? `${named.join(', ')} and ${count(left)} more` : named.join(' and ')
  return `Shares ${plural(blocks, 'block')} of text with ${whom}.`
}

/** How many blocks of a session's tables are in others' tables too, outside the system prompts, and in whose. */
function across(model, { id, sequences }) {
  const held = model.acrossSessions()
  const blocks = new Set([...sequences.values()].flatMap(({ table }) => table).filter((block) => held.has(block)))
  const others = new Set([...blocks].flatMap((block) => [...held.get(block)]))
  others.delete(id)
  return { blocks: blocks.size, others: [...others].sort((a, b) => (b === model.own) - (a === model.own) || a - b) }
}

/** Where a table leaves the trunk, as a sentence. */
function leaving(model, table) {
  const trunk = model.trunkOf(table)
  if (!trunk) return 'Shares nothing with a system prompt.'
  const { system, blocks } = trunk
  const all = system.table.length
  if (blocks === all) return `Shares all ${plural(all, 'block')} of the system prompt.`
  const last = system.table[blocks], next = table[blocks]
  const shares = `Shares ${blocks} of ${all} blocks.`
  if (blocks < all - 1 || next === undefined) return shares
  if (model.copiedFrom.get(next)?.source === last) return `${shares} The prompt ends inside block ${last}, so writing on copied it: ${last} → ${next}.`
  return `${shares} The prompt ends inside block ${last}; this table has block ${next} in its place.`
}

/** The last block, one square a slot. */
class Slots {
  constructor() {
    this.label = el('span', { class: 'kv-slots-label' })
    this.value = el('span', { class: 'kv-slots-value' })
    this.cells = el('span', { class: 'kv-slots-cells', 'aria-hidden': 'true' })
    this.root = el('div', { class: 'kv-slots' }, [this.label, this.cells, this.value])
  }

  update(table, tokens, size) {
    const filled = tokens - (table.length - 1) * size
    setText(this.label, `Last block ${table.at(-1)}`)
    setText(this.value, `${filled} of ${size} slots`)
    setData(this.root, { block: table.at(-1), filled })
    const drawn = Math.min(size, DRAWN_SLOTS)
    while (this.cells.childElementCount < drawn) this.cells.append(el('span'))
    const full = Math.round((filled * drawn) / size)
    for (let i = 0; i < drawn; i++) this.cells.children[i].classList.toggle('kv-full', i < full)
  }
}

/** The viewer's own text, token by token, cut where a new block begins. */
class TokenStrip {
  constructor(model, select) {
    this.model = model
    this.select = select
    this.whose = el('span', { class: 'kv-quiet' })
    this.earlier = el('span', { class: 'kv-quiet' })
    this.text = el('div', { class: 'kv-tokens', tabIndex: 0, role: 'region', 'aria-label': 'Your text, by blocks' })
    this._follow = true // stay at the newest token, unless the reader scrolled away from it
    this.text.addEventListener('scroll', () => {
      this._follow = this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 8
    })
    const head = el('div', { class: 'kv-row-head' }, [term('Your text in these blocks', 'tokens'), this.whose, this.earlier])
    this.root = el('div', { class: 'kv-text' }, [head, this.text])
  }

  /** `sequence`: whose text it is, where the viewer has several. */
  update(tokens, sequence) {
    this.root.hidden = !tokens?.length
    if (!tokens?.length || tokens === this._shown) return
    this._shown = tokens
    setText(this.whose, sequence === undefined ? '' : `sequence ${sequence}; click another branch to read it`)
    const groups = byBlock(tokens)
    const shown = groups.slice(-TOKEN_BLOCKS)
    const left = groups.length - shown.length
    setText(this.earlier, left ? `${plural(left, 'earlier block')} not shown` : '')
    reconcile(this.text, shown, (group) => group.logical, newTokenGroup, (node, group) => updateTokenGroup(node, group, this.model))
    if (this._follow) this.text.scrollTop = this.text.scrollHeight
  }
}

/** Tokens in runs that are in one block: `[{logical, block, tokens}]`. */
export function byBlock(tokens) {
  const groups = []
  for (const token of tokens) {
    let group = groups.at(-1)
    if (group?.block !== token.block) groups.push((group = { logical: groups.length, block: token.block, tokens: [] }))
    group.tokens.push(token)
  }
  return groups
}

function newTokenGroup() {
  return el('span', { class: 'kv-token-block' })
}

function updateTokenGroup(node, { logical, block, tokens }, model) {
  setData(node, { block, role: model.role(block), odd: logical % 2 })
  reconcile(node, tokens.map((token, i) => ({ ...token, i })), (token) => token.i, newToken, updateToken)
}

function newToken() {
  return el('span', { class: 'kv-token' })
}

function updateToken(node, { text, block, slot }) {
  setText(node, text === '' ? '·' : text)
  setData(node, { block, slot })
  node.kvNote = `Token ${JSON.stringify(text)} is in slot ${slot} of block ${block}.`
}

/** All other sessions, a row each. */
class Others {
  constructor(model, select) {
    this.model = model
    this.title = el('span', { class: 'kv-quiet' })
    this.head = el('div', { class: 'kv-other kv-other-head', 'aria-hidden': 'true' })
    for (const text of ['Session', 'State', 'Table', 'Tokens', 'Blocks', 'Off trunk']) this.head.append(el('span', { text }))
    this.list = el('div', { class: 'kv-others-list', role: 'list', tabIndex: 0, 'aria-label': 'Other sessions' })
    this.more = el('p', { class: 'kv-quiet kv-more' })
    this.root = el('div', { class: 'kv-others' }, [
      el('div', { class: 'kv-row-head' }, [term('Other sessions', 'others'), this.title]),
      this.head,
      this.list,
      this.more,
    ])
  }

  update() {
    const { model } = this
    const others = [...model.sessions.values()].filter((session) => session.id !== model.own)
    const shown = others.slice(0, OTHERS).map((session) => outline(model, session))
    const longest = Math.max(1, ...shown.map((row) => row.blocks.length))
    setText(this.title, others.length ? count(others.length) : NOBODY[model.scope] ?? NOBODY.full)
    this.head.hidden = this.list.hidden = !others.length
    reconcile(this.list, shown, (row) => row.id, newOther, (node, row) => updateOther(node, row, longest))
    const left = others.length - shown.length
    setText(this.more, left > 0 ? `and ${count(left)} more` : '')
    this.more.hidden = left <= 0
  }
}

const NOBODY = {
  full: 'nobody else now: send a message in a second tab, and the trunk counts one session more',
  self: 'not shown by this server, only counted in the pool',
}

/** What a row shows of a session: the blocks of all its sequences, each once, by role. */
function outline(model, session) {
  const { id, state, sequences } = session
  const views = [...sequences.values()]
  const blocks = [...new Set(views.flatMap((view) => view.table))]
  const roles = { system: 0, shared: 0, private: 0 }
  for (const block of blocks) roles[model.role(block)]++
  const tokens = views.reduce((sum, view) => sum + view.tokens, 0)
  const trunk = views[0] && model.trunkOf(views[0].table)
  return { id, state, tokens, blocks, roles, also: also(model, session), trunk: trunk ? `after ${trunk.blocks} of ${trunk.system.table.length}` : '–' }
}

function newOther() {
  const parts = ['system', 'shared', 'private'].map((role) => el('span', { dataset: { role } }))
  const bar = el('span', { class: 'kv-other-bar', 'aria-hidden': 'true' }, parts)
  const cells = ['name', 'state', null, 'tokens', 'blocks', 'trunk', 'also']
  return el(
    'div',
    { class: 'kv-other', role: 'listitem', dataset: { testid: 'kv-other-session' } },
    cells.map((name) => (name ? el('span', { class: `kv-other-${name}` }) : bar)),
  )
}

function updateOther(node, { id, state, tokens, blocks, roles, trunk, also }, longest) {
  const [name, status, bar, tokenCell, blockCell, trunkCell, alsoCell] = node.children
  setData(node, { session: id, state, tokens, blocks: blocks.length })
  node.kvBlocks = blocks
  node.kvNote = `Session ${id}: ${plural(tokens, 'token')} in ${plural(blocks.length, 'block')}. ${also}`.trim()
  setText(alsoCell, also)
  alsoCell.hidden = !also
  setText(name, `${id}`)
  setText(status, state)
  setText(tokenCell, count(tokens))
  setText(blockCell, count(blocks.length))
  setText(trunkCell, trunk)
  for (const part of bar.children) {
    const width = `${(100 * roles[part.dataset.role]) / longest}%`
    if (part.style.width !== width) part.style.width = width
  }
}
