// Numbers and names as words. No DOM.

const whole = new Intl.NumberFormat('en')

export function count(value) {
  return whole.format(value)
}

/** `3 blocks`, `1 block`. */
export function plural(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? '' : 's'}`
}

/** A share of a whole. Something is never shown as 0 %, and not everything never as 100 %. */
export function percent(part, total) {
  if (!total || !part) return '0 %'
  if (part === total) return '100 %'
  const share = (100 * part) / total
  if (share < 0.1) return '< 0.1 %'
  if (share > 99.9) return '> 99.9 %'
  return `${share.toFixed(1)} %`
}

/** How many times as much, with one decimal below a hundred. */
export function times(ratio) {
  return `${ratio < 100 ? ratio.toFixed(1) : count(Math.round(ratio))}×`
}

export function bytes(value) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB']
  let unit = 0
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024
    unit++
  }
  return `${unit && value < 100 ? value.toFixed(1) : count(Math.round(value))} ${units[unit]}`
}

/** Ids in words: `3`, `3 and 7`, `3 to 9`, `3, 4, 9 … 12 (20 in all)`. */
export function ids(blocks) {
  if (blocks.length === 1) return String(blocks[0])
  const consecutive = blocks.every((block, i) => !i || Math.abs(block - blocks[i - 1]) === 1)
  if (consecutive && blocks.length > 2) return `${Math.min(...blocks)} to ${Math.max(...blocks)}`
  if (blocks.length <= 6) return `${blocks.slice(0, -1).join(', ')} and ${blocks.at(-1)}`
  return `${blocks.slice(0, 4).join(', ')} … ${blocks.at(-1)} (${count(blocks.length)} in all)`
}

/** A text up to `length` characters. */
export function short(text, length = 24) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text
}
