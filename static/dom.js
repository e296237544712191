// Small helpers over the DOM. Text goes in by textContent only.

import { TERMS } from './terms.js'

/** An element. Attributes by name; `class`, `text`, `tabIndex` and `dataset` do what they say. */
export function el(tag, attributes = {}, children = []) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'text') node.textContent = value
    else if (name === 'class') node.className = value
    else if (name === 'tabIndex') node.tabIndex = value
    else if (name === 'dataset') Object.assign(node.dataset, value)
    else node.setAttribute(name, value)
  }
  node.append(...children)
  return node
}

/** Set a text only where it differs: the browser lays out nothing that did not change. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text
}

export function setData(node, values) {
  for (const [name, value] of Object.entries(values)) {
    const text = String(value)
    if (node.dataset[name] !== text) node.dataset[name] = text
  }
}

/**
 * Make the children of `parent` stand for `items`: kept by key, made, moved or removed as needed.
 *
 * Returns the nodes that were removed. `create` may give one of them out again: `update` is called on it all the same.
 */
export function reconcile(parent, items, key, create, update) {
  const old = (parent.kvNodes ??= new Map())
  const now = new Map()
  let place = parent.firstChild
  for (const item of items) {
    const id = key(item)
    const node = old.get(id) ?? create(item)
    update(node, item)
    if (node === place) place = place.nextSibling
    else parent.insertBefore(node, place)
    now.set(id, node)
  }
  const removed = []
  for (const [id, node] of old) {
    if (now.get(id) === node) continue
    node.remove()
    removed.push(node)
  }
  parent.kvNodes = now
  return removed
}

/** A word that explains itself when it is pointed at or focused. */
export function term(label, name = label) {
  return el('button', { class: 'kv-term', type: 'button', text: label, dataset: { tip: TERMS[name] } })
}

export function section(title, name, children, aside = null) {
  const heading = el('h3', {}, [term(title, name)])
  return el('section', { class: `kv-section kv-section-${name}` }, [
    el('header', { class: 'kv-section-head' }, aside ? [heading, aside] : [heading]),
    ...children,
  ])
}

/** A row of buttons of which one is pressed. */
export function choice(label, options, chosen, onChange) {
  const group = el('div', { class: 'kv-choice', role: 'group', 'aria-label': label })
  for (const [value, text] of Object.entries(options)) {
    const button = el('button', { type: 'button', text, 'aria-pressed': String(value === chosen) })
    button.addEventListener('click', () => {
      for (const other of group.children) other.setAttribute('aria-pressed', String(other === button))
      onChange(value)
    })
    group.append(button)
  }
  return group
}

/** One tooltip for everything below `root` that carries `data-tip`: on hover, on focus, gone on Escape. */
export class Tooltip {
  constructor(root) {
    this.root = root
    this.node = el('div', { class: 'kv-tip', role: 'tooltip', hidden: '' })
    this.node.id = `kv-tip-${Tooltip.made++}`
    root.append(this.node)
    const find = (event) => event.target.closest?.('[data-tip]')
    root.addEventListener('pointerover', (event) => this._showSoon(find(event)))
    root.addEventListener('focusin', (event) => this._show(find(event)))
    root.addEventListener('pointerleave', () => this._show(null))
    root.addEventListener('focusout', () => this._show(null))
    root.addEventListener('keydown', (event) => event.key === 'Escape' && this._show(null))
  }

  /** A pointer that only passes by opens nothing. */
  _showSoon(target) {
    clearTimeout(this._timer)
    if (!target) this._show(null)
    else if (target !== this.target) this._timer = setTimeout(() => this._show(target), 250)
  }

  _show(target) {
    clearTimeout(this._timer)
    if (target === this.target) return
    this.target?.removeAttribute('aria-describedby')
    this.target = target
    this.node.hidden = !target
    if (!target) return
    this.node.textContent = target.dataset.tip
    target.setAttribute('aria-describedby', this.node.id)
    this._place(target.getBoundingClientRect(), this.root.getBoundingClientRect())
  }

  _place(target, root) {
    const { style, offsetWidth: width, offsetHeight: height } = this.node
    const left = Math.min(target.left - root.left, root.width - width - 8)
    const above = target.top - height - 6 > 0 && target.bottom + height + 6 > window.innerHeight
    style.left = `${Math.max(8, left)}px`
    style.top = `${above ? target.top - root.top - height - 6 : target.bottom - root.top + 6}px`
  }
}
Tooltip.made = 0

/** What is pointed at (hover) and what was clicked (pinned): blocks that every view highlights alike, and a note. */
export class Selection extends EventTarget {
  constructor() {
    super()
    this._hover = this._pin = null // {blocks, note}
  }

  /** The blocks to highlight; empty for none. */
  get blocks() {
    return (this._hover ?? this._pin)?.blocks ?? []
  }

  get note() {
    return (this._hover ?? this._pin)?.note ?? ''
  }

  hover(blocks, note = '') {
    this._hover = blocks && { blocks, note }
    this._changed()
  }

  /** Pin a selection, or let it go where it is pinned already. */
  pin(blocks, note = '') {
    this._pin = same(blocks, this._pin?.blocks) ? null : { blocks, note }
    this._changed()
  }

  clear() {
    this._hover = this._pin = null
    this._changed()
  }

  _changed() {
    this.dispatchEvent(new Event('change'))
  }
}

function same(a, b) {
  return !!a && !!b && (a.length === b.length && a.every((block, i) => block === b[i]))
}
