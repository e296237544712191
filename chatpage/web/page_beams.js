// The beams of a search that goes on: the live ones with their scores, the likeliest first, then the finished ones.
//
// Like page.js the body of a function that Gradio calls once, with `element`, `props` and `watch`. `props.value` is
// {live: [{score, shared, text}], finished: [the same]}, or {} while nothing is searched for. `shared` is the end of what
// a beam has in common with one above it, and `text` goes on from there. Both are a model's words, and are never anything
// but text in here.

function make(tag, attributes, children = []) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value)
  node.append(...children)
  return node
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text
}

const live = make('ol', { 'aria-label': 'Live beams, the likeliest first' })
const finished = make('ol', { 'aria-label': 'Finished beams, the best first', class: 'finished' })
const ended = make('h3', {}, ['Finished ', make('small', {}, ['score: that sum, weighed by length'])])
const search = make('section', { 'aria-label': 'Beam search', tabindex: '0', hidden: '' }, [
  make('h3', {}, ['Live beams ', make('small', {}, ['score: sum of log-probabilities'])]),
  live,
  ended,
  finished,
])
element.replaceChildren(search)

function newBeam() {
  const score = make('span', { class: 'score' })
  return make('li', {}, [score, make('span', { class: 'text' }, [make('span', { class: 'shared' }), ''])])
}

function drawBeams(list, beams) {
  while (list.children.length < beams.length) list.append(newBeam())
  while (list.children.length > beams.length) list.lastChild.remove()
  beams.forEach((beam, index) => {
    const [score, text] = list.children[index].children
    setText(score, beam.score)
    setText(text.firstChild, beam.shared)
    if (text.lastChild.data !== beam.text) text.lastChild.data = beam.text
  })
}

function draw() {
  const { live: going = [], finished: done = [] } = props.value ?? {}
  search.hidden = !going.length
  ended.hidden = finished.hidden = !done.length
  drawBeams(live, going)
  drawBeams(finished, done)
}

watch('value', draw)
draw()
