// Blocks of a table as a row of chips: the block's number in each, filled as far as the block is.

import { el, reconcile, setData, setText } from './dom.js'

/** Logical → physical. With `most`, only so many chips are drawn, and a gap stands for those between. */
export class Chips {
  constructor(model, most = Infinity) {
    this.model = model
    this.most = most
    this.root = el('span', { class: 'kv-chips' })
  }

  /** `blocks` are the logical blocks `from`, `from` + 1 … of a table that has `tokens`. */
  update(blocks, tokens, from = 0) {
    const size = this.model.blockSize
    const items = blocks.map((block, i) => {
      const logical = from + i
      return { block, logical, held: Math.max(0, Math.min(size, tokens - logical * size)) }
    })
    const left = items.length - this.most
    if (left > 0) items.splice(1, left + 1, { gap: left + 1 })
    const place = new Map(items.map((item, i) => [item, i]))
    reconcile(this.root, items, (item) => place.get(item), newChip, (node, item) => updateChip(node, this.model, item))
  }
}

function newChip() {
  const fill = el('span', { class: 'kv-chip-fill' })
  const box = el('span', { class: 'kv-chip-box' }, [fill, el('span', { class: 'kv-chip-id' })])
  const head = el('span', { class: 'kv-chip-head' }, [el('span'), el('span', { class: 'kv-chip-refs' })])
  return el('span', { class: 'kv-chip' }, [head, box])
}

function updateChip(node, model, { block, logical, held, gap }) {
  const [head, box] = node.children
  const [index, refs] = head.children
  const [fill, id] = box.children
  node.classList.toggle('kv-gap', Boolean(gap))
  if (gap) {
    delete node.dataset.block
    setText(id, `+${gap}`)
    for (const label of [index, refs]) setText(label, '')
    return
  }
  const ref = model.ref[block], copy = model.copiedFrom.get(block)
  setData(node, { block, role: model.role(block) })
  setText(index, String(logical))
  node.classList.toggle('kv-copied', Boolean(copy))
  node.classList.toggle('kv-across', model.acrossSessions().has(block))
  setText(id, String(block))
  setText(refs, ref >= 2 ? `×${ref}` : '')
  setStyle(fill, 'height', `${(100 * held) / model.blockSize}%`)
  setStyle(box, '--copied', copy ? `${(100 * copy.fill) / model.blockSize}%` : '')
}

function setStyle(node, name, value) {
  if (node.style.getPropertyValue(name) !== value) node.style.setProperty(name, value)
}
